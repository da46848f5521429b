//! Everything a guest takes part in, on real KVM. `cargo xtask test` runs this where KVM is real.
//!
//! A trial that cannot run on this machine is reported as ignored with the reason, and fails where
//! `VM_LIFECYCLE_REQUIRE_KVM=1` says that nothing may be left out. Every module lists its trials; they run in parallel,
//! so what they create on the host needs names of its own.

#[path = "../harness/mod.rs"]
mod harness;

mod basics;
mod block;
mod boot;
mod debian;
mod embedder;
mod guest;
mod guest_image;
mod hostile;
mod hotplug;
mod huge_pages;
mod hung_disk;
mod journal;
mod killed;
mod labels;
mod lifecycle;
mod log_lines;
mod memory;
mod memory_host;
mod memory_hostile;
mod memory_refusals;
mod net;
mod nic;
mod nic_busy;
mod nic_cycles;
mod nic_rough;
mod programs;
mod refusals;
mod rows;
mod tiny;
mod vmm;
mod volume;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};

use harness::kvm::{self, Verdict};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    log_lines::install();
    let verdict = kvm::verdict();
    if let Verdict::Ignore(why) | Verdict::Fail(why) = &verdict {
        eprintln!("KVM tests cannot run: {why}");
    }
    let bodies = [
        basics::trials(),
        tiny::trials(),
        rows::trials(),
        guest_image::trials(),
        boot::trials(),
        lifecycle::trials(),
        block::trials(),
        hung_disk::trials(),
        net::trials(),
        memory_refusals::trials(),
        memory_host::trials(),
        memory_hostile::trials(),
        memory::trials(),
        hotplug::trials(),
        nic::trials(),
        nic_busy::trials(),
        nic_cycles::trials(),
        nic_rough::trials(),
        labels::trials(),
        hostile::trials(),
        embedder::trials(),
        debian::trials(),
        huge_pages::trials(),
        programs::trials(),
        killed::trials(),
        refusals::trials(),
    ]
    .into_iter()
    .flatten();
    let trials = bodies.map(|body| trial(body, &verdict)).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A named test body; a panic or an error is its failure.
struct Body {
    name: &'static str,
    run: fn() -> Result<(), Failed>,
}

impl Body {
    const fn new(name: &'static str, run: fn() -> Result<(), Failed>) -> Self {
        Body { name, run }
    }
}

fn trial(body: Body, verdict: &Verdict) -> Trial {
    match verdict.clone() {
        Verdict::Run if journal::has(body.name) => Trial::test(body.name, || Ok(())),
        Verdict::Run => Trial::test(body.name, move || {
            (body.run)()?;
            journal::add(body.name);
            Ok(())
        }),
        Verdict::Fail(why) => Trial::test(body.name, move || {
            Err(format!("real KVM is required: {why}").into())
        }),
        // Also when ignored tests are asked for: there is nothing to run them on.
        Verdict::Ignore(why) => Trial::test(body.name, move || Err(why.into()))
            .with_ignored_flag(true)
            .with_kind("needs real KVM"),
    }
}
