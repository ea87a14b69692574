mod common;
use common::Home;
use lazyvm_vmm_glue::kvm::TouchConfig;
#[test]
fn probe() {
    let home = Home::new();
    let cpus: u32 = std::env::var("CPUS").map_or(1, |c| c.parse().unwrap());
    let m = home.touch(cpus, TouchConfig::default());
    std::thread::sleep(std::time::Duration::from_secs(2));
    println!("{}", m.output());
    println!("{:?}", m.machine());
    if std::env::var("MV").is_ok() {
    let m = home.move_on(m);
    std::thread::sleep(std::time::Duration::from_secs(1));
    println!("{}", m.output());
    println!("{:?}", m.machine());
    }
}
