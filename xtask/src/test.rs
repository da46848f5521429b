//! `cargo xtask test`: everything that proves the crate, in the order in which it fails fastest.

use std::process::Command;

use crate::cargo::{self, Executable};
use crate::failure::Failure;
use crate::fuzz;
use crate::guests;
use crate::paths::Paths;
use crate::process;
use crate::progress::{note, step};
use crate::sequence;

/// Makes the KVM tests fail where they could not be run; without it they are reported as ignored.
const REQUIRE_VARIABLE: &str = "VM_LIFECYCLE_REQUIRE_KVM";
/// Makes the KVM tests report themselves as ignored because another step runs them.
const ELSEWHERE_VARIABLE: &str = "VM_LIFECYCLE_KVM_ELSEWHERE";
const FUZZ_SECONDS: u32 = 10;
/// Has a command of its own.
const DEMO: &str = "demo";

/// What to run.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Options {
    kvm_only: bool,
    fuzz_seconds: u32,
    arguments: Vec<String>,
}

impl Options {
    /// Reads the command line.
    pub fn parse(options: &[String], arguments: &[String]) -> Result<Self, Failure> {
        let mut parsed = Options {
            kvm_only: !arguments.is_empty(),
            fuzz_seconds: FUZZ_SECONDS,
            arguments: arguments.to_vec(),
        };
        let mut words = options.iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--kvm-only" => parsed.kvm_only = true,
                "--fuzz-seconds" => {
                    let seconds = words.next().and_then(|seconds| seconds.parse().ok());
                    parsed.fuzz_seconds =
                        seconds.ok_or_else(|| Failure::new("--fuzz-seconds wants a number"))?;
                }
                other => return Err(Failure::new(format!("`test` has no option {other}"))),
            }
        }
        Ok(parsed)
    }
}

/// Runs the steps; the first that fails ends the run.
pub fn run(paths: &Paths, options: &Options) -> Result<i32, Failure> {
    if !options.kvm_only {
        anywhere(paths)?;
    }
    let status = on_kvm(paths, options)?;
    if status == 0 && !options.kvm_only {
        fuzz::run(paths, options.fuzz_seconds)?;
    }
    note(if status == 0 { "all passed" } else { "FAILED" });
    Ok(status)
}

/// What needs no KVM.
fn anywhere(paths: &Paths) -> Result<(), Failure> {
    let cargo = |arguments: &[&str]| -> Command {
        let mut command = cargo::command(paths);
        command
            .args(arguments)
            .env_remove(REQUIRE_VARIABLE)
            .env(ELSEWHERE_VARIABLE, "1");
        command
    };
    step("format", || {
        process::run(&mut cargo(&["fmt", "--all", "--check"]))
    })?;
    step("lints", || {
        let clippy = [
            "clippy",
            "--workspace",
            "--all-targets",
            "--quiet",
            "--",
            "-D",
            "warnings",
        ];
        process::run(&mut cargo(&clippy))
    })?;
    step("tests that run anywhere", || {
        process::run(&mut cargo(&["test", "--workspace", "--quiet"]))
    })
}

/// The KVM tests and, unless a filter was given, the examples, all in one test host.
fn on_kvm(paths: &Paths, options: &Options) -> Result<i32, Failure> {
    let built = step("build the KVM tests and the examples", || build(paths))?;
    guests::ensure(paths)?;
    let mut programs = Vec::new();
    for executable in built {
        let mut words = vec![executable.path.to_string_lossy().to_string()];
        match executable.kind.as_str() {
            "test" => words.extend_from_slice(&options.arguments),
            _ if !options.arguments.is_empty() || executable.name == DEMO => continue,
            _ => {}
        }
        programs.push(words);
    }
    let extra = [(REQUIRE_VARIABLE, "1".to_string())];
    step("tests on real KVM", || sequence::run(paths, &programs, &extra))
}

fn build(paths: &Paths) -> Result<Vec<Executable>, Failure> {
    let mut built = cargo::executables(paths, &["test", "--no-run", "--test", "kvm"])?;
    if paths.root.join("examples").is_dir() {
        built.extend(cargo::executables(paths, &["build", "--examples"])?);
    }
    built.retain(|executable| executable.kind == "test" || executable.kind == "example");
    Ok(built)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_string).collect()
    }

    #[test]
    fn arguments_restrict_the_run_to_the_kvm_tests() {
        let all = Options {
            kvm_only: false,
            fuzz_seconds: FUZZ_SECONDS,
            arguments: vec![],
        };
        assert_eq!(Options::parse(&[], &[]).unwrap(), all);
        let filtered = Options {
            kvm_only: true,
            arguments: words("boot"),
            ..all.clone()
        };
        assert_eq!(Options::parse(&[], &words("boot")).unwrap(), filtered);
        let longer = Options {
            fuzz_seconds: 60,
            ..all.clone()
        };
        assert_eq!(Options::parse(&words("--fuzz-seconds 60"), &[]).unwrap(), longer);
        let kvm = Options {
            kvm_only: true,
            ..all
        };
        assert_eq!(Options::parse(&words("--kvm-only"), &[]).unwrap(), kvm);
    }

    #[test]
    fn unknown_options_are_named() {
        let refused = Options::parse(&words("--kvm"), &[]).unwrap_err();
        assert_eq!(refused.to_string(), "`test` has no option --kvm");
        assert!(Options::parse(&words("--fuzz-seconds soon"), &[]).is_err());
    }
}
