//! From exec of a small VMM process to the guest's init, beside QEMU in the same run: wall time, how much of it passes
//! before the guest's kernel begins, and VM exits.
//!
//! Debian's cloud kernel, one vCPU, 256 MiB, a serial console and no other device: the example `boot` and QEMU's
//! `microvm`, each with the ELF image (which QEMU enters by PVH) and the bzImage, and QEMU's `q35`. Everything that is
//! read lies in memory. Each is compared with the `microvm` that starts the same image, and with the one that starts the
//! bzImage, which is the image that Debian ships.

#[path = "../tests/harness/mod.rs"]
mod harness;
mod report;

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use harness::artefacts::{Flavour, GuestKernel, INIT_REACHED};
use harness::kvm::{self, Verdict};
use harness::qemu;
use harness::resources::KvmVms;
use report::kernel_start::KernelStart;

const CMDLINE: &str = "console=ttyS0 quiet loglevel=3 panic=-1 harness.modules=none harness.exit=idle";
const MICROVM_BZIMAGE: &str = "microvm, bzImage";
/// The counters that are worth a column: KVM's name and ours.
const COLUMNS: [(&str, &str); 7] = [
    ("exits", "exits"),
    ("io_exits", "port"),
    ("mmio_exits", "mmio"),
    ("irq_exits", "irq"),
    ("irq_window_exits", "window"),
    ("halt_exits", "halt"),
    ("pf_taken", "faults"),
];

/// One way of starting the guest.
struct Subject {
    name: &'static str,
    /// The subject that this one is compared with.
    peer: Option<&'static str>,
    command: Box<dyn Fn() -> Command>,
    samples: Vec<Sample>,
}

struct Sample {
    seconds: f64,
    /// Of these, before the guest's kernel begins.
    vmm_seconds: f64,
    counters: BTreeMap<String, u64>,
}

fn main() -> Result<(), Box<dyn Error>> {
    match kvm::verdict() {
        Verdict::Run => {}
        Verdict::Ignore(why) => {
            println!("not measured: {why}");
            return Ok(());
        }
        Verdict::Fail(why) => return Err(why.into()),
    }
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let mut subjects = subjects(folder.path())?;
    let kernel_start = KernelStart::listen()?;
    for round in 0..=report::rounds() {
        for subject in &mut subjects {
            let sample = start((subject.command)(), &kernel_start)?;
            eprintln!("round {round}: {} {:.2} s", subject.name, sample.seconds);
            if round > 0 {
                subject.samples.push(sample);
            }
        }
    }
    show(&subjects);
    Ok(())
}

/// Copies what is read at a start into `folder` and says how each subject is started from there.
fn subjects(folder: &Path) -> Result<Vec<Subject>, Box<dyn Error>> {
    let kernel = GuestKernel::find(Flavour::Cloud)?.copied_to(folder)?;
    let boot = folder.join("boot");
    fs::copy(report::example("boot")?, &boot)?;
    let ours = |image: &Path| {
        let words = [boot.clone(), image.to_owned(), kernel.initramfs.clone()];
        move || {
            let mut command = Command::new(&words[0]);
            command.args(&words[1..]).arg(CMDLINE);
            command
        }
    };
    let qemu = |machine: &'static str, image: &Path| {
        let (image, initramfs) = (image.to_owned(), kernel.initramfs.clone());
        move || qemu::bare(machine, &image, &initramfs, CMDLINE)
    };
    let subject = |name, peer, command| Subject {
        name,
        peer,
        command,
        samples: Vec::new(),
    };
    const MICROVM: &str = "microvm,rtc=on";
    Ok(vec![
        subject("ours, ELF", Some("microvm, ELF"), Box::new(ours(&kernel.elf))),
        subject("microvm, ELF", None, Box::new(qemu(MICROVM, &kernel.elf))),
        subject(
            "ours, bzImage",
            Some(MICROVM_BZIMAGE),
            Box::new(ours(&kernel.bzimage)),
        ),
        subject(MICROVM_BZIMAGE, None, Box::new(qemu(MICROVM, &kernel.bzimage))),
        subject(
            "q35, bzImage",
            Some(MICROVM_BZIMAGE),
            Box::new(qemu("q35", &kernel.bzimage)),
        ),
    ])
}

/// Starts a guest, waits for its init and ends it.
fn start(mut command: Command, kernel_start: &KernelStart) -> Result<Sample, Box<dyn Error>> {
    let before = KvmVms::now()?;
    kernel_start.clear()?;
    let began = Instant::now();
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()?;
    let mut child = Killed(child);
    let mut output = child.0.stdout.take().ok_or("the output was piped")?;
    let mut said = String::new();
    while !said.contains(INIT_REACHED) {
        let mut buffer = [0; 4096];
        match output.read(&mut buffer)? {
            0 => return Err(format!("{command:?} ended early: {said}").into()),
            length => said.push_str(&String::from_utf8_lossy(&buffer[..length])),
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    Ok(Sample {
        seconds,
        vmm_seconds: kernel_start.seconds(child.0.id())?,
        counters: before.counters_of_the_new_one()?,
    })
}

/// A process that ends with this value.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

impl Subject {
    fn median(&self, of: impl Fn(&Sample) -> f64) -> f64 {
        report::median(&self.samples.iter().map(of).collect::<Vec<_>>())
    }

    fn seconds(&self) -> f64 {
        self.median(|sample| sample.seconds)
    }

    fn count(&self, counter: &str) -> f64 {
        self.median(|sample| sample.counters.get(counter).copied().unwrap_or(0) as f64)
    }
}

fn show(subjects: &[Subject]) {
    let mut header = ["exec to init, medians", "seconds", "vmm", "guest"]
        .map(str::to_string)
        .to_vec();
    header.extend(COLUMNS.iter().map(|(_, title)| (*title).to_string()));
    header.extend(["time to peer", "exits to peer", "time to microvm, bzImage"].map(str::to_string));
    let common = subjects.iter().find(|subject| subject.name == MICROVM_BZIMAGE);
    let mut rows = vec![header];
    for subject in subjects {
        let (vmm, guest) = (
            subject.median(|sample| sample.vmm_seconds),
            subject.median(|sample| sample.seconds - sample.vmm_seconds),
        );
        let mut row = vec![subject.name.to_string()];
        row.extend([subject.seconds(), vmm, guest].map(|seconds| format!("{seconds:.2}")));
        row.extend(
            COLUMNS
                .iter()
                .map(|(counter, _)| format!("{:.0}", subject.count(counter))),
        );
        let peer = subjects.iter().find(|peer| Some(peer.name) == subject.peer);
        if let (Some(peer), Some(common)) = (peer, common) {
            row.push(report::ratio(subject.seconds(), peer.seconds()));
            row.push(report::ratio(subject.count("exits"), peer.count("exits")));
            row.push(report::ratio(subject.seconds(), common.seconds()));
        }
        rows.push(row);
    }
    report::print(&rows);
}
