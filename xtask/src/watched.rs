//! Running a test program with its output shown as it comes, its counts read, and its time limited.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, SystemTime};

use crate::agent;
use crate::failure::{Context, Failure};
use crate::tally::Tally;

/// The exit status of a program that ran out of time, as timeout(1) has it.
pub const TIMED_OUT: i32 = 124;

const LOOKED_EVERY: Duration = Duration::from_millis(50);
/// How long output is still awaited from processes that the program left behind.
const STRAGGLERS: Duration = Duration::from_secs(1);

/// How a program ended.
#[derive(Clone, Debug, Default)]
pub struct Ended {
    /// Its exit status as a shell tells it, or [`TIMED_OUT`].
    pub status: i32,
    /// The sum of its summary lines, if it wrote any.
    pub reported: Option<Tally>,
    /// The tests that it reported as finished.
    pub finished: BTreeSet<String>,
}

/// Runs `command` to its end, or to `deadline`, when it is killed; what it writes goes to the standard output.
pub fn run(command: &mut Command, deadline: Option<SystemTime>) -> Result<Ended, Failure> {
    run_to(command, deadline, std::io::stdout())
}

fn run_to(
    command: &mut Command,
    deadline: Option<SystemTime>,
    to: impl Write + Send + 'static,
) -> Result<Ended, Failure> {
    let shown = command.get_program().to_string_lossy().to_string();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context(|| format!("start `{shown}`"))?;
    let output = show(child.stdout.take().expect("it was piped"), to);
    let status = wait(&mut child, deadline).context(|| format!("wait for `{shown}`"))?;
    let read = output.recv_timeout(STRAGGLERS).unwrap_or_default();
    Ok(Ended { status, ..read })
}

/// Asks a test program which of its tests a run with these arguments would have.
pub fn list(path: &str, arguments: &[String]) -> Result<Vec<String>, Failure> {
    let output = crate::process::capture(Command::new(path).args(arguments).arg("--list"))?;
    let lines = String::from_utf8_lossy(&output);
    Ok(lines
        .lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .map(str::to_string)
        .collect())
}

fn wait(child: &mut Child, deadline: Option<SystemTime>) -> std::io::Result<i32> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(agent::exit_code(status));
        }
        if deadline.is_some_and(|deadline| SystemTime::now() >= deadline) {
            child.kill()?;
            child.wait()?;
            return Ok(TIMED_OUT);
        }
        thread::sleep(LOOKED_EVERY);
    }
}

/// Copies what the program writes as it comes, and sends what was read from it at the end.
fn show(mut from: ChildStdout, mut to: impl Write + Send + 'static) -> Receiver<Ended> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut ended = Ended::default();
        let (mut buffer, mut line) = ([0; 32 * 1024], Vec::new());
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            // A reader who went away (`| head`) does not end the program.
            to.write_all(&buffer[..length]).and_then(|()| to.flush()).ok();
            for &byte in &buffer[..length] {
                if byte == b'\n' {
                    ended.note(&String::from_utf8_lossy(&line));
                    line.clear();
                } else {
                    line.push(byte);
                }
            }
        }
        // The receiver may have stopped waiting.
        sender.send(ended).ok();
    });
    receiver
}

impl Ended {
    fn note(&mut self, line: &str) {
        if let Some(tally) = Tally::of_line(line) {
            *self.reported.get_or_insert_default() += tally;
        } else if let Some((name, result)) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.split_once(" ... "))
            && !result.is_empty()
        {
            self.finished.insert(name.trim().to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn counts_and_finished_tests_are_read_from_the_output() {
        let script = "echo 'test a::b      ... ok'; echo 'test c ... FAILED'; \
                      for i in 1 2; do echo 'test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured'; done; exit 3";
        let ended = run_to(&mut shell(script), None, std::io::sink()).unwrap();
        assert_eq!(ended.status, 3);
        let reported = ended.reported.unwrap();
        assert_eq!((reported.passed, reported.failed), (2, 2));
        assert_eq!(ended.finished.into_iter().collect::<Vec<_>>(), ["a::b", "c"]);
    }

    #[test]
    fn a_program_that_does_not_end_is_ended() {
        let ended = run(
            &mut shell("echo 'test a ... ok'; exec sleep 1000"),
            Some(SystemTime::now()),
        )
        .unwrap();
        assert_eq!(ended.status, TIMED_OUT);
        assert_eq!(ended.reported, None);
    }
}
