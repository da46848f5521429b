//! How long a resize takes from the call until the guest's kernel counts the memory, or counts it no more, and how that
//! depends on the size of the region that it could be given. QEMU's `q35` with the same devices stands beside it.
//!
//! The guest watches its own /proc/meminfo without a pause, so that what is timed is the guest and the VMM.

#[path = "../tests/harness/mod.rs"]
mod harness;
mod report;

use std::error::Error;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use harness::artefacts::{Flavour, GuestKernel, PORT_NAME};
use harness::guest_shell::GuestShell;
use harness::kvm::{self, Verdict};
use harness::qemu::{QemuGuest, QemuOptions};
use vm_lifecycle::config::VmConfig;
use vm_lifecycle::ids::PortName;
use vm_lifecycle::vm::Vm;
use vm_lifecycle::vm::host::{HostDevices, HostPort, KvmPlatform};
use vm_lifecycle::vm::memory::ResizeOptions;

const CMDLINE: &str = "console=ttyS0 quiet loglevel=3 panic=-1 memhp_default_state=online_movable";
const STARTUP_MIB: u64 = 512;
/// What is added and taken away.
const MOVED_MIB: u64 = 1024;
/// What the guest could be given beyond its start-up size.
const REGIONS_MIB: [u64; 3] = [1024, 4096, 16384];
const WITHIN: Duration = Duration::from_secs(300);

fn main() -> Result<(), Box<dyn Error>> {
    match kvm::verdict() {
        Verdict::Run => measure(),
        Verdict::Ignore(why) => {
            println!("not measured: {why}");
            Ok(())
        }
        Verdict::Fail(why) => Err(why.into()),
    }
}

fn measure() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let kernel = GuestKernel::find(Flavour::Cloud)?.copied_to(folder.path())?;
    let mut rows = vec![
        [
            "region",
            "ours +1 GiB",
            "QEMU +1 GiB",
            "ratio",
            "ours -1 GiB",
            "QEMU -1 GiB",
            "ratio",
        ]
        .map(str::to_string)
        .to_vec(),
    ];
    for region_mib in REGIONS_MIB {
        let ours = timed(Ours::start(&kernel, region_mib)?)?;
        let theirs = timed(Qemu::start(&kernel, region_mib)?)?;
        let seconds = |seconds: f64| format!("{seconds:.3} s");
        let mut row = vec![format!("{} GiB", region_mib / 1024)];
        for (ours, theirs) in [(ours.0, theirs.0), (ours.1, theirs.1)] {
            row.extend([seconds(ours), seconds(theirs), report::ratio(ours, theirs)]);
        }
        rows.push(row);
    }
    report::print(&rows);
    Ok(())
}

/// A guest whose memory can be asked to change.
trait Subject {
    fn shell(&mut self) -> &mut GuestShell;

    /// Asks the guest for `mib` beyond its start-up size.
    fn ask(&mut self, mib: u64) -> Result<(), Box<dyn Error>>;
}

/// The medians of growing and shrinking, in seconds.
fn timed(mut subject: impl Subject) -> Result<(f64, f64), Box<dyn Error>> {
    let (mut grown, mut shrunk) = (Vec::new(), Vec::new());
    // More than is counted before the last memory block of 128 MiB, and less than the kernel leaves of all.
    let most_kib = (STARTUP_MIB + MOVED_MIB * 7 / 8) << 10;
    for round in 0..=report::rounds() {
        let up = move_once(&mut subject, MOVED_MIB, &format!("-ge {most_kib}"))?;
        // The kernel never counts the memory that it needs itself, so this is less than a memory block of what was added.
        let down = move_once(&mut subject, 0, &format!("-le {}", (STARTUP_MIB + 2) << 10))?;
        if round > 0 {
            grown.push(up);
            shrunk.push(down);
        }
    }
    Ok((report::median(&grown), report::median(&shrunk)))
}

