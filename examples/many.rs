//! Many VMs in one process: all boot, all end with their handles, and the process is as it was before.
//!
//! ```text
//! cargo run --example many -- KERNEL INITRD COUNT
//! ```

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use vm_lifecycle::config::VmConfig;
use vm_lifecycle::event::{EndCause, EventKind};
use vm_lifecycle::vm::Vm;
use vm_lifecycle::vm::host::{DefaultHost, KvmPlatform};

const WITHIN: Duration = Duration::from_secs(600);
const CMDLINE: &str = "console=ttyS0 quiet loglevel=3 panic=-1 harness.modules=none harness.exit=poweroff";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let usage = "usage: many KERNEL INITRD COUNT";
    let mut words = std::env::args().skip(1);
    let kernel = words.next().ok_or(usage)?;
    let initrd = words.next().ok_or(usage)?;
    let count: usize = words.next().ok_or(usage)?.parse()?;

    // The first VM of a process makes what all later ones share: counted before is what one VM leaves behind, once the
    // main thread is alone again.
    drop(start(&kernel, &initrd, 0)?);
    let before = settled(|[threads, ..]| threads == 1)?;
    let inheritable = inheritable_count()?;
    let vms = (0..count)
        .map(|index| start(&kernel, &initrd, index))
        .collect::<Result<Vec<_>, _>>()?;
    println!("{count} guests run: {}", describe(counts()?));
    // One each is not ours to close on exec: the event manager's own.
    assert!(
        inheritable_count()? <= inheritable + count,
        "a child would inherit descriptors of the guests"
    );

    // Every second guest is awaited, every other one is cut off in the middle of whatever it does.
    for vm in vms.iter().step_by(2) {
        let events = vm.events();
        while vm.state() != vm_lifecycle::state::State::Off {
            let event = events.next(WITHIN).ok_or("a guest never ended")?;
            if let EventKind::Ended { cause } = event.kind {
                assert_eq!(cause, EndCause::GuestPowerOff);
            }
        }
    }
    drop(vms);

    let after = settled(|now| now == before)?;
    println!("their handles are dropped: {}", describe(after));
    assert_eq!(before, after, "threads, descriptors or mappings are left behind");
    Ok(())
}

/// The counts once they are as wanted, or as they are after a while: a thread leaves the list shortly after its work.
fn settled(wanted: impl Fn([usize; 3]) -> bool) -> Result<[usize; 3], std::io::Error> {
    for _ in 0..1000 {
        let now = counts()?;
        if wanted(now) {
            return Ok(now);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    counts()
}

fn start(kernel: &str, initrd: &str, index: usize) -> Result<Vm, Box<dyn std::error::Error>> {
    let config = VmConfig::builder(format!("many-{index}"), std::path::absolute(kernel)?)
        .initrd(std::path::absolute(initrd)?)
        .cmdline(CMDLINE)
        .cpus(1 + (index % 2) as u32)
        .startup_bytes(128 << 20)
        .build()?;
    let vm = Vm::new(config, Arc::new(KvmPlatform::new(DefaultHost)))?;
    let started = vm.start()?.wait(WITHIN).ok_or("a start never ended")?;
    assert!(started.is_done(), "{started}");
    Ok(vm)
}

/// Threads, open descriptors and the guests' own mappings of this process.
fn counts() -> Result<[usize; 3], std::io::Error> {
    let entries = |folder: &str| fs::read_dir(folder).map(Iterator::count);
    let maps = fs::read_to_string("/proc/self/maps")?;
    let guest_maps = maps
        .lines()
        .filter(|line| line.contains("memfd:") || line.contains("kvm-vcpu"));
    Ok([
        entries("/proc/self/task")?,
        entries("/proc/self/fd")?,
        guest_maps.count(),
    ])
}

/// The descriptors that a child process would inherit: those without `O_CLOEXEC` among their flags (proc(5)).
fn inheritable_count() -> Result<usize, std::io::Error> {
    let mut count = 0;
    for entry in fs::read_dir("/proc/self/fdinfo")? {
        let Ok(info) = fs::read_to_string(entry?.path()) else {
            continue;
        };
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags
            .and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok())
            .unwrap_or(0);
        count += usize::from(flags & 0o2_000_000 == 0);
    }
    Ok(count)
}

fn describe([threads, descriptors, mappings]: [usize; 3]) -> String {
    format!("{threads} threads, {descriptors} descriptors, {mappings} mappings of guests")
}
