//! Every fuzz target for a bounded time, on the stable compiler (so without a sanitizer).

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::cargo;
use crate::failure::{Context, Failure};
use crate::packages;
use crate::paths::Paths;
use crate::process;
use crate::progress::{note, step};

/// An input that takes longer counts as a hang; it is more than the targets' own patience.
const INPUT_SECONDS_MAX: u32 = 60;

/// Runs all targets of `fuzz/` for `seconds` each.
pub fn run(paths: &Paths, seconds: u32) -> Result<(), Failure> {
    if !paths.root.join("fuzz/Cargo.toml").exists() {
        note("there are no fuzz targets");
        return Ok(());
    }
    packages::ensure(packages::FUZZ)?;
    if !paths.tools.join("bin/cargo-fuzz").exists() {
        step("install cargo-fuzz", || {
            let mut install = cargo::command(paths);
            install
                .args(["install", "cargo-fuzz", "--locked", "--quiet", "--root"])
                .arg(&paths.tools);
            process::run(&mut install)
        })?;
    }
    let targets = process::capture(fuzz(paths)?.arg("list"))?;
    for target in String::from_utf8_lossy(&targets).lines() {
        step(&format!("fuzz {target} for {seconds} s"), || {
            // What the fuzzer says is only of interest when it found something.
            let arguments = arguments(paths, target, seconds)?;
            process::capture(fuzz(paths)?.args(arguments)).map(drop)
        })?;
    }
    Ok(())
}

/// How `target` is run: on what was found before, which grows, and on its seeds, which do not.
fn arguments(paths: &Paths, target: &str, seconds: u32) -> Result<Vec<OsString>, Failure> {
    let corpus = paths.root.join("fuzz/corpus").join(target);
    fs::create_dir_all(&corpus).context(|| format!("make {}", corpus.display()))?;
    let seeds = paths.root.join("fuzz/seeds").join(target);
    let folders = std::iter::once(corpus).chain(seeds.exists().then_some(seeds));
    let mut arguments: Vec<OsString> = ["run", "-s", "none", target].map(OsString::from).into();
    arguments.extend(folders.map(PathBuf::into_os_string));
    // Sequences of accesses are long; the fuzzer would begin with a few bytes.
    let limits = [
        "-len_control=1".to_string(),
        format!("-max_total_time={seconds}"),
        format!("-timeout={INPUT_SECONDS_MAX}"),
    ];
    arguments.push("--".into());
    arguments.extend(limits.map(OsString::from));
    Ok(arguments)
}

fn fuzz(paths: &Paths) -> Result<Command, Failure> {
    let mut command = cargo::command(paths);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(paths.tools.join("bin")).chain(std::env::split_paths(&path));
    let path =
        std::env::join_paths(folders).map_err(|error| Failure::new(format!("extend PATH: {error}")))?;
    command.arg("fuzz").env("PATH", path);
    Ok(command)
}
