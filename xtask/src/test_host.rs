//! The test host: a machine with hardware virtualization, emulated by QEMU, in which this machine's own file system is
//! found under the same paths. It exists for the length of one command.
//!
//! The emulated machine may hang although the command under test did nothing wrong. A watchdog reads its console and
//! expects a sign of life; a host that gave none is ended, reported as a hang *of the host*, and started again.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::agent;
use crate::failure::{Context, Failure};
use crate::order::Order;
use crate::paths::Paths;
use crate::progress::note;
use crate::qemu;

/// Without a line on the console for this long a booting host counts as hung; the boot log pauses for a second at most.
const BOOT_SILENCE_MAX: Duration = Duration::from_secs(40);
/// The same for a host that is up and says every two seconds that it is alive.
const SILENCE_MAX: Duration = Duration::from_secs(60);
const ATTEMPTS_MAX: u32 = 6;
const CONSOLE_LINES_SHOWN: usize = 30;
/// What Linux writes when a CPU no longer gets anywhere, or when it gives up.
const HANG_SIGNS: [&str; 4] = [
    "soft lockup",
    "detected stalls",
    "self-detected stall",
    "Kernel panic - not syncing",
];

static RUN_COUNT: AtomicU32 = AtomicU32::new(0);

/// The artefacts a test host is started from.
#[derive(Clone, Debug)]
pub struct TestHost {
    /// The kernel to boot.
    pub kernel: PathBuf,
    /// Its initial file system.
    pub initramfs: PathBuf,
}

/// How one attempt ended.
enum Ending {
    Exit(i32),
    HostFailed(String),
}

impl TestHost {
    /// Runs the order and returns the command's exit status; starts over when the host itself failed.
    pub fn run(&self, paths: &Paths, order: &Order) -> Result<i32, Failure> {
        for attempt in 1..=ATTEMPTS_MAX {
            let run = RunFolder::create()?;
            match self.attempt(paths, order, &run)? {
                Ending::Exit(status) => return Ok(status),
                Ending::HostFailed(why) => {
                    note(&format!("the TEST HOST failed, not the command in it: {why}"));
                    if attempt < ATTEMPTS_MAX {
                        note(&format!(
                            "starting it again (attempt {} of {ATTEMPTS_MAX})",
                            attempt + 1
                        ));
                    }
                }
            }
        }
        Err(Failure::new(format!(
            "the test host failed {ATTEMPTS_MAX} times, nothing is known about the command"
        )))
    }

    fn attempt(&self, paths: &Paths, order: &Order, run: &RunFolder) -> Result<Ending, Failure> {
        run.prepare(paths, order)?;
        let forwards = [
            forward(&run.path.join("stdout"), std::io::stdout())?,
            forward(&run.path.join("stderr"), std::io::stderr())?,
        ];
        let mut child = qemu::start(&self.kernel, &self.initramfs, &run.path, &paths.out)?;
        let console = child.stdout.take().expect("the console was piped");
        let ending = watch(&mut child, console, &run.path);
        if matches!(ending, Ending::Exit(_)) {
            for forward in forwards {
                forward.join().ok();
            }
        }
        Ok(ending)
    }
}

/// Reads the console until QEMU ends or the host shows that it hangs; then QEMU is gone.
fn watch(child: &mut Child, console: ChildStdout, control: &Path) -> Ending {
    let lines = read_lines(console);
    let mut shown = Vec::new();
    let began = Instant::now();
    let mut silence_max = BOOT_SILENCE_MAX;
    let hang = loop {
        match lines.recv_timeout(silence_max) {
            Ok(line) => match judge(&line) {
                Line::Alive => {}
                Line::Started => {
                    silence_max = SILENCE_MAX;
                    note(&format!(
                        "test host up after {:.1} s",
                        began.elapsed().as_secs_f64()
                    ));
                }
                Line::Other => shown.push(line),
                Line::Hang => {
                    shown.push(line);
                    break Some("it hung, by its own console".to_string());
                }
            },
            Err(RecvTimeoutError::Disconnected) => break None,
            Err(RecvTimeoutError::Timeout) => {
                break Some(format!("no sign of life for {} s", silence_max.as_secs()));
            }
        }
    };
    if hang.is_some() {
        child.kill().ok();
    }
    let ended = child.wait();
    let status = fs::read_to_string(control.join("status"))
        .ok()
        .and_then(|text| text.trim().parse().ok());
    match (hang, status) {
        (None, Some(status)) => Ending::Exit(status),
        (hang, _) => {
            let why = hang.unwrap_or_else(|| match ended {
                Ok(status) => format!("it ended without an answer (QEMU: {status})"),
                Err(error) => format!("it ended without an answer ({error})"),
            });
            let begin = shown.len().saturating_sub(CONSOLE_LINES_SHOWN);
            let said = qemu::log(control);
            Ending::HostFailed(format!(
                "{why}\nits console:\n{}\nQEMU said:\n{said}",
                shown[begin..].join("\n")
            ))
        }
    }
}

