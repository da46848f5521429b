//! `cargo xtask test`: everything that proves the crate, in the order in which it fails fastest.
//!
//! Tests that this machine may not be able to run (marked `ignored`, or the KVM tests) are left out of the first half
//! and run in the second, where KVM is real. The last line of the output sums up both: `N passed, N failed`.

use std::process::Command;
use std::time::Duration;

use crate::cargo::{self, Executable};
use crate::failure::Failure;
use crate::fuzz;
use crate::guests;
use crate::paths::Paths;
use crate::process;
use crate::progress::{note, step};
use crate::sequence;
use crate::tally::Tally;
use crate::watched;

/// Makes the KVM tests fail where they could not be run; without it they are reported as ignored.
const REQUIRE_VARIABLE: &str = "VM_LIFECYCLE_REQUIRE_KVM";
/// Makes the KVM tests report themselves as ignored because another step runs them.
const ELSEWHERE_VARIABLE: &str = "VM_LIFECYCLE_KVM_ELSEWHERE";
const FUZZ_SECONDS: u32 = 10;
const TIME_LIMIT_MINUTES: u64 = 50;
/// The one example that needs no arguments and checks itself; the KVM tests run the others as their users do.
const DEMO: &str = "demo";

/// What to run.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Options {
    kvm_only: bool,
    fuzz_seconds: u32,
    /// For everything that runs where KVM is real, together.
    time_limit_minutes: u64,
    /// For the KVM tests.
    arguments: Vec<String>,
}

impl Options {
    /// Reads the command line.
    pub fn parse(options: &[String], arguments: &[String]) -> Result<Self, Failure> {
        let mut parsed = Options {
            kvm_only: !arguments.is_empty(),
            fuzz_seconds: FUZZ_SECONDS,
            time_limit_minutes: TIME_LIMIT_MINUTES,
            arguments: arguments.to_vec(),
        };
        let mut words = options.iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--kvm-only" => parsed.kvm_only = true,
                "--fuzz-seconds" => parsed.fuzz_seconds = number(word, words.next())?,
                "--time-limit" => parsed.time_limit_minutes = number(word, words.next())?,
                other => return Err(Failure::new(format!("`test` has no option {other}"))),
            }
        }
        Ok(parsed)
    }
}

fn number<T: std::str::FromStr>(option: &str, word: Option<&String>) -> Result<T, Failure> {
    word.and_then(|word| word.parse().ok())
        .ok_or_else(|| Failure::new(format!("{option} wants a number")))
}

/// Runs the steps; the first that fails ends the run. The last line says how many tests passed and failed, where a
/// step that could not be done counts as one that failed.
pub fn run(paths: &Paths, options: &Options) -> i32 {
    let mut tally = Tally::default();
    if let Err(failure) = steps(paths, options, &mut tally) {
        eprintln!("xtask: {failure}");
        tally.failed = tally.failed.max(1);
    }
    note(&format!("{} skipped", tally.ignored));
    if !options.kvm_only && tally.ignored > 0 {
        eprintln!("xtask: nothing may be skipped in a whole run");
        tally.failed += tally.ignored;
    }
    println!("{tally}");
    i32::from(tally.failed > 0)
}

fn steps(paths: &Paths, options: &Options, tally: &mut Tally) -> Result<(), Failure> {
    if !options.kvm_only {
        checks(paths)?;
        step("tests that run anywhere", || anywhere(paths, tally))?;
    }
    let left_out = std::mem::take(&mut tally.ignored);
    step("tests on real KVM", || on_kvm(paths, options, left_out, tally))?;
    if options.kvm_only {
        return Ok(());
    }
    fuzz::run(paths, options.fuzz_seconds)
}

/// What reads the sources only.
fn checks(paths: &Paths) -> Result<(), Failure> {
    cargo::ensure_component(paths, "fmt", "rustfmt")?;
    cargo::ensure_component(paths, "clippy", "clippy")?;
    step("format", || {
        process::run(cargo::command(paths).args(["fmt", "--all", "--check"]))
    })?;
    step("lints", || {
        let options = ["--workspace", "--all-targets", "--quiet"];
        let mut clippy = cargo::command(paths);
        process::run(clippy.arg("clippy").args(options).args(["--", "-D", "warnings"]))
    })?;
    step("documentation", || {
        let mut doc = cargo::command(paths);
        doc.env("RUSTDOCFLAGS", "-D warnings");
        process::run(doc.args(["doc", "--workspace", "--no-deps", "--quiet"]))
    })
}

