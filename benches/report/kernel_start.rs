//! When a guest's kernel has begun: its first write to the MSR of kvmclock, from KVM's trace events (needs tracefs).
//!
//! ```text
//! exec ─ the VMM makes a VM and loads the kernel ─ kvmclock ─ the kernel's own work ─ init
//! ```
//! What comes after is the guest's work at the host's speed; only what comes before is the VMM's alone. A Linux guest
//! writes the MSR in `setup_arch`, before it keeps a time of its own. Two rare events cost nothing that could be measured.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A trace instance of our own, so that nobody else's is disturbed.
const INSTANCES: &str = "/sys/kernel/tracing/instances";
/// `MSR_KVM_SYSTEM_TIME_NEW` (Linux `Documentation/virt/kvm/x86/msr.rst`).
const KVMCLOCK: &str = "4b564d01";

/// Listens as long as it lives.
pub struct KernelStart {
    folder: PathBuf,
}

impl KernelStart {
    /// Begins to listen.
    ///
    /// # Errors
    /// Without tracefs, or without the right to it.
    pub fn listen() -> io::Result<Self> {
        let folder = Path::new(INSTANCES).join(format!("start-up-{}", std::process::id()));
        fs::create_dir(&folder)?;
        let this = Self { folder };
        this.set("events/kvm/kvm_msr/filter", &format!("ecx == 0x{KVMCLOCK}"))?;
        this.set("events/kvm/kvm_msr/enable", "1")?;
        this.set("events/sched/sched_process_exec/enable", "1")?;
        Ok(this)
    }

    /// Forgets what was heard.
    pub fn clear(&self) -> io::Result<()> {
        self.set("trace", "")
    }

    /// The seconds from the exec of process `pid` until a guest's kernel began.
    pub fn seconds(&self, pid: u32) -> io::Result<f64> {
        let trace = fs::read_to_string(self.folder.join("trace"))?;
        seconds(&trace, pid).ok_or_else(|| io::Error::other(format!("no guest's kernel began:\n{trace}")))
    }

    fn set(&self, file: &str, text: &str) -> io::Result<()> {
        fs::write(self.folder.join(file), text)
    }
}

impl Drop for KernelStart {
    fn drop(&mut self) {
        fs::remove_dir(&self.folder).ok();
    }
}

/// Of lines like `  vcpu-0-157  [000] .....  5.380347: kvm_msr: msr_write 4b564d01 = 0x3601001`.
fn seconds(trace: &str, pid: u32) -> Option<f64> {
    let exec = format!(" pid={pid} ");
    let event = |line: &'_ str| -> Option<(f64, bool)> {
        let (before, event) = line.split_once(": ")?;
        let at = before.split_whitespace().last()?.parse().ok()?;
        let is_exec = event.starts_with("sched_process_exec") && event.contains(&exec);
        (is_exec || event.contains(KVMCLOCK)).then_some((at, is_exec))
    };
    let events: Vec<_> = trace.lines().filter_map(event).collect();
    let (exec, _) = events.iter().rfind(|(_, is_exec)| *is_exec)?;
    let (kvmclock, _) = events.iter().find(|(at, is_exec)| !is_exec && at > exec)?;
    Some(kvmclock - exec)
}
