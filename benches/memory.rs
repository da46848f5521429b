//! What a VM costs its host beside the guest's RAM: memory for the first VM of a process and for each further one, and
//! CPU time while the guest idles. QEMU's `microvm` and `q35` with the same guest stand beside it.
//!
//! The process measured is this program again, called with `vmm`: it starts one VM for each line that it reads and says
//! when that VM's init runs. Memory is a process's share of its resident pages, without the mapping of the RAM.

#[path = "../tests/harness/mod.rs"]
mod harness;
mod report;

use std::env;
use std::error::Error;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::sleep;
use std::time::Duration;

use harness::artefacts::{Flavour, GuestKernel, INIT_REACHED};
use harness::kvm::{self, Verdict};
use harness::qemu;
use harness::resources::{OwnMemory, thread_times};
use vm_lifecycle::config::VmConfig;
use vm_lifecycle::vm::Vm;
use vm_lifecycle::vm::host::{HostDevices, KvmPlatform};

const CMDLINE: &str = "console=ttyS0 quiet loglevel=3 panic=-1 harness.modules=none harness.exit=idle";
const RAM_BYTES: u64 = 256 << 20;
const VM_COUNT: usize = 8;
/// The word that makes this program the one measured.
const VMM: &str = "vmm";
/// What that program says when a guest's init runs.
const READY: &str = "ready";
/// How long a guest is given to come to rest after its init began.
const SETTLED_AFTER: Duration = Duration::from_secs(5);
/// How long a guest's idling is watched.
const IDLE_FOR: Duration = Duration::from_secs(10);

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = env::args().skip(1).collect();
    if let [word, kernel, initrd] = words.as_slice()
        && word == VMM
    {
        return serve(kernel, initrd);
    }
    match kvm::verdict() {
        Verdict::Run => measure(),
        Verdict::Ignore(why) => {
            println!("not measured: {why}");
            Ok(())
        }
        Verdict::Fail(why) => Err(why.into()),
    }
}

/// The program measured: a VM for each line of input.
fn serve(kernel: &str, initrd: &str) -> Result<(), Box<dyn Error>> {
    let mut vms = Vec::new();
    for line in io::stdin().lines() {
        line?;
        let config = VmConfig::builder(format!("vm-{}", vms.len()), kernel)
            .initrd(initrd)
            .cmdline(CMDLINE)
            .startup_bytes(RAM_BYTES)
            .build()?;
        let (reached, init) = channel();
        let vm = Vm::new(config, Arc::new(KvmPlatform::new(Watched { reached })))?;
        let started = vm
            .start()?
            .wait(Duration::MAX)
            .ok_or("the start goes on for ever")?;
        assert!(started.is_done(), "{started}");
        init.recv()?;
        vms.push(vm);
        println!("{READY}");
    }
    Ok(())
}

/// Tells when the guest's init has written its line.
struct Watched {
    reached: Sender<()>,
}

impl HostDevices for Watched {
    fn serial_output(&self, _vm: &VmConfig) -> io::Result<Box<dyn Write + Send>> {
        let reached = self.reached.clone();
        let text = String::new();
        Ok(Box::new(Console { text, reached }))
    }
}

