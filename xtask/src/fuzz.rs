//! Every fuzz target for a bounded time, on the stable compiler (so without a sanitizer).

use std::process::Command;

use crate::cargo;
use crate::failure::Failure;
use crate::paths::Paths;
use crate::process;
use crate::progress::{note, step};

/// Runs all targets of `fuzz/` for `seconds` each.
pub fn run(paths: &Paths, seconds: u32) -> Result<(), Failure> {
    if !paths.root.join("fuzz/Cargo.toml").exists() {
        note("there are no fuzz targets");
        return Ok(());
    }
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
            let limit = format!("-max_total_time={seconds}");
            // What the fuzzer says is only of interest when it found something.
            process::capture(fuzz(paths)?.args(["run", "-s", "none", target, "--", &limit])).map(drop)
        })?;
    }
    Ok(())
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
