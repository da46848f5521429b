//! A tour of what the library can do, on real Debian kernels, in plain words: `cargo xtask demo`.
//!
//! Every step says what it does, what it expects and what it saw; the program fails when one check does. A further step
//! is one file in `steps/` and one line in [`STEPS`]. The guests are those of the tests, so that a claim made here can
//! be looked up there.

#[path = "../../tests/kvm/guest.rs"]
#[allow(dead_code)] // Written for the tests; the tour needs a part of it.
mod guest;
#[path = "../../tests/harness/mod.rs"]
mod harness;
mod host;
mod report;
mod steps;
mod tour;

use std::process::ExitCode;

use libtest_mimic::Failed;

use crate::harness::kvm;
use crate::report::Report;
use crate::steps::{
    clean_up, disk, ends, look, make, memory, network, new_card, pause, power_button, reset, start,
};
use crate::tour::Tour;

/// One stop of the tour. Later steps find the VM as earlier ones left it.
struct Step {
    title: &'static str,
    run: fn(&mut Tour, &mut Report) -> Result<(), Failed>,
}

const STEPS: [Step; 12] = [
    Step {
        title: "Make a virtual machine",
        run: make::run,
    },
    Step {
        title: "Start it",
        run: start::run,
    },
    Step {
        title: "Ask the guest what it sees",
        run: look::run,
    },
    Step {
        title: "Write to the disk, and find it on this side",
        run: disk::run,
    },
    Step {
        title: "Talk over the network",
        run: network::run,
    },
    Step {
        title: "Give it more memory, and take some away",
        run: memory::run,
    },
    Step {
        title: "Add a network card while the guest runs, and take it away",
        run: new_card::run,
    },
    Step {
        title: "Pause and resume",
        run: pause::run,
    },
    Step {
        title: "Press the reset button",
        run: reset::run,
    },
    Step {
        title: "Press the power button",
        run: power_button::run,
    },
    Step {
        title: "Guests that crash, and a neighbour that does not notice",
        run: ends::run,
    },
    Step {
        title: "Let go of everything",
        run: clean_up::run,
    },
];

const INTRODUCTION: &str = "\
This program is about to play the part of a computer. It uses the library vm-lifecycle to build virtual machines (VMs)
and boots the same Linux kernel in them that Debian ships for real computers, unmodified. That kernel is the `guest`;
the machine you are sitting at is the `host`. What the guest does runs on the processor itself, guarded by the part of
Linux called KVM; what it believes to be disks, network cards and buttons is this program.

Whatever is claimed below is checked, where possible by asking the guest or the host instead of the library.";

/// Takes one step after another. Later steps build on earlier ones, so one that breaks off ends the tour.
fn walk(tour: &mut Tour, report: &mut Report) {
    for step in &STEPS {
        report.begin(step.title);
        if let Err(error) = (step.run)(tour, report) {
            report.broke_off(&error);
            report.say(tour.describe());
            return;
        }
    }
}

fn main() -> ExitCode {
    println!("{INTRODUCTION}");
    if let Err(why) = kvm::real_kvm() {
        println!("\nKVM cannot run guests here: {why}. Start the tour with `cargo xtask demo`.");
        return ExitCode::FAILURE;
    }
    let mut report = Report::new();
    match Tour::new() {
        Ok(mut tour) => walk(&mut tour, &mut report),
        Err(error) => report.broke_off(&error),
    }
    if report.finish(STEPS.len()) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
