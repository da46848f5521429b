//! The command line of the emulated test host.

use std::env;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::failure::{Context, Failure};

/// Memory of the test host; QEMU takes from this machine only what is really used.
const MEMORY_VARIABLE: &str = "VM_LIFECYCLE_TEST_HOST_MIB";
const MEMORY_MIB: &str = "9216";

/// CPUs of the test host. One by default: QEMU's emulation with a thread for each CPU corrupts nested guests and the
/// host's own kernel now and then (docs/decisions/0005-one-cpu-test-host.md).
const CPUS_VARIABLE: &str = "VM_LIFECYCLE_TEST_HOST_CPUS";
const CPUS: &str = "1";

/// The boot log shows the watchdog that the boot goes on; init then silences it. A hang is reported by the kernel itself
/// after a minute: shorter limits are reached on a busy machine without one.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 panic=-1 loglevel=7 mitigations=off random.trust_cpu=on \
     rcupdate.rcu_cpu_stall_timeout=60 watchdog_thresh=30 nokaslr";

const LOG: &str = "qemu.log";

/// Starts QEMU: its console is the child's standard output, the command's output goes to the sockets `stdout` and
/// `stderr` in `run`, which is the control share at the same time.
pub fn start(kernel: &Path, initramfs: &Path, run: &Path, out: &Path) -> Result<Child, Failure> {
    let log = run.join(LOG);
    let log = File::create(&log).context(|| format!("create {}", log.display()))?;
    let memory_mib = env::var(MEMORY_VARIABLE).unwrap_or_else(|_| MEMORY_MIB.to_string());
    let cpus = env::var(CPUS_VARIABLE).unwrap_or_else(|_| CPUS.to_string());
    let threads = if cpus == CPUS { "single" } else { "multi" };
    let mut command = Command::new("qemu-system-x86_64");
    // QEMU's TCG offers SVM with nested paging on an AMD model, and no VMX on any.
    command
        .arg("-accel")
        .arg(format!("tcg,thread={threads},tb-size=512"));
    command.args(["-smp", &cpus, "-cpu", "EPYC,+svm,+npt"]);
    command.args([
        "-nodefaults",
        "-display",
        "none",
        "-monitor",
        "none",
        "-no-reboot",
        "-serial",
        "stdio",
    ]);
    command.args(["-m", &memory_mib, "-append", KERNEL_ARGUMENTS]);
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
    share(&mut command, "hostroot", Path::new("/"), ",readonly=on");
    share(&mut command, "control", run, "");
    share(&mut command, "out", out, "");
    command.args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
    for port in ["stdout", "stderr"] {
        command
            .arg("-chardev")
            .arg(format!("socket,id={port},path={}", escape(&run.join(port))));
        command
            .arg("-device")
            .arg(format!("virtserialport,chardev={port},name={port}"));
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    die_with_parent(&mut command);
    command.spawn().context(|| "start qemu-system-x86_64".to_string())
}

/// What QEMU itself said, without the many features of the CPU model that it does not emulate.
pub fn log(run: &Path) -> String {
    let log = fs::read_to_string(run.join(LOG)).unwrap_or_default();
    let lines = log
        .lines()
        .filter(|line| !line.contains("TCG doesn't support requested feature"));
    lines.collect::<Vec<_>>().join("\n")
}

fn share(command: &mut Command, tag: &str, path: &Path, options: &str) {
    let path = escape(path);
    command.arg("-virtfs").arg(format!(
        "local,path={path},mount_tag={tag},security_model=none,multidevs=remap{options}"
    ));
}

/// In QEMU's option lists a comma in a value is written twice.
fn escape(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// No emulated machine outlives this tool, not even when the tool is killed.
fn die_with_parent(command: &mut Command) {
    let hook = || {
        // SAFETY: prctl(PR_SET_PDEATHSIG) takes an integer, touches no memory, and is allowed between fork and exec.
        let result = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        if result == 0 {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error())
        }
    };
    // SAFETY: the hook calls one async-signal-safe function and allocates nothing.
    unsafe { command.pre_exec(hook) };
}
