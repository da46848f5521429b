//! Several programs in one run of the test host: all are run, also after a failure, the failed ones are named at the
//! end, and no run is longer than its time limit.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::failure::{Context, Failure};
use crate::host;
use crate::paths::Paths;
use crate::progress::note;
use crate::tally::Tally;
use crate::watched::{self, Ended, TIMED_OUT};

/// Stands between two programs; no argument of ours is one.
const SEPARATOR: &str = ";";
/// The run is over by then; in milliseconds since 1970, so that a test host that is started again gets no more time.
const DEADLINE_VARIABLE: &str = "VM_LIFECYCLE_DEADLINE_MS";
/// Where the half in the test host leaves its counts.
const TALLY_VARIABLE: &str = "VM_LIFECYCLE_TALLY";
/// Where the KVM tests note what has passed, so that a test host that is started again goes on where the last one failed.
const PASSED_VARIABLE: &str = "VM_LIFECYCLE_PASSED";

/// Runs `programs`, each a list of words, where KVM is real, for at most `within`; hands back the exit status and
/// how many tests there were.
pub fn run(
    paths: &Paths,
    programs: &[Vec<String>],
    extra: &[(&str, String)],
    within: Duration,
) -> Result<(i32, Tally), Failure> {
    let this = std::env::current_exe().context(|| "find this program".to_string())?;
    let mut words = vec![this.to_string_lossy().to_string(), "sequence".to_string()];
    for (index, program) in programs.iter().enumerate() {
        if index > 0 {
            words.push(SEPARATOR.to_string());
        }
        words.extend_from_slice(program);
    }
    let left = LeftBehind(paths.out.join(format!("tally-{}", std::process::id())));
    let passed = LeftBehind(paths.out.join(format!("passed-{}", std::process::id())));
    let deadline = SystemTime::now() + within;
    let since_1970 = deadline
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let mut extra = extra.to_vec();
    extra.push((DEADLINE_VARIABLE, since_1970.as_millis().to_string()));
    extra.push((TALLY_VARIABLE, left.0.to_string_lossy().to_string()));
    extra.push((PASSED_VARIABLE, passed.0.to_string_lossy().to_string()));
    let status = host::run(paths, words, &extra)?;
    Ok((status, Tally::read(&left.0)?))
}

/// A file that another process leaves for this one; removed with the value.
struct LeftBehind(PathBuf);

impl Drop for LeftBehind {
    fn drop(&mut self) {
        fs::remove_file(&self.0).ok();
    }
}

/// The half that runs there.
pub fn run_here(words: &[String]) -> Result<i32, Failure> {
    let deadline = std::env::var(DEADLINE_VARIABLE)
        .ok()
        .and_then(|text| text.parse().ok())
        .map(|ms| SystemTime::UNIX_EPOCH + Duration::from_millis(ms));
    let (mut failed, mut tally) = (Vec::new(), Tally::default());
    for program in words.split(|word| word == SEPARATOR) {
        let Some((path, arguments)) = program.split_first() else {
            continue;
        };
        let name = path.rsplit('/').next().unwrap_or(path);
        eprintln!("==> {name}");
        let mut ended = watched::run(Command::new(path).args(arguments), deadline)?;
        if !matches!(ended.status, 0 | TIMED_OUT) && std::env::var_os(host::TEST_HOST_VARIABLE).is_some() {
            // An emulated host stops nested guests now and then. What has passed is not done again.
            note(&format!(
                "FAILED once, tried again: {name} (exit status {})",
                ended.status
            ));
            ended = watched::run(Command::new(path).args(arguments), deadline)?;
        }
        tally += Tally::of_program(ended.reported, ended.status);
        match ended.status {
            0 => {}
            TIMED_OUT => {
                name_unfinished(path, arguments, &ended);
                failed.push(format!("{name} (killed: the time limit of the run)"));
            }
            status => failed.push(format!("{name} (exit status {status})")),
        }
    }
    if let Some(path) = std::env::var_os(TALLY_VARIABLE) {
        tally.write(Path::new(&path))?;
    }
    if failed.is_empty() {
        return Ok(0);
    }
    note(&format!("FAILED: {}", failed.join(", ")));
    Ok(1)
}

/// Says which tests a killed program had not finished. Only a program that reports tests can be asked.
fn name_unfinished(path: &str, arguments: &[String], ended: &Ended) {
    if ended.finished.is_empty() {
        return;
    }
    match watched::list(path, arguments) {
        Ok(all) => {
            for test in all.iter().filter(|test| !ended.finished.contains(*test)) {
                note(&format!("not finished: {test}"));
            }
        }
        Err(failure) => note(&format!("which tests were not finished is not known: {failure}")),
    }
}