/// What needs no KVM.
fn anywhere(paths: &Paths, tally: &mut Tally) -> Result<(), Failure> {
    let mut command: Command = cargo::command(paths);
    command
        .args(["test", "--workspace", "--no-fail-fast", "--", "--quiet"])
        .env_remove(REQUIRE_VARIABLE)
        .env(ELSEWHERE_VARIABLE, "1");
    let ended = watched::run(&mut command, None)?;
    *tally += Tally::of_program(ended.reported, ended.status);
    passed(ended.status)
}

/// The KVM tests and, unless they were restricted, the library's own tests that were left out and the demo, all in one
/// test host. `left_out` is the number of tests that were ignored so far.
fn on_kvm(paths: &Paths, options: &Options, left_out: u64, tally: &mut Tally) -> Result<(), Failure> {
    let built = step("build the tests and the examples", || build(paths))?;
    guests::ensure(paths)?;
    let programs: Vec<_> = built
        .iter()
        .filter_map(|executable| words(executable, options))
        .collect();
    let extra = [(REQUIRE_VARIABLE, "1".to_string())];
    let within = Duration::from_secs(60 * options.time_limit_minutes);
    let (status, there) = sequence::run(paths, &programs, &extra, within)?;
    *tally += there;
    if !options.kvm_only {
        // What was ignored before and has been run now is not skipped.
        tally.ignored += left_out.saturating_sub(there.passed + there.failed + there.ignored);
    }
    passed(status)
}

/// How an executable is run where KVM is real; `None` for one that is not run by itself.
fn words(executable: &Executable, options: &Options) -> Option<Vec<String>> {
    let mut words = vec![executable.path.to_string_lossy().to_string()];
    match executable.kind.as_str() {
        "test" => words.extend_from_slice(&options.arguments),
        "lib" if options.arguments.is_empty() => words.push("--ignored".to_string()),
        "example" if options.arguments.is_empty() && executable.name == DEMO => {}
        _ => return None,
    }
    Some(words)
}

fn build(paths: &Paths) -> Result<Vec<Executable>, Failure> {
    let mut built = cargo::executables(paths, &["test", "--no-run", "--lib", "--test", "kvm"])?;
    built.extend(cargo::executables(paths, &["build", "--examples"])?);
    Ok(built)
}

fn passed(status: i32) -> Result<(), Failure> {
    match status {
        0 => Ok(()),
        _ => Err(Failure::new("tests failed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_string).collect()
    }

    #[test]
    fn arguments_restrict_the_run_to_the_kvm_tests() {
        let all = Options {
            kvm_only: false,
            fuzz_seconds: FUZZ_SECONDS,
            time_limit_minutes: TIME_LIMIT_MINUTES,
            arguments: vec![],
        };
        assert_eq!(Options::parse(&[], &[]).unwrap(), all);
        let filtered = Options {
            kvm_only: true,
            arguments: split("boot"),
            ..all.clone()
        };
        assert_eq!(Options::parse(&[], &split("boot")).unwrap(), filtered);
        let longer = Options {
            fuzz_seconds: 60,
            time_limit_minutes: 5,
            ..all.clone()
        };
        let words = split("--fuzz-seconds 60 --time-limit 5");
        assert_eq!(Options::parse(&words, &[]).unwrap(), longer);
        let kvm = Options {
            kvm_only: true,
            ..all
        };
        assert_eq!(Options::parse(&split("--kvm-only"), &[]).unwrap(), kvm);
    }

    #[test]
    fn unknown_options_are_named() {
        let refused = Options::parse(&split("--kvm"), &[]).unwrap_err();
        assert_eq!(refused.to_string(), "`test` has no option --kvm");
        let refused = Options::parse(&split("--fuzz-seconds soon"), &[]).unwrap_err();
        assert_eq!(refused.to_string(), "--fuzz-seconds wants a number");
        assert!(Options::parse(&split("--time-limit"), &[]).is_err());
    }

    #[test]
    fn examples_that_need_arguments_are_not_run() {
        let executable = |kind: &str, name: &str| Executable {
            name: name.to_string(),
            kind: kind.to_string(),
            path: format!("/t/{name}").into(),
        };
        let all = Options::parse(&[], &[]).unwrap();
        let filtered = Options::parse(&[], &split("boot")).unwrap();
        assert_eq!(words(&executable("example", "boot"), &all), None);
        assert_eq!(
            words(&executable("example", "demo"), &all),
            Some(split("/t/demo"))
        );
        assert_eq!(words(&executable("example", "demo"), &filtered), None);
        assert_eq!(
            words(&executable("lib", "l"), &all),
            Some(split("/t/l --ignored"))
        );
        assert_eq!(words(&executable("lib", "l"), &filtered), None);
        assert_eq!(
            words(&executable("test", "kvm"), &filtered),
            Some(split("/t/kvm boot"))
        );
    }
}