#[derive(Debug, Eq, PartialEq)]
enum Line {
    Alive,
    Started,
    Hang,
    Other,
}

fn judge(line: &str) -> Line {
    if line.contains(agent::ALIVE) {
        Line::Alive
    } else if line.contains(agent::STARTED) {
        Line::Started
    } else if HANG_SIGNS.iter().any(|sign| line.contains(sign)) {
        Line::Hang
    } else {
        Line::Other
    }
}

fn read_lines(console: ChildStdout) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut console = BufReader::new(console);
        let mut line = Vec::new();
        while console
            .read_until(b'\n', &mut line)
            .is_ok_and(|length| length > 0)
        {
            let text = String::from_utf8_lossy(&line).trim_end().to_string();
            if sender.send(text).is_err() {
                break;
            }
            line.clear();
        }
    });
    receiver
}

/// Copies what QEMU sends into the socket at `path` to `to` as it comes.
fn forward(path: &Path, mut to: impl Write + Send + 'static) -> Result<JoinHandle<()>, Failure> {
    let listener = UnixListener::bind(path).context(|| format!("listen on {}", path.display()))?;
    Ok(thread::spawn(move || {
        let Ok((mut from, _)) = listener.accept() else {
            return;
        };
        let mut buffer = [0; 32 * 1024];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            // A reader who went away (`| head`) does not end the command.
            to.write_all(&buffer[..length]).and_then(|()| to.flush()).ok();
        }
    }))
}

/// A folder of its own for every attempt: control share, sockets, QEMU's log. Removed with the value.
struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    fn create() -> Result<Self, Failure> {
        let count = RUN_COUNT.fetch_add(1, Ordering::Relaxed);
        // Not in the target folder: a socket's path may have 107 bytes only.
        let path = std::env::temp_dir().join(format!("vm-lifecycle-host-{}-{count}", std::process::id()));
        fs::create_dir_all(&path).context(|| format!("create {}", path.display()))?;
        Ok(RunFolder { path })
    }

    fn prepare(&self, paths: &Paths, order: &Order) -> Result<(), Failure> {
        let agent = std::env::current_exe().context(|| "find this program".to_string())?;
        fs::create_dir_all(&paths.out).context(|| format!("create {}", paths.out.display()))?;
        let visible = [&paths.root, &paths.target, &paths.guests, &order.folder];
        if visible.iter().any(|path| path.starts_with("/tmp")) || agent.starts_with("/tmp") {
            self.write("keep-tmp", "")?;
        }
        self.write("agent", &agent.to_string_lossy())?;
        self.write("out", &paths.out.to_string_lossy())?;
        order.write(&self.path)
    }

    fn write(&self, name: &str, content: &str) -> Result<(), Failure> {
        let path = self.path.join(name);
        fs::write(&path, content).context(|| format!("write {}", path.display()))
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.path).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn console_lines_are_told_apart() {
        assert_eq!(judge("XTASK-ALIVE"), Line::Alive);
        assert_eq!(judge("XTASK-STARTED"), Line::Started);
        assert_eq!(
            judge("watchdog: BUG: soft lockup - CPU#1 stuck for 68s! [kvm:12]"),
            Line::Hang
        );
        assert_eq!(
            judge("rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:"),
            Line::Hang
        );
        assert_eq!(
            judge("INFO: task dd:77 blocked for more than 120 seconds."),
            Line::Other
        );
    }
}
