//! A real Debian with systemd and udev, on its own disk, in a VM of this crate.

use std::ffi::OsStr;
use std::process::Command;

use libtest_mimic::Failed;
use vm_lifecycle::config::DiskSpec;
use vm_lifecycle::event::EndCause;
use vm_lifecycle::state::State;

use crate::Body;
use crate::guest::{BOOT_WITHIN, Guest, done, small};
use crate::harness::artefacts;

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![Body::new(
        "debian::systemd_obeys_the_power_button",
        systemd_obeys_the_power_button,
    )]
}

fn run(program: &str, arguments: &[&OsStr]) -> Result<String, Failed> {
    let output = Command::new(program).args(arguments).output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = [output.stdout, output.stderr].concat();
    Err(format!("{program}: {}", String::from_utf8_lossy(&said)).into())
}

fn systemd_obeys_the_power_button() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("debian.img");
    let image = artefacts::debian_image()?;
    run(
        "cp",
        &["--sparse=always".as_ref(), image.as_os_str(), disk.as_os_str()],
    )?;
    let builder = small("debian")?
        .cmdline("console=ttyS0 quiet panic=-1 harness.root=/dev/vda")
        .startup_bytes(512 << 20)
        .disk(DiskSpec::new("root", &disk));
    let (guest, mut shell) = Guest::boot(builder)?;
    let state = shell.run_within("systemctl is-system-running --wait", BOOT_WITHIN)?;
    assert_eq!(
        state.text.trim(),
        "running",
        "{}",
        shell.succeed("systemctl --failed")?
    );
    assert_eq!(shell.succeed("cat /proc/1/comm")?, "systemd");
    shell.succeed("echo kept >/root/written")?;
    done(guest.vm.shut_down(BOOT_WITHIN))?;
    assert_eq!(guest.end(BOOT_WITHIN)?, EndCause::GuestPowerOff);
    guest.wait_for(State::Off)?;
    // It went down in order: nothing is left for a file system check to do, and what it wrote is there.
    run("/sbin/e2fsck", &["-fn".as_ref(), disk.as_os_str()])?;
    let request = "cat /root/written".as_ref();
    let written = run("/sbin/debugfs", &["-R".as_ref(), request, disk.as_os_str()])?;
    assert_eq!(written, "kept\n");
    Ok(())
}
