//! Nothing is left behind.

use libtest_mimic::Failed;

use crate::guest::WITHIN;
use crate::harness::wait::wait_for;
use crate::host::Holdings;
use crate::report::Report;
use crate::tour::Tour;

/// Drops all handles, one of a running VM among them, and counts.
pub fn run(tour: &mut Tour, report: &mut Report) -> Result<(), Failed> {
    report.say(format!(
        "Three VMs are left: two off, one running. This program now drops them, as any value in\n\
         Rust is dropped; it holds {} at the moment.",
        Holdings::now()?
    ));
    tour.let_go();
    let before = tour.holdings;
    // A thread leaves the list shortly after its work is done.
    let settled = wait_for(WITHIN, "everything to be given back", || {
        Holdings::now().ok().filter(|now| *now == before)
    });
    let after = settled.or_else(|_| Holdings::now())?;
    report.equal("what this program holds, as before the first VM", before, after);
    if let Some(folders) = tour.kvm_folders() {
        report.equal("VMs of this program, counted by the host's KVM", 0, folders.len());
    }
    Ok(())
}
