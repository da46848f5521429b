//! Running other programs and turning their failures into sentences.

use std::ffi::OsStr;
use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::thread;

use crate::failure::{Context, Failure};

/// Runs a command with the terminal as its output and fails unless it succeeds.
pub fn run(command: &mut Command) -> Result<(), Failure> {
    let shown = describe(command);
    let status = command.status().context(|| format!("start `{shown}`"))?;
    if status.success() {
        Ok(())
    } else {
        Err(Failure::new(format!("`{shown}` failed: {status}")))
    }
}

/// Runs a command in silence and hands back its output; its standard error is part of the failure.
pub fn capture(command: &mut Command) -> Result<Vec<u8>, Failure> {
    let shown = describe(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .context(|| format!("start `{shown}`"))?;
    succeeded(&shown, output)
}

/// Runs a filter over `input` and hands back what it wrote.
pub fn filter(command: &mut Command, input: &[u8]) -> Result<Vec<u8>, Failure> {
    let shown = describe(command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context(|| format!("start `{shown}`"))?;
    let mut stdin = child.stdin.take().expect("the standard input was piped above");
    let output = thread::scope(|scope| {
        // A filter that stops reading early reports its own failure, which says more than the broken pipe.
        scope.spawn(move || stdin.write_all(input).ok());
        child.wait_with_output()
    });
    succeeded(&shown, output.context(|| format!("wait for `{shown}`"))?)
}

/// Whether a program of this name can be started.
pub fn exists(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| {
        let sbin = ["/usr/sbin", "/sbin"].map(std::path::PathBuf::from);
        std::env::split_paths(&path)
            .chain(sbin)
            .any(|folder| folder.join(program).is_file())
    })
}

fn succeeded(shown: &str, output: Output) -> Result<Vec<u8>, Failure> {
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Failure::new(format!(
        "`{shown}` failed: {}\n{}",
        output.status,
        said.trim_end()
    )))
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}
