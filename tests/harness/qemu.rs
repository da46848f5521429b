//! The same guest under QEMU: to prove the guest's image with a VMM that is known to work, and to compare with.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::artefacts::{GuestKernel, PORT_NAME};
use super::wait;

const MONITOR_WITHIN: Duration = Duration::from_secs(30);

/// A guest to start under QEMU.
#[derive(Clone, Debug)]
pub struct QemuOptions {
    /// `-machine`.
    pub machine: String,
    /// RAM.
    pub memory_mib: u64,
    /// Number of vCPUs.
    pub vcpu_count: u32,
    /// Added to the kernel's command line.
    pub cmdline: String,
    /// Further arguments.
    pub arguments: Vec<String>,
}

impl Default for QemuOptions {
    fn default() -> Self {
        QemuOptions {
            machine: "q35".to_string(),
            memory_mib: 256,
            vcpu_count: 1,
            cmdline: "console=ttyS0 quiet panic=-1".to_string(),
            arguments: Vec::new(),
        }
    }
}

/// QEMU's command line for a guest that has a serial console, on QEMU's standard output, and nothing else.
pub fn bare(machine: &str, kernel: &Path, initramfs: &Path, cmdline: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    let machine = [
        "-accel", "kvm", "-cpu", "host", "-machine", machine, "-m", "256", "-smp", "1",
    ];
    let console = ["-display", "none", "-serial", "stdio", "-append", cmdline];
    command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
    command.args(machine).args(console);
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
    command
}

/// A running QEMU; killed when dropped.
#[derive(Debug)]
pub struct QemuGuest {
    child: Child,
    folder: tempfile::TempDir,
    listener: UnixListener,
}

impl QemuGuest {
    /// Starts `kernel` (as bzImage, with its initial file system) under KVM.
    pub fn start(kernel: &GuestKernel, options: &QemuOptions) -> io::Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join(PORT_NAME);
        let listener = UnixListener::bind(&socket)?;
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
        ]);
        command.args([
            "-machine",
            &options.machine,
            "-m",
            &options.memory_mib.to_string(),
        ]);
        command.args([
            "-smp",
            &options.vcpu_count.to_string(),
            "-append",
            &options.cmdline,
        ]);
        command
            .arg("-kernel")
            .arg(&kernel.bzimage)
            .arg("-initrd")
            .arg(&kernel.initramfs);
        command
            .arg("-serial")
            .arg(format!("file:{}", folder.path().join("console").display()));
        command.arg("-monitor").arg(format!(
            "unix:{},server=on,wait=off",
            folder.path().join("monitor").display()
        ));
        command
            .arg("-chardev")
            .arg(format!("socket,id=harness,path={}", socket.display()));
        command.args(["-device", "virtio-serial-pci"]);
        command
            .arg("-device")
            .arg(format!("virtserialport,chardev=harness,name={PORT_NAME}"));
        command.args(&options.arguments);
        let log = File::create(folder.path().join("log"))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        Ok(QemuGuest {
            child,
            folder,
            listener,
        })
    }

    /// QEMU's process id, which is also the thread that created the VM.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The VMM's side of the command port.
    pub fn port(&self) -> io::Result<UnixStream> {
        self.listener.accept().map(|(stream, _)| stream)
    }

    /// Gives QEMU's monitor (the human one) a command and returns what it says to it.
    pub fn command(&self, command: &str) -> io::Result<String> {
        let mut monitor = UnixStream::connect(self.file("monitor"))?;
        monitor.set_read_timeout(Some(MONITOR_WITHIN))?;
        until_prompt(&mut monitor)?;
        monitor.write_all(format!("{command}\n").as_bytes())?;
        until_prompt(&mut monitor)
    }

    /// What the guest wrote on its serial console, and what QEMU itself said.
    pub fn console(&self) -> String {
        let read = |name: &str| std::fs::read_to_string(self.file(name)).unwrap_or_default();
        read("console") + &read("log")
    }

    /// Waits until QEMU ends.
    pub fn wait(&mut self, within: Duration) -> Result<(), wait::TimedOut> {
        wait::wait_for(within, "QEMU to end", || {
            self.child.try_wait().ok().flatten().map(drop)
        })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// What the monitor writes up to its next prompt.
fn until_prompt(monitor: &mut UnixStream) -> io::Result<String> {
    let mut said = String::new();
    while !said.ends_with("(qemu) ") {
        let mut buffer = [0; 4096];
        match monitor.read(&mut buffer)? {
            0 => break,
            length => said.push_str(&String::from_utf8_lossy(&buffer[..length])),
        }
    }
    Ok(said)
}

impl Drop for QemuGuest {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
