//! `cargo xtask`: what a contributor and the continuous integration run.
//!
//! ```text
//! cargo xtask host -- CMD…     run a command where KVM is real
//! cargo xtask test             everything that proves the crate, on real KVM where a guest takes part
//! cargo xtask bench            the benchmarks, on real KVM
//! cargo xtask demo             the tour of what the crate can do, on real KVM
//! cargo xtask guests           fetch and build what guests are started from
//! ```
//!
//! KVM is real on this machine when it has vmx or svm; otherwise a *test host* with them is emulated.

mod agent;
mod archive;
mod bench;
mod cargo;
mod debian;
mod debian_image;
mod demo;
mod failure;
mod fuzz;
mod guest_image;
mod guests;
mod hardware;
mod host;
mod host_image;
mod images;
mod kernels;
mod kvm_keeper;
mod modules;
mod order;
mod packages;
mod paths;
mod process;
mod progress;
mod qemu;
mod sequence;
mod tally;
mod test;
mod test_host;
mod watched;

use std::path::Path;
use std::process::ExitCode;

use crate::failure::Failure;
use crate::paths::Paths;

const USAGE: &str = "usage:
  cargo xtask host -- CMD…     run a command where KVM is real
  cargo xtask test [--kvm-only] [--fuzz-seconds N] [--time-limit MINUTES] [-- FILTER…]
                               format, lints, documentation, tests, tests and demo on real KVM, fuzz
                               targets; --kvm-only leaves the rest out, a filter also the demo;
                               what runs on real KVM is killed after 50 minutes, or as many as given
  cargo xtask bench [NAME] [-- ARGUMENTS…]
                               all benchmarks or one, on real KVM
  cargo xtask demo [-- ARGUMENTS…]
                               the tour of what the crate can do, on real KVM
  cargo xtask guests           fetch and build what guests are started from
real KVM is this machine's own when it has vmx or svm, and that of an emulated test host otherwise";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&words) {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)),
        Err(failure) => {
            eprintln!("xtask: {failure}");
            ExitCode::from(2)
        }
    }
}

fn dispatch(words: &[String]) -> Result<i32, Failure> {
    let (name, rest) = words.split_first().ok_or_else(|| Failure::new(USAGE))?;
    let (options, arguments) = split_at_dashes(rest);
    match name.as_str() {
        "host" if options.is_empty() => host::run(&Paths::find()?, arguments.to_vec(), &[]),
        "test" => Ok(test::run(
            &Paths::find()?,
            &test::Options::parse(options, arguments)?,
        )),
        "bench" => bench::run(&Paths::find()?, options, arguments),
        "demo" if options.is_empty() => demo::run(&Paths::find()?, arguments),
        "guests" if rest.is_empty() => guests::ensure(&Paths::find()?).map(|()| 0),
        // Not for people: the halves that run in the test host.
        "inside" => agent::run(Path::new(rest.first().map_or("", String::as_str))).map(|()| 0),
        "sequence" => sequence::run_here(rest),
        _ => Err(Failure::new(USAGE)),
    }
}

/// The words before and after the first `--`.
fn split_at_dashes(words: &[String]) -> (&[String], &[String]) {
    match words.iter().position(|word| word == "--") {
        Some(dashes) => (&words[..dashes], &words[dashes + 1..]),
        None => (words, &[]),
    }
}
