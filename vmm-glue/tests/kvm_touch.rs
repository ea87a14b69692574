//! The touch payload, on real KVM: it ticks, and it sees what is not as it left it.

mod common;

use common::{Home, Tick, has_kvm};
use lazyvm_vmm_glue::kvm::TouchConfig;

#[test]
fn it_ticks_without_errors() {
    if !has_kvm() {
        return;
    }
    let home = Home::new();
    let machine = home.touch(1, TouchConfig::default());
    let ticks = machine.wait_ticks(10, 1);
    for (pair, number) in ticks.windows(2).zip(1..) {
        assert_eq!(pair[0].tick, number);
        assert!(pair[1].touches > pair[0].touches);
    }
    assert!(ticks.iter().all(|tick| tick.errors == 0), "{}", machine.output());
}
