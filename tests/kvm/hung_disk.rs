//! A disk that does not answer: a device-mapper volume that is suspended under a guest that writes.
//!
//! What is in flight is the kernel's then, and no call of ours gets it back before the volume goes on. Nobody may wait
//! for that who need not.

use std::sync::mpsc::channel;
use std::thread;

use libtest_mimic::Failed;
use vm_lifecycle::config::DiskSpec;
use vm_lifecycle::state::State;
use vm_lifecycle::vm::operation::Outcome;

use crate::Body;
use crate::guest::{BOOT_WITHIN, Guest, WITHIN, done, small};
use crate::harness::guest_shell::GuestShell;
use crate::harness::wait::wait_for;
use crate::volume::Volume;

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![Body::new(
        "hung_disk::who_need_not_wait_does_not",
        who_need_not_wait_does_not,
    )]
}

/// Has the guest write its disk anew, from `mib` on, while the volume hangs, and waits until its flush is under way: what
/// it writes without one may stay in the host's cache.
fn write_in_vain(guest: &Guest, shell: &mut GuestShell, mib: u64) -> Result<(), Failed> {
    let disk = guest.vm.config().disks()[0].unit_name();
    let told = || -> Result<(u64, u64), Failed> {
        let device = &guest.unit(&disk)?["device"];
        let number = |name: &str| device[name].as_u64().ok_or("the device tells");
        Ok((number("written_bytes")?, number("in_flight")?))
    };
    let (before, _) = told()?;
    shell.succeed(&format!(
        "rm -f /tmp/wrote; (dd if=/dev/urandom of=/tmp/data bs=1M count=4 && \
         dd if=/tmp/data of=/dev/vda bs=1M seek={mib} oflag=direct conv=notrunc,fsync && touch /tmp/wrote) >/dev/null 2>&1 &"
    ))?;
    let under_way = wait_for(WITHIN, "a flush that hangs", || {
        let (written, in_flight) = told().ok()?;
        (written == before + (4 << 20) && in_flight > 0).then_some(())
    });
    under_way.map_err(|error| error.to_string().into())
}

fn who_need_not_wait_does_not() -> Result<(), Failed> {
    let volume = Volume::create()?;
    let builder = small("hung")?.disk(DiskSpec::new("data", volume.path()));
    let (guest, mut shell) = Guest::boot(builder)?;
    shell.succeed("yes kept | dd of=/dev/vda bs=1M count=4 iflag=fullblock oflag=direct conv=fsync")?;
    let kept = "dd if=/dev/vda bs=1M count=4 iflag=direct 2>/dev/null | md5sum";
    let sum = shell.succeed(kept)?;

    // A pause waits for what is in flight, and the VM tells how it is meanwhile; then all of it is on the disk.
    volume.hang()?;
    write_in_vain(&guest, &mut shell, 8)?;
    let pause = guest.vm.pause()?;
    guest.vm.inspect()?;
    assert_eq!(
        (guest.vm.state(), pause.outcome().is_none()),
        (State::Pausing, true)
    );
    volume.go_on()?;
    assert!(matches!(pause.wait(WITHIN), Some(Outcome::Done)), "{pause:?}");
    done(guest.vm.resume())?;
    shell.wait_until("test -e /tmp/wrote", WITHIN)?;
    shell.succeed("dd if=/dev/vda bs=1M skip=8 count=4 iflag=direct 2>/dev/null | cmp - /tmp/data")?;

    // Whoever cuts the power does not wait for the disk, which nobody else gets before it has answered.
    volume.hang()?;
    write_in_vain(&guest, &mut shell, 16)?;
    drop(guest.vm.pause()?);
    done(guest.vm.power_off())?;
    guest.wait_for(State::Off)?;
    let refused = guest.vm.start()?.wait(WITHIN).ok_or("the start goes on")?;
    assert!(refused.to_string().contains("in use"), "{refused}");
    volume.go_on()?;
    wait_for(WITHIN, "the disk to be free", || done(guest.vm.start()).ok())?;
    let mut shell = guest.shell()?;
    let piece = shell.run_within("dd if=/dev/urandom of=/tmp/piece bs=1M count=4", BOOT_WITHIN)?;
    assert_eq!(piece.status, 0, "{piece:?}");
    assert_eq!(shell.succeed(kept)?, sum);

    // Nor does who lets go of the VM, though closing the disk waits for what is in the host's cache.
    volume.hang()?;
    shell.succeed("dd if=/tmp/piece of=/dev/vda bs=1M oflag=direct conv=notrunc")?;
    let (gone, is_gone) = channel();
    thread::spawn(move || {
        drop(guest);
        gone.send(())
    });
    is_gone
        .recv_timeout(WITHIN)
        .map_err(|_| "the last handle waits for the disk".into())
}
