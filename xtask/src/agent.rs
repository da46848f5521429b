//! The half of this tool that runs inside the test host: keeps KVM open, runs the ordered command with its output going
//! out live, shows the outside that the host is alive, and leaves the exit status in the control share.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use crate::failure::{Context, Failure};
use crate::kvm_keeper::KvmKeeper;
use crate::order::Order;

/// A console line that says: the host is alive.
pub const ALIVE: &str = "XTASK-ALIVE";
/// A console line that says: the command has been started.
pub const STARTED: &str = "XTASK-STARTED";
/// The beginning of a console line that says why the host cannot do its work.
pub const FATAL: &str = "XTASK-FATAL";

const ALIVE_EVERY: Duration = Duration::from_secs(2);
const PORT_WITHIN: Duration = Duration::from_secs(30);
/// How long output is still awaited from processes the command left behind.
const STRAGGLERS: Duration = Duration::from_secs(1);

/// Runs the order in `control`; the answer is the file `status` there, or a line on the console.
pub fn run(control: &Path) -> Result<(), Failure> {
    let console = OpenOptions::new().write(true).open("/dev/console");
    let mut console = console.context(|| "open the console".to_string())?;
    let result = run_order(control, &console);
    if let Err(failure) = &result {
        writeln!(console, "{FATAL} {failure}").context(|| "write to the console".to_string())?;
    }
    result
}

fn run_order(control: &Path, console: &File) -> Result<(), Failure> {
    let order = Order::read(control)?;
    show_modules(&order)?;
    let _kvm_in_use = KvmKeeper::start()?;
    let mut alive = console
        .try_clone()
        .context(|| "open the console again".to_string())?;
    thread::spawn(move || {
        while writeln!(alive, "{ALIVE}").is_ok() {
            thread::sleep(ALIVE_EVERY);
        }
    });
    let (stdout, stderr) = (port("stdout")?, port("stderr")?);
    let mut started = console;
    writeln!(started, "{STARTED}").context(|| "write to the console".to_string())?;
    let status = run_command(&order, stdout, stderr)?;
    let path = control.join("status");
    fs::write(&path, status.to_string()).context(|| format!("write {}", path.display()))
}

fn run_command(order: &Order, stdout: File, mut stderr: File) -> Result<i32, Failure> {
    let mut command = order.command()?;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            // As a shell does: the command's failure, not the host's.
            writeln!(stderr, "{}: {error}", order.words[0]).context(|| "write to a port".to_string())?;
            return Ok(127);
        }
    };
    let (done, pumps) = mpsc::channel();
    pump(child.stdout.take().expect("it was piped"), stdout, done.clone());
    pump(child.stderr.take().expect("it was piped"), stderr, done);
    let status = child.wait().context(|| "wait for the command".to_string())?;
    let until = Instant::now() + STRAGGLERS;
    for _ in 0..2 {
        if pumps
            .recv_timeout(until.saturating_duration_since(Instant::now()))
            .is_err()
        {
            break;
        }
    }
    Ok(exit_code(status))
}

/// Exit statuses as a shell reports them.
pub fn exit_code(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn pump(mut from: impl Read + Send + 'static, mut to: File, done: Sender<()>) {
    thread::spawn(move || {
        let mut buffer = [0; 32 * 1024];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            if to.write_all(&buffer[..length]).is_err() {
                break;
            }
        }
        done.send(()).ok();
    });
}

/// Opens the virtio-console port of this name as soon as it is there.
fn port(name: &str) -> Result<File, Failure> {
    let until = Instant::now() + PORT_WITHIN;
    while Instant::now() < until {
        for port in fs::read_dir("/sys/class/virtio-ports")
            .into_iter()
            .flatten()
            .flatten()
        {
            let is_it = fs::read_to_string(port.path().join("name")).is_ok_and(|read| read.trim() == name);
            if is_it {
                let device = Path::new("/dev").join(port.file_name());
                let opened = OpenOptions::new().write(true).open(&device);
                return opened.context(|| format!("open {}", device.display()));
            }
        }
        thread::sleep(Duration::from_millis(50));
    }
    Err(Failure::new(format!(
        "the port `{name}` did not appear within {} s",
        PORT_WITHIN.as_secs()
    )))
}

/// Makes `modprobe` find the modules of the kernel that runs here.
fn show_modules(order: &Order) -> Result<(), Failure> {
    let folder = Path::new("/lib/modules");
    fs::create_dir_all(folder).context(|| format!("create {}", folder.display()))?;
    let link = folder.join(order.modules.file_name().unwrap_or_default());
    if link.exists() {
        return Ok(());
    }
    symlink(&order.modules, &link).context(|| format!("create {}", link.display()))
}
