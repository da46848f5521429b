//! A reset empties the memory and leaves the disk alone.

use libtest_mimic::Failed;
use vm_lifecycle::event::{EventKind, ResetCause};
use vm_lifecycle::state::State;

use crate::guest::{BOOT_WITHIN, WITHIN, done};
use crate::report::Report;
use crate::tour::Tour;

/// Every boot of a Linux kernel gives itself another one.
const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";

/// Resets the VM and looks for what was in its memory and on its disk.
pub fn run(tour: &mut Tour, report: &mut Report) -> Result<(), Failed> {
    report.say(
        "A note is left in the guest's memory, then the VM is reset, as by the button on a case:\n\
         the guest is not asked, and boots again.",
    );
    let letter_sum = tour.letter_sum.clone();
    let (guest, shell) = tour.shell()?;
    shell.succeed("echo remember me >/tmp/note")?;
    let before = shell.succeed(BOOT_ID)?;
    done(guest.vm.reset())?;
    let told = std::iter::from_fn(|| guest.events.next(WITHIN)).find_map(|event| match event.kind {
        EventKind::Reset { cause } => Some(cause),
        _ => None,
    });
    let told = told.map_or_else(|| "no event".to_owned(), |cause| format!("{cause:?}"));
    report.equal(
        "who reset it, says the event",
        format!("{:?}", ResetCause::Host),
        told,
    );
    let note = shell.run_within("cat /tmp/note 2>/dev/null || echo gone", BOOT_WITHIN)?;
    report.equal("the note in memory", "gone", note.text.trim());
    let after = shell.succeed(BOOT_ID)?;
    report.check(
        "the kernel's number of this boot",
        format!("another than {before}"),
        &after,
        before != after,
    );
    let sum =
        shell.run("mkdir -p /mnt; mount -t ext4 /dev/vda /mnt && md5sum </mnt/letter | cut -d ' ' -f 1")?;
    report.equal(
        "checksum of the letter on the disk",
        letter_sum.as_str(),
        sum.text.trim(),
    );
    report.equal("state of the VM", State::Running, guest.vm.state());
    Ok(())
}
