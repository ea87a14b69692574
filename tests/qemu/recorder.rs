//! What a QEMU touches right after a pause, as a recorder tells: its guest's code among it, although TCG has translated that
//! long ago.

use std::collections::BTreeSet;
use std::time::Duration;

use lazyvm_server::port::SourceMachine;
use lazyvm_vmm_glue::qemu::Source;

use crate::guest::{Qemus, Shape, can_move};

const SHAPE: Shape = Shape {
    memory_mib: 256,
    cpus: 2,
    fill_mib: 64,
};

/// Pages of code that any tick runs through. Of what is translated already two or three are seen, which a second time what was
/// translated for the first is.
const CODE_MIN: usize = 6;

#[test]
fn a_recorder_hears_of_code_and_lets_the_guest_go_on() {
    if !can_move("a_recorder_hears_of_code_and_lets_the_guest_go_on") {
        return;
    }
    let qemus = Qemus::new(SHAPE);
    let _qemu = qemus.start("a");
    let source = Source::connect(&qemus.qmp("a")).unwrap();
    let mut scout = source.scout().unwrap();
    let mut recorder = source.recorder().unwrap();
    for round in 0..2 {
        source.prepare_pause().unwrap();
        source.pause().unwrap();
        scout.watch().unwrap();
        recorder.start().unwrap();
        source.resume().unwrap();
        std::thread::sleep(Duration::from_millis(500));
        let touched = recorder.stop();
        let code: BTreeSet<_> = scout
            .look()
            .unwrap()
            .code
            .iter()
            .flat_map(|run| run.pages())
            .collect();
        let seen = touched
            .iter()
            .filter(|page| code.contains(page))
            .collect::<BTreeSet<_>>()
            .len();
        assert!(
            round > 0 || seen >= CODE_MIN,
            "{seen} pages of code among {} pages",
            touched.len()
        );
        assert!(touched.iter().all(|page| page.0 < source.layout().pages()));
        qemus.wait_ticks("a", 5);
    }
    // Nobody is left waiting by one that is dropped.
    source.prepare_pause().unwrap();
    source.pause().unwrap();
    scout.watch().unwrap();
    recorder.start().unwrap();
    source.resume().unwrap();
    drop(recorder);
    qemus.wait_ticks("a", 5);
}