struct Console {
    /// What was written before init's line.
    text: String,
    reached: Sender<()>,
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.text.push_str(&String::from_utf8_lossy(bytes));
        if self.text.contains(INIT_REACHED) {
            self.reached.send(()).ok();
            self.text.clear();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn measure() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let kernel = GuestKernel::find(Flavour::Cloud)?.copied_to(folder.path())?;
    let microvm = at_rest(Qemu::start("microvm,rtc=on", &kernel.elf, &kernel)?)?;
    let q35 = at_rest(Qemu::start("q35", &kernel.bzimage, &kernel)?)?;

    let mut ours = Ours::start(folder.path(), &kernel)?;
    let empty = ours.process.memory()?;
    ours.add_vm()?;
    let first = ours.process.memory()?;
    let idle = ours.process.idle()?;
    for _ in 1..VM_COUNT {
        ours.add_vm()?;
    }
    let all = ours.process.memory()?;
    let idle_all = ours.process.idle()?;

    let kib = |kib: u64| format!("{:.2} MiB", kib as f64 / 1024.0);
    let row = |name: &str, memory: OwnMemory| {
        vec![name.to_string(), kib(memory.share_kib), kib(memory.private_kib)]
    };
    let further = OwnMemory {
        share_kib: (all.share_kib - first.share_kib) / (VM_COUNT as u64 - 1),
        private_kib: (all.private_kib - first.private_kib) / (VM_COUNT as u64 - 1),
    };
    report::print(&[
        ["memory beside guest RAM", "share", "private"]
            .map(str::to_string)
            .to_vec(),
        row("ours, process without a vm", empty),
        row("ours, process with one vm", first),
        row("ours, each further vm", further),
        row("microvm, one vm", microvm.0),
        row("q35, one vm", q35.0),
    ]);
    println!();
    let row = |name: &str, idle: Idle| {
        let per_mille =
            |spent: Duration| format!("{:.3} ‰", spent.as_secs_f64() * 1000.0 / IDLE_FOR.as_secs_f64());
        vec![name.to_string(), per_mille(idle.vcpus), per_mille(idle.others)]
    };
    report::print(&[
        ["CPU time of an idle guest", "vCPU threads", "others"]
            .map(str::to_string)
            .to_vec(),
        row("ours, one vm", idle),
        row(&format!("ours, {VM_COUNT} vms"), idle_all),
        row("microvm, one vm", microvm.1),
        row("q35, one vm", q35.1),
    ]);
    Ok(())
}

/// What one VM in QEMU costs.
fn at_rest(qemu: Qemu) -> io::Result<(OwnMemory, Idle)> {
    Ok((qemu.process.memory()?, qemu.process.idle()?))
}

/// CPU time during [`IDLE_FOR`].
#[derive(Clone, Copy)]
struct Idle {
    vcpus: Duration,
    others: Duration,
}

/// A process that is measured and ends with this value.
struct Process(Child);

impl Process {
    /// Its memory once its guests are at rest.
    fn memory(&self) -> io::Result<OwnMemory> {
        sleep(SETTLED_AFTER);
        OwnMemory::of_process(self.0.id(), RAM_BYTES)
    }

    /// What its threads spend while its guests are at rest.
    fn idle(&self) -> io::Result<Idle> {
        let before = thread_times(self.0.id())?;
        sleep(IDLE_FOR);
        let mut idle = Idle {
            vcpus: Duration::ZERO,
            others: Duration::ZERO,
        };
        for (id, (name, after)) in thread_times(self.0.id())? {
            let spent = after - before.get(&id).map_or(0, |(_, before)| *before);
            let spent = Duration::from_nanos(spent);
            if name.starts_with("vcpu-") || name.ends_with("/KVM") {
                idle.vcpus += spent;
            } else {
                idle.others += spent;
                if !spent.is_zero() {
                    eprintln!("{name}: {spent:?} in {IDLE_FOR:?}");
                }
            }
        }
        Ok(idle)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// This program as a VMM.
struct Ours {
    process: Process,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Ours {
    fn start(folder: &Path, kernel: &GuestKernel) -> Result<Self, Box<dyn Error>> {
        let program = folder.join("vmm");
        fs::copy(env::current_exe()?, &program)?;
        let mut command = Command::new(program);
        command.arg(VMM).arg(&kernel.elf).arg(&kernel.initramfs);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        Ok(Self {
            input: child.stdin.take().ok_or("it was piped")?,
            output: BufReader::new(child.stdout.take().ok_or("it was piped")?),
            process: Process(child),
        })
    }

    fn add_vm(&mut self) -> Result<(), Box<dyn Error>> {
        writeln!(self.input, "one more")?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        if line.trim() == READY {
            Ok(())
        } else {
            Err(format!("the vmm said {line:?}").into())
        }
    }
}

/// QEMU with the same guest.
struct Qemu {
    process: Process,
    /// Open as long as QEMU runs.
    _output: ChildStdout,
}

impl Qemu {
    /// Starts `image`, since `q35` takes no ELF, on `machine`.
    fn start(machine: &str, image: &Path, kernel: &GuestKernel) -> Result<Self, Box<dyn Error>> {
        let mut command = qemu::bare(machine, image, &kernel.initramfs, CMDLINE);
        command.args(["-name", "guest,debug-threads=on"]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut output = child.stdout.take().ok_or("it was piped")?;
        let process = Process(child);
        let mut said = String::new();
        while !said.contains(INIT_REACHED) {
            let mut buffer = [0; 4096];
            match output.read(&mut buffer)? {
                0 => return Err(format!("QEMU ended early: {said}").into()),
                length => said.push_str(&String::from_utf8_lossy(&buffer[..length])),
            }
        }
        Ok(Self {
            process,
            _output: output,
        })
    }
}
