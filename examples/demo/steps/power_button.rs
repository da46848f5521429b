//! The guest shuts itself down because it is asked to.

use libtest_mimic::Failed;
use vm_lifecycle::event::EndCause;
use vm_lifecycle::state::State;

use crate::guest::{WITHIN, done};
use crate::report::Report;
use crate::tour::Tour;

/// Presses the button and reads why the guest ended.
pub fn run(tour: &mut Tour, report: &mut Report) -> Result<(), Failed> {
    report.say(
        "The VM's power button is pressed. A guest may take its time or ignore it; this one ends\n\
         its programs and switches itself off. The VM remains and could be started again.",
    );
    let guest = tour.guest()?;
    done(guest.vm.shut_down(WITHIN))?;
    let cause = guest.end(WITHIN)?;
    report.equal(
        "why the guest ended, says the event",
        format!("{:?}", EndCause::GuestPowerOff),
        format!("{cause:?}"),
    );
    report.equal("state of the VM", State::Off, guest.vm.state());
    if let Some(folders) = tour.kvm_folders() {
        report.equal("VMs of this program, counted by the host's KVM", 0, folders.len());
    }
    Ok(())
}
