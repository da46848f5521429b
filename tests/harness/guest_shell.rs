//! Running commands in a guest whose init is the harness's, over the virtio-console port named `harness`.
//!
//! ```text
//! test → guest   ID BASE64(COMMAND)\n
//! guest → test   HARNESS-READY\n              once per connection
//!                ID STATUS BASE64(OUTPUT)\n
//! ```

use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::base64;

const READY: &str = "HARNESS-READY";
const COMMAND_WITHIN: Duration = Duration::from_secs(300);

/// What a command in the guest did.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Output {
    /// Its exit status.
    pub status: i32,
    /// Its standard output and error, in the order in which they were written.
    pub text: String,
}

/// Why there is no answer from the guest.
#[derive(Debug)]
pub enum ShellError {
    /// The guest did not answer in time. The connection can be used further; a late answer is skipped.
    TimedOut { command: String, within: Duration },
    /// The other side closed the connection.
    Closed { command: String },
    /// The connection failed.
    Io { command: String, source: io::Error },
    /// The guest sent something else than an answer.
    Garbled { line: String },
    /// The command ran and failed.
    Failed { command: String, output: Output },
}

impl fmt::Display for ShellError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ShellError::TimedOut { command, within } => {
                write!(
                    f,
                    "the guest did not answer within {:.1} s: {command}",
                    within.as_secs_f64()
                )
            }
            ShellError::Closed { command } => write!(f, "the guest's port was closed: {command}"),
            ShellError::Io { command, source } => write!(f, "the guest's port failed ({source}): {command}"),
            ShellError::Garbled { line } => write!(f, "the guest sent no answer but {line:?}"),
            ShellError::Failed { command, output } => {
                write!(
                    f,
                    "in the guest, exit status {}: {command}\n{}",
                    output.status, output.text
                )
            }
        }
    }
}

impl std::error::Error for ShellError {}

/// The guest's command channel. One command runs at a time; what it leaves in the background goes on.
#[derive(Debug)]
pub struct GuestShell {
    stream: UnixStream,
    received: Vec<u8>,
    next_id: u64,
}

impl GuestShell {
    /// Takes the VMM's side of the port and waits until the guest's init serves it.
    pub fn connect(stream: UnixStream, within: Duration) -> Result<Self, ShellError> {
        let mut shell = GuestShell::attach(stream);
        let what = "(waiting for the guest's init)";
        let until = Instant::now() + within;
        while shell.line(what, within, until)? != READY {}
        Ok(shell)
    }

    /// Takes the port of a guest that was ready before, for example one that was restored.
    pub fn attach(stream: UnixStream) -> Self {
        GuestShell {
            stream,
            received: Vec::new(),
            next_id: 1,
        }
    }

    /// Runs `command` with the guest's `sh` and waits up to five minutes.
    pub fn run(&mut self, command: &str) -> Result<Output, ShellError> {
        self.run_within(command, COMMAND_WITHIN)
    }

    /// Runs `command` with the guest's `sh` and waits as long as given.
    pub fn run_within(&mut self, command: &str, within: Duration) -> Result<Output, ShellError> {
        let id = self.send(command)?;
        self.answer(id, command, within)
    }

    /// Runs `command`, which must succeed, and returns its output without the white space around it.
    pub fn succeed(&mut self, command: &str) -> Result<String, ShellError> {
        let output = self.run(command)?;
        if output.status == 0 {
            return Ok(output.text.trim().to_string());
        }
        Err(ShellError::Failed {
            command: command.to_string(),
            output,
        })
    }

    /// Has the guest repeat `command` every 20 ms until it succeeds, and returns the successful output.
    pub fn wait_until(&mut self, command: &str, within: Duration) -> Result<String, ShellError> {
        let tries = within.as_millis() / 20;
        let repeated = format!(
            "i=0; until ( {command} ) >/run/probe 2>&1; do i=$((i+1)); [ $i -gt {tries} ] && exit 1; sleep 0.02; \
             done; cat /run/probe"
        );
        let output = match self.run_within(&repeated, within)? {
            Output { status: 0, text } => return Ok(text.trim().to_string()),
            failed => failed,
        };
        Err(ShellError::Failed {
            command: command.to_string(),
            output,
        })
    }

    /// Sends `command` without waiting; [`answer`](Self::answer) collects the result. For what happens while it runs.
    pub fn send(&mut self, command: &str) -> Result<u64, ShellError> {
        let id = self.next_id;
        self.next_id += 1;
        let line = format!("{id} {}\n", base64::encode(command.as_bytes()));
        let sent = self.stream.write_all(line.as_bytes());
        sent.map_err(|source| ShellError::Io {
            command: command.to_string(),
            source,
        })?;
        Ok(id)
    }

    /// Waits for the answer to the command that was sent as `id`; answers to earlier ones are skipped.
    pub fn answer(&mut self, id: u64, command: &str, within: Duration) -> Result<Output, ShellError> {
        let until = Instant::now() + within;
        loop {
            let line = self.line(command, within, until)?;
            if line == READY {
                continue;
            }
            let (answered, output) = parse(&line).ok_or(ShellError::Garbled { line })?;
            if answered == id {
                return Ok(output);
            }
        }
    }

    /// The next line, without its end.
    fn line(&mut self, command: &str, within: Duration, until: Instant) -> Result<String, ShellError> {
        let failed = |source| ShellError::Io {
            command: command.to_string(),
            source,
        };
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line).trim_end().to_string());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ShellError::TimedOut {
                    command: command.to_string(),
                    within,
                });
            }
            self.stream.set_read_timeout(Some(left)).map_err(failed)?;
            let mut buffer = [0; 16 * 1024];
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    return Err(ShellError::Closed {
                        command: command.to_string(),
                    });
                }
                Ok(length) => self.received.extend_from_slice(&buffer[..length]),
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(failed(error)),
            }
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), WouldBlock | TimedOut | Interrupted)
}

/// `ID STATUS BASE64(OUTPUT)`; no third word when there was no output.
fn parse(line: &str) -> Option<(u64, Output)> {
    let mut words = line.split_whitespace();
    let id = words.next()?.parse().ok()?;
    let status = words.next()?.parse().ok()?;
    let text = base64::decode(words.next().unwrap_or_default())?;
    Some((
        id,
        Output {
            status,
            text: String::from_utf8_lossy(&text).into_owned(),
        },
    ))
}
