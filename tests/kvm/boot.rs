//! Stock Debian kernels boot, by every protocol, and see the machine that was described.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use libtest_mimic::Failed;
use vm_lifecycle::config::VmConfig;
use vm_lifecycle::event::{EndCause, EventKind};
use vm_lifecycle::ids::PortName;
use vm_lifecycle::memory::host::HostMemory;
use vm_lifecycle::vm::host::{HostDevices, HostPort};

use crate::Body;
use crate::guest::{BOOT_WITHIN, Guest, TestHost, WITHIN, done, small};
use crate::harness::artefacts::{Flavour, GuestKernel, INIT_REACHED};
use crate::harness::guest_shell::GuestShell;

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
    let host = TestHost::default();
    let devices = MorePorts {
        host: host.clone(),
        ends: Arc::default(),
    };
    let ends = devices.ends.clone();
    let guest = Guest::make_on(small("smp")?.cpus(4), host, devices, HostMemory::default())?;
    done(guest.vm.start())?;
    let mut shell = guest.shell()?;
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
    has_its_ports(
        &mut shell,
        &mut ends.lock().unwrap_or_else(PoisonError::into_inner),
    )?;
    // The clock of the machine is the host's, in UTC.
    let now = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map(|now| now.as_secs())
    };
    let before = now()?;
    let clock: u64 = shell.succeed("cat /sys/class/rtc/rtc0/since_epoch")?.parse()?;
    assert!(
        (before..=now()?).contains(&clock),
        "the guest's clock says {clock}, {before} has passed"
    );
    // What a kernel complains about is a defect of the machine. It finds no way to configure PCI before it has read the
    // ACPI tables, says so, and then finds one.
    let complaints =
        shell.run("dmesg -r | grep -E '^<[0-3]>' | grep -v 'No config space access function found'")?;
    assert_eq!(complaints.text, "");
    // The keyboard controller and the reset control register reset, as ACPI's register does.
    for way in ["kbd", "pci"] {
        shell.send(&format!("echo {way} >/sys/kernel/reboot/type && reboot -f"))?;
        let cause =
            std::iter::from_fn(|| guest.events.next(BOOT_WITHIN)).find_map(|event| match event.kind {
                EventKind::Reset { cause } => Some(format!("{cause:?}")),
                EventKind::Ended { cause } => Some(format!("{cause:?}")),
                _ => None,
            });
        assert_eq!(cause.as_deref(), Some("Guest"), "reset by {way}");
        shell.run_within("true", BOOT_WITHIN)?;
    }
    Ok(())
}

/// A host with a console and a byte channel beside the shell's port.
struct MorePorts {
    host: TestHost,
    /// The host's ends of `console` and `agent`.
    ends: Arc<Mutex<Vec<UnixStream>>>,
}

impl HostDevices for MorePorts {
    fn serial_output(&self, vm: &VmConfig) -> io::Result<Box<dyn Write + Send>> {
        self.host.serial_output(vm)
    }

    fn ports(&self, vm: &VmConfig) -> io::Result<Vec<HostPort>> {
        let mut ports = self.host.ports(vm)?;
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        ends.clear();
        for (name, console) in [("console", true), ("agent", false)] {
            let (ours, stream) = UnixStream::pair()?;
            ours.set_read_timeout(Some(WITHIN))?;
            ends.push(ours);
            let name = PortName::new(name).map_err(io::Error::other)?;
            ports.push(HostPort {
                name,
                console,
                stream,
            });
        }
        Ok(ports)
    }
}

/// The guest finds the ports by their names, and bytes pass through each both ways.
fn has_its_ports(shell: &mut GuestShell, ends: &mut [UnixStream]) -> Result<(), Failed> {
    let names = shell.succeed("cat /sys/class/virtio-ports/*/name | sort")?;
    assert_eq!(names, "agent\nconsole\nharness");
    let [console, agent] = ends else {
        return Err("two ends".into());
    };
    let mut said = [0; 8];
    shell.succeed("echo to-host >/dev/hvc0")?;
    console.read_exact(&mut said)?;
    assert_eq!(&said, b"to-host\r", "a console is a terminal");
    console.write_all(b"to-guest\n")?;
    assert_eq!(shell.succeed("head -n 1 </dev/hvc0")?, "to-guest");
    let id = shell.send(
        "for p in /sys/class/virtio-ports/*; do grep -qx agent $p/name && d=/dev/${p##*/}; done; exec 3<>$d; \
         echo to-host >&3; head -n 1 <&3",
    )?;
    agent.read_exact(&mut said)?;
    assert_eq!(&said, b"to-host\n");
    agent.write_all(b"to-guest\n")?;
    assert_eq!(shell.answer(id, "the agent's port", WITHIN)?.text, "to-guest\n");
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
