//! Two ways to crash, told apart, and a neighbour in the same process.

use libtest_mimic::Failed;
use vm_lifecycle::event::EndCause;
use vm_lifecycle::state::State;

use crate::guest::{Guest, WITHIN, done, small};
use crate::report::Report;
use crate::tour::Tour;

/// What is done to the guest's kernel, in words and as a command, and how the guest must end.
const CRASHES: [(&str, &str, EndCause); 2] = [
    (
        "a triple fault (it breaks its own interrupt table)",
        "echo triple >/sys/kernel/reboot/type; reboot -f",
        EndCause::TripleFault,
    ),
    (
        "a kernel panic",
        "echo c >/proc/sysrq-trigger",
        EndCause::GuestPanic,
    ),
];

/// Crashes one VM in two ways beside another that goes on.
pub fn run(tour: &mut Tour, report: &mut Report) -> Result<(), Failed> {
    report.say(
        "Two more VMs run in this same program. One is made to crash, twice and differently; the\n\
         library must tell why each time, and the other VM must not even notice.",
    );
    let neighbour = Guest::start(small("neighbour")?)?;
    let victim = Guest::start(small("victim")?)?;
    let mut neighbours_shell = neighbour.host.shell()?;
    let before = neighbours_shell.succeed("cat /proc/sys/kernel/random/boot_id")?;
    let mut shell = victim.host.shell()?;
    for (index, (words, command, expected)) in CRASHES.into_iter().enumerate() {
        if index > 0 {
            done(victim.vm.start())?;
            shell = victim.host.shell()?;
        }
        shell.send(command)?;
        let cause = victim.end(WITHIN)?;
        report.equal(words, format!("{expected:?}"), format!("{cause:?}"));
        victim.wait_for(State::Off)?;
    }
    report.equal("state of the neighbour", State::Running, neighbour.vm.state());
    let after = neighbours_shell.succeed("cat /proc/sys/kernel/random/boot_id")?;
    report.equal("its boot, by its kernel's number", before, after);
    tour.neighbours.push((neighbour, neighbours_shell));
    tour.neighbours.push((victim, shell));
    Ok(())
}
