//! `cargo xtask demo`: the example `demo`, with real guests.

use crate::cargo;
use crate::failure::Failure;
use crate::guests;
use crate::host;
use crate::paths::Paths;
use crate::progress::step;

/// Builds the example and runs it where KVM is real; its output is the demonstration.
pub fn run(paths: &Paths, arguments: &[String]) -> Result<i32, Failure> {
    let built = step("build the demo", || {
        cargo::executables(paths, &["build", "--example", "demo"])
    })?;
    let demo = built
        .iter()
        .find(|built| built.kind == "example" && built.name == "demo");
    let demo = demo.ok_or_else(|| Failure::new("cargo built no example `demo`"))?;
    guests::kernels(paths)?;
    let mut words = vec![demo.path.to_string_lossy().to_string()];
    words.extend_from_slice(arguments);
    step("demo", || host::run(paths, words, &[]))
}
