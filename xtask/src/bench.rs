//! `cargo xtask bench`: the benchmarks, with real guests. Reports are left in `target/out/criterion`.

use std::time::Duration;

use crate::cargo;
use crate::failure::Failure;
use crate::guests;
use crate::paths::Paths;
use crate::progress::step;
use crate::sequence;

/// For all benchmarks together.
const TIME_LIMIT: Duration = Duration::from_secs(2 * 3600);

/// Builds all benchmarks, or the one named, and runs them where KVM is real.
pub fn run(paths: &Paths, options: &[String], arguments: &[String]) -> Result<i32, Failure> {
    let build = match options {
        [] => vec!["bench", "--no-run", "--benches"],
        [name] if !name.starts_with('-') => vec!["bench", "--no-run", "--bench", name.as_str()],
        _ => return Err(Failure::new("`bench` takes the name of one benchmark at most")),
    };
    let built = step("build the benchmarks", || {
        // `start_up` measures it.
        cargo::executables(paths, &["build", "--release", "--example", "boot"])?;
        cargo::executables(paths, &build)
    })?;
    let programs: Vec<Vec<String>> = built
        .iter()
        .filter(|built| built.kind == "bench")
        .map(|bench| {
            let mut words = vec![bench.path.to_string_lossy().to_string(), "--bench".to_string()];
            words.extend_from_slice(arguments);
            words
        })
        .collect();
    if programs.is_empty() {
        return Err(Failure::new("there are no benchmarks"));
    }
    guests::ensure(paths)?;
    let reports = paths.out.join("criterion").to_string_lossy().to_string();
    step("benchmarks", || {
        let extra = [("CRITERION_HOME", reports)];
        sequence::run(paths, &programs, &extra, TIME_LIMIT).map(|(status, _)| status)
    })
}
