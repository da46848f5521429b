//! The machine as the guest finds it.

use libtest_mimic::Failed;

use crate::harness::artefacts::{Flavour, GuestKernel};
use crate::report::Report;
use crate::steps::make::{CPUS, DISK, DISK_BYTES, MAC};
use crate::tour::Tour;

/// Questions to the guest: what, the command, the answer.
fn questions() -> Result<[(&'static str, &'static str, String); 7], Failed> {
    let kernel = GuestKernel::find(Flavour::Cloud)?;
    Ok([
        ("kernel (uname -r)", "uname -r", kernel.release),
        ("processors (nproc)", "nproc", CPUS.to_string()),
        (
            "serial number of the disk /dev/vda",
            "cat /sys/block/vda/serial",
            DISK.to_owned(),
        ),
        (
            "its size in bytes",
            "echo $(($(cat /sys/block/vda/size) * 512))",
            DISK_BYTES.to_string(),
        ),
        (
            "address of the network card eth0",
            "cat /sys/class/net/eth0/address",
            MAC.to_owned(),
        ),
        (
            "what its clock runs by",
            "cat /sys/devices/system/clocksource/clocksource0/current_clocksource",
            "kvm-clock".to_owned(),
        ),
        (
            "errors in its kernel's log",
            // Before it has read the ACPI tables it finds no way to configure PCI, and says so.
            "dmesg -r | grep '^<[0-3]>' | grep -v 'No config space access function found' || echo none",
            "none".to_owned(),
        ),
    ])
}

/// Asks.
pub fn run(tour: &mut Tour, report: &mut Report) -> Result<(), Failed> {
    report.say("The commands run in the guest, and the answers are its kernel's, not the library's.");
    let (_, shell) = tour.shell()?;
    for (what, command, expected) in questions()? {
        report.equal(what, expected, shell.succeed(command)?);
    }
    let total_kib: u64 = shell
        .succeed("awk '/MemTotal/ { print $2 }' /proc/meminfo")?
        .parse()?;
    report.check(
        "memory for programs",
        "the most part of 256 MiB, the kernel needs some itself",
        format!("{} MiB", total_kib / 1024),
        (180..256).contains(&(total_kib / 1024)),
    );
    Ok(())
}
