//! Stock Debian kernels boot, by every protocol, and see the machine that was described.

use std::io::Write;
use std::path::Path;

use libtest_mimic::Failed;
use vm_lifecycle::config::VmConfig;
use vm_lifecycle::event::EndCause;

use crate::Body;
use crate::guest::{BOOT_WITHIN, Guest, small};
use crate::harness::artefacts::{Flavour, GuestKernel, INIT_REACHED};

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![
        Body::new("boot::cloud_kernel_as_elf_reaches_init", || {
            reaches_init(Flavour::Cloud, false)
        }),
        Body::new("boot::cloud_kernel_as_bzimage_reaches_init", || {
            reaches_init(Flavour::Cloud, true)
        }),
        Body::new("boot::generic_kernel_as_elf_reaches_init", || {
            reaches_init(Flavour::Generic, false)
        }),
        Body::new("boot::generic_kernel_as_bzimage_reaches_init", || {
            reaches_init(Flavour::Generic, true)
        }),
        Body::new("boot::an_image_entered_by_pvh_reaches_init", pvh_reaches_init),
        Body::new(
            "boot::smp_guest_sees_all_its_cpus_and_devices",
            smp_guest_sees_all_its_cpus_and_devices,
        ),
        Body::new("boot::guest_with_sixteen_cpus_sees_them", guest_with_sixteen_cpus),
        Body::new("boot::guest_with_six_gib_sees_them", guest_with_six_gib_sees_them),
    ]
}

fn reaches_init(flavour: Flavour, bzimage: bool) -> Result<(), Failed> {
    let kernel = GuestKernel::find(flavour)?;
    let image = if bzimage { &kernel.bzimage } else { &kernel.elf };
    image_reaches_init(image, &kernel)
}

/// Debian's kernel with its own notes renamed, so that it counts as some other system with a PVH entry.
fn pvh_reaches_init() -> Result<(), Failed> {
    let kernel = GuestKernel::find(Flavour::Cloud)?;
    let mut image = std::fs::read(&kernel.elf)?;
    let owners: Vec<usize> = (0..image.len() - 20)
        .step_by(4)
        .filter(|at| {
            image[*at..].starts_with(&6u32.to_le_bytes()) && image[at + 12..].starts_with(b"Linux\0")
        })
        .collect();
    assert!(!owners.is_empty(), "the kernel has no notes of Linux");
    owners.iter().for_each(|at| image[at + 12] = b'M');
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(&image)?;
    image_reaches_init(file.path(), &kernel)
}

fn image_reaches_init(image: &Path, kernel: &GuestKernel) -> Result<(), Failed> {
    let builder = VmConfig::builder("boot", image)
        .initrd(&kernel.initramfs)
        .cmdline("console=ttyS0 quiet loglevel=3 panic=-1 harness.modules=none harness.exit=poweroff")
        .startup_bytes(256 << 20);
    let guest = Guest::start(builder)?;
    assert_eq!(
        guest.end(BOOT_WITHIN)?,
        EndCause::GuestPowerOff,
        "{}",
        guest.host.console()
    );
    let console = guest.host.console();
    assert!(console.contains(INIT_REACHED), "{console}");
    Ok(())
}

fn smp_guest_sees_all_its_cpus_and_devices() -> Result<(), Failed> {
    let (_guest, mut shell) = Guest::boot(small("smp")?.cpus(4))?;
    assert_eq!(shell.succeed("cat /sys/devices/system/cpu/online")?, "0-3");
    assert_eq!(shell.succeed("grep -c ^processor /proc/cpuinfo")?, "4");
    // Every CPU runs something: a task bound to each of them ends.
    for cpu in 0..4 {
        assert_eq!(
            shell.succeed(&format!("taskset -c {cpu} echo on {cpu}"))?,
            format!("on {cpu}")
        );
    }
    let devices = shell.succeed("ls /sys/bus/pci/devices")?;
    assert_eq!(
        devices.split_whitespace().collect::<Vec<_>>(),
        ["0000:00:00.0", "0000:00:01.0", "0000:00:02.0"]
    );
    assert_eq!(
        shell.succeed("cat /sys/devices/system/clocksource/clocksource0/current_clocksource")?,
        "kvm-clock"
    );
    shell.succeed("head -c 4096 /dev/hwrng | wc -c | grep -qx 4096")?;
    // What a kernel complains about is a defect of the machine. It finds no way to configure PCI before it has read the
    // ACPI tables, says so, and then finds one.
    let complaints =
        shell.run("dmesg -r | grep -E '^<[0-3]>' | grep -v 'No config space access function found'")?;
    assert_eq!(complaints.text, "");
    Ok(())
}

fn guest_with_sixteen_cpus() -> Result<(), Failed> {
    let (_guest, mut shell) = Guest::boot(small("sixteen")?.cpus(16).startup_bytes(512 << 20))?;
    assert_eq!(shell.succeed("cat /sys/devices/system/cpu/online")?, "0-15");
    assert_eq!(shell.succeed("taskset -c 15 echo on 15")?, "on 15");
    Ok(())
}

fn guest_with_six_gib_sees_them() -> Result<(), Failed> {
    let (_guest, mut shell) = Guest::boot(small("six-gib")?.startup_bytes(6 << 30))?;
    let total: u64 = shell
        .succeed("awk '/MemTotal/ { print $2 }' /proc/meminfo")?
        .parse()?;
    assert!(total > 5_800_000 && total <= 6 << 20, "MemTotal is {total} KiB");
    let above = shell.succeed("grep -i 'system ram' /proc/iomem | tail -n 1")?;
    assert!(above.starts_with("100000000-"), "{above}");
    Ok(())
}