/// Asks for `mib` and waits until the guest's total compares as `test` says; how long that took.
fn move_once(subject: &mut impl Subject, mib: u64, test: &str) -> Result<f64, Box<dyn Error>> {
    let watch = format!(
        "echo watching >&2; while read -r word kib rest </proc/meminfo && ! [ $kib {test} ]; do :; done; echo $word"
    );
    let id = subject.shell().send(&watch)?;
    let began = Instant::now();
    subject.ask(mib)?;
    let answer = subject.shell().answer(id, &watch, WITHIN)?;
    let seconds = began.elapsed().as_secs_f64();
    if answer.text.contains("MemTotal:") {
        Ok(seconds)
    } else {
        Err(answer.text.into())
    }
}

/// Our VM; its guest's port is a socket pair.
struct Ours {
    vm: Vm,
    shell: GuestShell,
}

#[derive(Clone, Default)]
struct Port(Arc<Mutex<Option<UnixStream>>>);

impl HostDevices for Port {
    fn ports(&self, _vm: &VmConfig) -> io::Result<Vec<HostPort>> {
        let (ours, stream) = UnixStream::pair()?;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(ours);
        Ok(vec![HostPort {
            name: PortName::new(PORT_NAME).map_err(io::Error::other)?,
            console: false,
            stream,
        }])
    }
}

impl Ours {
    fn start(kernel: &GuestKernel, region_mib: u64) -> Result<Self, Box<dyn Error>> {
        let config = VmConfig::builder("resize", &kernel.elf)
            .initrd(&kernel.initramfs)
            .cmdline(CMDLINE)
            .startup_bytes(STARTUP_MIB << 20)
            .maximum_bytes((STARTUP_MIB + region_mib) << 20)
            .build()?;
        let port = Port::default();
        let vm = Vm::new(config, Arc::new(KvmPlatform::new(port.clone())))?;
        let started = vm.start()?.wait(WITHIN).ok_or("the start goes on for ever")?;
        assert!(started.is_done(), "{started}");
        let stream = port.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let shell = GuestShell::connect(stream.ok_or("the guest has a port")?, WITHIN)?;
        Ok(Self { vm, shell })
    }
}

impl Subject for Ours {
    fn shell(&mut self) -> &mut GuestShell {
        &mut self.shell
    }

    fn ask(&mut self, mib: u64) -> Result<(), Box<dyn Error>> {
        let options = ResizeOptions {
            within: WITHIN,
            ..ResizeOptions::default()
        };
        drop(self.vm.resize_memory((STARTUP_MIB + mib) << 20, options)?);
        Ok(())
    }
}

/// The same guest under QEMU.
struct Qemu {
    guest: QemuGuest,
    shell: GuestShell,
}

impl Qemu {
    fn start(kernel: &GuestKernel, region_mib: u64) -> Result<Self, Box<dyn Error>> {
        let memory = format!("size={STARTUP_MIB}M,maxmem={}M", STARTUP_MIB + region_mib);
        let backend = format!("memory-backend-ram,id=region,size={region_mib}M,reserve=off");
        let arguments = [
            "-m",
            &memory,
            "-object",
            &backend,
            "-device",
            "virtio-mem-pci,id=mem,memdev=region,requested-size=0",
            "-device",
            "virtio-balloon-pci,free-page-reporting=on",
        ];
        let options = QemuOptions {
            memory_mib: STARTUP_MIB,
            cmdline: CMDLINE.to_string(),
            arguments: arguments.map(str::to_string).to_vec(),
            ..QemuOptions::default()
        };
        let guest = QemuGuest::start(kernel, &options)?;
        let shell = GuestShell::connect(guest.port()?, WITHIN)?;
        Ok(Self { guest, shell })
    }
}

impl Subject for Qemu {
    fn shell(&mut self) -> &mut GuestShell {
        &mut self.shell
    }

    fn ask(&mut self, mib: u64) -> Result<(), Box<dyn Error>> {
        let said = self
            .guest
            .command(&format!("qom-set mem requested-size {mib}M"))?;
        if said.contains("Error") {
            return Err(said.into());
        }
        Ok(())
    }
}
