//! From power-on to the first process of the guest.

use std::time::Instant;

use libtest_mimic::Failed;
use vm_lifecycle::state::State;

use crate::guest::{BOOT_WITHIN, done};
use crate::harness::artefacts::{Flavour, GuestKernel, INIT_REACHED};
use crate::host;
use crate::report::Report;
use crate::tour::Tour;

/// Starts the guest and says what that took.
pub fn run(tour: &mut Tour, report: &mut Report) -> Result<(), Failed> {
    let kernel = GuestKernel::find(Flavour::Cloud)?;
    report.say(format!(
        "The library puts Debian's kernel {} into the VM's memory and lets its processors run.",
        kernel.release
    ));
    let began = Instant::now();
    done(tour.guest()?.vm.start())?;
    let running = began.elapsed();
    report.equal("state of the VM", State::Running, tour.guest()?.vm.state());
    tour.guest()?.host.wait_for_console(INIT_REACHED, BOOT_WITHIN)?;
    let booted = began.elapsed();
    let folders = tour.kvm_folders();
    let exits = folders
        .iter()
        .flatten()
        .map(|folder| host::exit_count(folder))
        .sum::<Result<u64, Failed>>()?;
    let console = tour.guest()?.host.console();
    report.equal(
        "times that the guest's first process began, by its serial port",
        1,
        console.matches(INIT_REACHED).count(),
    );
    report.say(format!(
        "The VM was built and running after {:.0} ms, the guest had booted after {:.1} s.",
        running.as_secs_f64() * 1000.0,
        booted.as_secs_f64()
    ));
    match folders {
        Some(folders) => {
            report.equal("VMs of this program, counted by the host's KVM", 1, folders.len());
            report.say(format!(
                "KVM had to step in {exits} times until then (a \"VM exit\"); in between, the guest had\n\
                 the processor to itself."
            ));
        }
        None => report.say("KVM's own counters are not for this user, so they are not shown."),
    }
    if std::env::var_os("VM_LIFECYCLE_TEST_HOST").is_some() {
        report.say(
            "All of this runs in an emulated computer, because yours cannot run VMs itself: on\n\
             one that can, times are many times shorter.",
        );
    }
    tour.connect()
}
