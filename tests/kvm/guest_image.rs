//! The harness's own guest, proven under QEMU: what fails in a VM of this crate and not here is the crate's.

use std::net::Ipv4Addr;
use std::time::Duration;

use libtest_mimic::Failed;

use crate::Body;
use crate::harness::artefacts::{self, Flavour, GuestKernel, INIT_REACHED};
use crate::harness::guest_shell::{GuestShell, ShellError};
use crate::harness::qemu::{QemuGuest, QemuOptions};
use crate::harness::resources::{self, Usage};
use crate::harness::tap::Tap;

const BOOT_WITHIN: Duration = Duration::from_secs(300);
const END_WITHIN: Duration = Duration::from_secs(180);

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![
        Body::new("guest_image::cloud_kernel_serves_commands", || {
            serves_commands(Flavour::Cloud)
        }),
        Body::new("guest_image::generic_kernel_serves_commands", || {
            serves_commands(Flavour::Generic)
        }),
        Body::new("guest_image::power_button_powers_off", power_button_powers_off),
        Body::new("guest_image::exit_word_ends_the_guest", exit_word_ends_the_guest),
        Body::new("guest_image::debian_disk_boots", debian_disk_boots),
        Body::new(
            "guest_image::memory_beyond_4_gib_boots",
            memory_beyond_4_gib_boots,
        ),
        Body::new("guest_image::tap_reaches_the_guest", tap_reaches_the_guest),
    ]
}

fn serves_commands(flavour: Flavour) -> Result<(), Failed> {
    let kernel = GuestKernel::find(flavour)?;
    let guest = QemuGuest::start(&kernel, &QemuOptions::default())?;
    let mut shell = GuestShell::connect(guest.port()?, BOOT_WITHIN)?;
    assert_eq!(shell.succeed("uname -r")?, kernel.release);
    assert_eq!(shell.run("echo out; echo err >&2; exit 7")?.status, 7);
    assert_eq!(shell.run("echo out; echo err >&2")?.text, "out\nerr\n");
    assert_eq!(shell.succeed("sleep 1000 & echo left behind")?, "left behind");
    assert_eq!(
        shell.succeed("yes | head -c 300000 | md5sum")?,
        shell.succeed("yes | dd bs=3000 count=100 iflag=fullblock 2>/dev/null | md5sum")?
    );
    assert_eq!(
        shell.succeed("yes | head -c 100000")?.len(),
        99_999,
        "a long answer arrives whole"
    );
    let late = shell.run_within("sleep 2; echo late", Duration::from_millis(100));
    assert!(matches!(late, Err(ShellError::TimedOut { .. })), "{late:?}");
    assert_eq!(shell.succeed("echo next")?, "next", "a late answer is skipped");
    shell.wait_until("test -e /sys/class/virtio-ports", Duration::from_secs(60))?;
    assert!(guest.console().contains(INIT_REACHED), "{}", guest.console());
    assert!(resources::vm_exit_count(guest.pid())? > 1_000);
    assert!(Usage::of_process(guest.pid())?.thread_count >= 2);
    Ok(())
}

fn power_button_powers_off() -> Result<(), Failed> {
    let kernel = GuestKernel::find(Flavour::Cloud)?;
    let mut guest = QemuGuest::start(&kernel, &QemuOptions::default())?;
    // Ready means: ready for the button too.
    GuestShell::connect(guest.port()?, BOOT_WITHIN)?;
    guest.command("system_powerdown")?;
    guest.wait(END_WITHIN)?;
    Ok(())
}

fn exit_word_ends_the_guest() -> Result<(), Failed> {
    let kernel = GuestKernel::find(Flavour::Cloud)?;
    let cmdline = "console=ttyS0 quiet panic=-1 harness.modules=none harness.exit=poweroff".to_string();
    let mut guest = QemuGuest::start(
        &kernel,
        &QemuOptions {
            cmdline,
            ..QemuOptions::default()
        },
    )?;
    guest.wait(BOOT_WITHIN)?;
    assert!(guest.console().contains(INIT_REACHED), "{}", guest.console());
    Ok(())
}

fn debian_disk_boots() -> Result<(), Failed> {
    let kernel = GuestKernel::find(Flavour::Cloud)?;
    // Written to a temporary overlay only.
    let drive = format!(
        "file={},format=raw,if=virtio,snapshot=on",
        artefacts::debian_image()?.display()
    );
    let options = QemuOptions {
        memory_mib: 512,
        cmdline: "console=ttyS0 quiet panic=-1 harness.root=/dev/vda".to_string(),
        arguments: ["-drive", &drive].map(str::to_string).to_vec(),
        ..QemuOptions::default()
    };
    let mut guest = QemuGuest::start(&kernel, &options)?;
    let mut shell = GuestShell::connect(guest.port()?, BOOT_WITHIN)?;
    let state = shell.run_within("systemctl is-system-running --wait", BOOT_WITHIN)?;
    assert_eq!(
        state.text.trim(),
        "running",
        "{:?}",
        shell.succeed("systemctl --failed")
    );
    guest.command("system_powerdown")?;
    guest.wait(END_WITHIN)?;
    Ok(())
}

fn memory_beyond_4_gib_boots() -> Result<(), Failed> {
    let kernel = GuestKernel::find(Flavour::Cloud)?;
    let guest = QemuGuest::start(
        &kernel,
        &QemuOptions {
            memory_mib: 6 * 1024,
            ..QemuOptions::default()
        },
    )?;
    let mut shell = GuestShell::connect(guest.port()?, BOOT_WITHIN)?;
    let total_mib: u64 = shell.succeed("free -m | awk '/Mem:/ { print $2 }'")?.parse()?;
    assert!((5_700..6_144).contains(&total_mib), "{total_mib} MiB");
    Ok(())
}

fn tap_reaches_the_guest() -> Result<(), Failed> {
    let kernel = GuestKernel::find(Flavour::Cloud)?;
    let tap = Tap::create(Ipv4Addr::new(10, 213, 1, 1))?;
    let before = Usage::of_self()?.fd_count;
    drop(tap.open()?);
    assert_eq!(
        Usage::of_self()?.fd_count,
        before,
        "opening leaves no descriptor behind"
    );
    let netdev = format!("tap,id=n,ifname={},script=no,downscript=no", tap.name());
    let arguments = ["-netdev", &netdev, "-device", "virtio-net-pci,netdev=n"]
        .map(str::to_string)
        .to_vec();
    let guest = QemuGuest::start(
        &kernel,
        &QemuOptions {
            arguments,
            ..QemuOptions::default()
        },
    )?;
    let mut shell = GuestShell::connect(guest.port()?, BOOT_WITHIN)?;
    shell.succeed("ip addr add 10.213.1.2/24 dev eth0 && ip link set eth0 up")?;
    shell.wait_until(
        &format!("ping -c 1 -W 1 {}", tap.address()),
        Duration::from_secs(20),
    )?;
    Ok(())
}
