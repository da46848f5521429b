//! What has passed in this run, kept over a failure of the test host.
//!
//! The emulated host itself fails now and then (`docs/testing.md`). The run goes on in a new one, where a trial that has
//! passed is reported as passed and not run again. `cargo xtask` names the file, one for each run; without it nothing is
//! kept.

use std::env;
use std::fs::{self, File};
use std::io::Write;

const FILE_VARIABLE: &str = "VM_LIFECYCLE_PASSED";

/// Whether the trial `name` has passed before.
pub fn has(name: &str) -> bool {
    let text = env::var_os(FILE_VARIABLE).and_then(|path| fs::read_to_string(path).ok());
    text.is_some_and(|text| text.lines().any(|line| line == name))
}

/// Notes that the trial `name` has passed. A note that cannot be written only costs another run of the trial.
pub fn add(name: &str) {
    if let Some(path) = env::var_os(FILE_VARIABLE)
        && let Ok(mut file) = File::options().create(true).append(true).open(path)
    {
        let _ = writeln!(file, "{name}").and_then(|()| file.sync_all());
    }
}
