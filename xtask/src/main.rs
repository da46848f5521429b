//! `cargo xtask`: what a contributor and the continuous integration run.
//!
//! ```text
//! cargo xtask host -- CMD…     run a command where KVM is real
//! cargo xtask guests           fetch and build what guests are started from
//! ```
//!
//! KVM is real on this machine when it has vmx or svm; otherwise a *test host* with them is emulated.

mod agent;
mod archive;
mod debian;
mod failure;
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
mod test_host;

use std::path::Path;
use std::process::ExitCode;

use crate::failure::Failure;
use crate::paths::Paths;

const USAGE: &str = "usage:
  cargo xtask host -- CMD…     run a command where KVM is real
  cargo xtask guests           fetch and build what guests are started from";

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
    match name.as_str() {
        "host" => host::run(&Paths::find()?, after_dashes(rest), &[]),
        "guests" => guests::ensure(&Paths::find()?).map(|()| 0),
        // Not for people: the half that runs inside the test host.
        "inside" => agent::run(Path::new(rest.first().map_or("", String::as_str))).map(|()| 0),
        _ => Err(Failure::new(USAGE)),
    }
}

/// The words of a command, with or without the `--` before it.
fn after_dashes(words: &[String]) -> Vec<String> {
    let words = words.strip_prefix(&["--".to_string()]).unwrap_or(words);
    words.to_vec()
}
