//! What the host knows of the VMs of this process, from /proc and from KVM's own files: none of it asks the library.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use libtest_mimic::Failed;

use crate::harness::resources::Usage;

/// Where KVM keeps a folder for every VM, named after the thread that made it.
const KVM_FOLDERS: &str = "/sys/kernel/debug/kvm";

/// The folders of all VMs of this machine; `None` where debugfs is not mounted or not for this user.
pub fn kvm_folders() -> Option<BTreeSet<PathBuf>> {
    let entries = fs::read_dir(KVM_FOLDERS).ok()?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    Some(paths.filter(|path| path.is_dir()).collect())
}

/// How often the guest of this folder has been interrupted because the VMM or KVM had to do something for it.
pub fn exit_count(folder: &Path) -> Result<u64, Failed> {
    Ok(fs::read_to_string(folder.join("exits"))?.trim().parse()?)
}

/// What a VM needs of this process, counted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Holdings {
    threads: u64,
    descriptors: u64,
    mappings: usize,
}

impl Holdings {
    /// The counts now.
    pub fn now() -> io::Result<Self> {
        let usage = Usage::of_self()?;
        let maps = fs::read_to_string("/proc/self/maps")?;
        // Guests' RAM and what KVM shares of vCPUs. The rest are the program's own: its files, its heap.
        let of_guests = maps.lines().filter(|line| line.contains(" rw-s "));
        Ok(Self {
            threads: usage.thread_count,
            descriptors: usage.fd_count,
            mappings: of_guests.count(),
        })
    }
}

impl fmt::Display for Holdings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            threads,
            descriptors,
            mappings,
        } = self;
        write!(
            f,
            "{threads} threads, {descriptors} descriptors, {mappings} mappings of guests"
        )
    }
}

/// Runs a shell script with one argument on the host and returns what it writes.
pub fn shell(script: &str, argument: &str) -> Result<String, Failed> {
    // The tools of file systems are not on everybody's path.
    let script = format!("PATH=$PATH:/usr/sbin:/sbin; {script}");
    let output = Command::new("sh")
        .args(["-c", &script, "sh", argument])
        .output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_string());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{script} with {argument}: {}: {}", output.status, said.trim()).into())
}
