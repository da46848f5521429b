//! Several programs in one run of the test host: all are run, also after a failure, and the failed ones are named at the
//! end.

use std::process::{Command, Stdio};

use crate::agent;
use crate::failure::{Context, Failure};
use crate::host;
use crate::paths::Paths;
use crate::progress::note;

/// Stands between two programs; no argument of ours is one.
const SEPARATOR: &str = ";";

/// Runs `programs`, each a list of words, where KVM is real.
pub fn run(paths: &Paths, programs: &[Vec<String>], extra: &[(&str, String)]) -> Result<i32, Failure> {
    let this = std::env::current_exe().context(|| "find this program".to_string())?;
    let mut words = vec![this.to_string_lossy().to_string(), "sequence".to_string()];
    for (index, program) in programs.iter().enumerate() {
        if index > 0 {
            words.push(SEPARATOR.to_string());
        }
        words.extend_from_slice(program);
    }
    host::run(paths, words, extra)
}

/// The half that runs there.
pub fn run_here(words: &[String]) -> Result<i32, Failure> {
    let mut failed = Vec::new();
    for program in words.split(|word| word == SEPARATOR) {
        let Some((path, arguments)) = program.split_first() else {
            continue;
        };
        let name = path.rsplit('/').next().unwrap_or(path);
        eprintln!("==> {name}");
        let status = Command::new(path).args(arguments).stdin(Stdio::null()).status();
        let status = agent::exit_code(status.context(|| format!("start `{path}`"))?);
        if status != 0 {
            failed.push(format!("{name} (exit status {status})"));
        }
    }
    if failed.is_empty() {
        return Ok(0);
    }
    note(&format!("FAILED: {}", failed.join(", ")));
    Ok(1)
}
