//! Many VMs in one process: all run at once, all end with their handles, and the process is as it was before.
//!
//! ```text
//! cargo run --example many -- KERNEL INITRD COUNT
//! ```

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vm_lifecycle::config::{DiskSpec, VmConfig};
use vm_lifecycle::event::{EndCause, EventKind};
use vm_lifecycle::state::State;
use vm_lifecycle::vm::Vm;
use vm_lifecycle::vm::host::{HostDevices, KvmPlatform};

const WITHIN: Duration = Duration::from_secs(600);
/// The guest says this on its serial port, and switches itself off when it is answered with a line.
const GREETING: &str = "GUEST-INIT-REACHED";
const CMDLINE: &str =
    "console=ttyS0 quiet loglevel=3 panic=-1 harness.modules=virtio_pci,virtio_blk harness.exit=input";

/// Hears on every guest's serial port whether it is up.
struct Consoles(Mutex<Sender<String>>);

struct Console {
    vm: String,
    said: Vec<u8>,
    up: Option<Sender<String>>,
}

impl HostDevices for Consoles {
    fn serial_output(&self, vm: &VmConfig) -> io::Result<Box<dyn Write + Send>> {
        Ok(Box::new(Console {
            vm: vm.name().to_string(),
            said: Vec::new(),
            up: Some(self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()),
        }))
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.said.extend_from_slice(bytes);
        if String::from_utf8_lossy(&self.said).contains(GREETING)
            && let Some(up) = self.up.take()
        {
            up.send(self.vm.clone()).map_err(io::Error::other)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let usage = "usage: many KERNEL INITRD COUNT";
    let mut words = std::env::args().skip(1);
    let kernel = words.next().ok_or(usage)?;
    let initrd = words.next().ok_or(usage)?;
    let count: usize = words.next().ok_or(usage)?.parse()?;
    let disks = tempfile::tempdir()?;
    let (up, greetings) = channel();
    let platform = Arc::new(KvmPlatform::new(Consoles(Mutex::new(up))));
    let start = |index: usize| -> Result<Vm, Box<dyn Error>> {
        let disk = disks.path().join(format!("{index}.img"));
        File::create(&disk)?.set_len(8 << 20)?;
        let config = VmConfig::builder(format!("many-{index}"), std::path::absolute(&kernel)?)
            .initrd(std::path::absolute(&initrd)?)
            .cmdline(CMDLINE)
            .cpus(1 + (index % 2) as u32)
            .startup_bytes(128 << 20)
            .disk(DiskSpec::new("data", disk))
            .build()?;
        let vm = Vm::new(config, platform.clone())?;
        let started = vm.start()?.wait(WITHIN).ok_or("a start never ended")?;
        assert!(started.is_done(), "{started}");
        Ok(vm)
    };

    // The first VM of a process makes what all later ones share: counted before is what one VM leaves behind, once the
    // main thread is alone again.
    drop(start(0)?);
    let before = settled(|[threads, ..]| threads == 1)?;
    let inheritable = inheritable_count()?;
    // One after the other: on few CPUs, guests that all boot at once take each other's time.
    let mut vms = Vec::new();
    for index in 1..=count {
        vms.push(start(index)?);
        is_up(&greetings, &format!("many-{index}"))?;
    }
    assert!(vms.iter().all(|vm| vm.state() == State::Running));
    println!("{count} guests run: {}", describe(counts()?));
    let now = inheritable_count()?;
    assert_eq!(
        now, inheritable,
        "a child would inherit descriptors of the guests"
    );

    // Every second guest ends by itself, every other one is cut off.
    for vm in vms.iter().step_by(2) {
        let events = vm.events();
        assert_eq!(vm.serial_input(b"\n")?, 1);
        let ended = std::iter::from_fn(|| events.next(WITHIN)).find_map(|event| match event.kind {
            EventKind::Ended { cause } => Some(cause),
            _ => None,
        });
        assert_eq!(ended, Some(EndCause::GuestPowerOff));
    }
    drop(vms);

    let after = settled(|now| now == before)?;
    println!("their handles are dropped: {}", describe(after));
    assert_eq!(before, after, "threads, descriptors or mappings are left behind");
    Ok(())
}

/// Waits until the guest of `vm` has greeted; the one before all others was cut off, perhaps too early for that.
fn is_up(greetings: &Receiver<String>, vm: &str) -> Result<(), Box<dyn Error>> {
    while greetings.recv_timeout(WITHIN)? != vm {}
    Ok(())
}

/// The counts once they are as wanted, or as they are after a while: a thread leaves the list shortly after its work.
fn settled(wanted: impl Fn([usize; 3]) -> bool) -> Result<[usize; 3], std::io::Error> {
    for _ in 0..1000 {
        let now = counts()?;
        if wanted(now) {
            return Ok(now);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    counts()
}

/// Threads, open descriptors and shared mappings of this process: guests' RAM and what KVM shares of vCPUs.
fn counts() -> Result<[usize; 3], std::io::Error> {
    let entries = |folder: &str| fs::read_dir(folder).map(Iterator::count);
    let maps = fs::read_to_string("/proc/self/maps")?;
    let guest_maps = maps.lines().filter(|line| line.contains(" rw-s "));
    Ok([
        entries("/proc/self/task")?,
        entries("/proc/self/fd")?,
        guest_maps.count(),
    ])
}

/// The descriptors that a child process would inherit: those without `O_CLOEXEC` among their flags (proc(5)).
fn inheritable_count() -> Result<usize, std::io::Error> {
    let mut count = 0;
    for entry in fs::read_dir("/proc/self/fdinfo")? {
        let Ok(info) = fs::read_to_string(entry?.path()) else {
            continue;
        };
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags
            .and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok())
            .unwrap_or(0);
        count += usize::from(flags & 0o2_000_000 == 0);
    }
    Ok(count)
}

fn describe([threads, descriptors, mappings]: [usize; 3]) -> String {
    format!("{threads} threads, {descriptors} descriptors, {mappings} mappings of guests")
}
