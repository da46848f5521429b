//! What a process spends: to show that an idle VM costs nothing and a finished one leaves nothing behind.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::Path;

/// A process's counters at one moment.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Usage {
    /// Threads.
    pub thread_count: u64,
    /// Open file descriptors.
    pub fd_count: u64,
    /// Memory mappings.
    pub mapping_count: u64,
    /// Resident memory, shared memory included.
    pub resident_kib: u64,
    /// Resident memory that nobody else has, anonymous or private.
    pub private_kib: u64,
    /// CPU time of all threads, in clock ticks (1/100 s).
    pub cpu_ticks: u64,
}

impl Usage {
    /// The counters of this process.
    pub fn of_self() -> io::Result<Self> {
        Usage::of("self")
    }

    /// The counters of another process.
    pub fn of_process(pid: u32) -> io::Result<Self> {
        Usage::of(&pid.to_string())
    }

    fn of(process: &str) -> io::Result<Self> {
        let folder = format!("/proc/{process}");
        let status = fs::read_to_string(format!("{folder}/status"))?;
        let rollup = fs::read_to_string(format!("{folder}/smaps_rollup"))?;
        let maps = fs::read_to_string(format!("{folder}/maps"))?;
        let stat = fs::read_to_string(format!("{folder}/stat"))?;
        let fd_count = fs::read_dir(format!("{folder}/fd"))?.count() as u64;
        Ok(Usage {
            thread_count: field(&status, "Threads:")?,
            // The listing itself needs a descriptor.
            fd_count: if process == "self" { fd_count - 1 } else { fd_count },
            mapping_count: maps.lines().count() as u64,
            resident_kib: field(&rollup, "Rss:")?,
            private_kib: field(&rollup, "Private_Clean:")? + field(&rollup, "Private_Dirty:")?,
            cpu_ticks: cpu_ticks(&stat)?,
        })
    }
}

/// VM exits of all VMs that the thread `creator_tid` created, from KVM's own counters (needs debugfs).
///
/// The counts repeat within a few per cent where times swing by a third.
pub fn vm_exit_count(creator_tid: u32) -> io::Result<u64> {
    let prefix = format!("{creator_tid}-");
    let mut sum = None;
    for folder in KvmVms::now()?.folders {
        if folder.to_string_lossy().starts_with(&prefix) {
            let counters = counters(&Path::new(KVM_COUNTERS).join(folder))?;
            sum = Some(sum.unwrap_or(0) + counters.get("exits").copied().unwrap_or(0));
        }
    }
    sum.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("thread {creator_tid} has no VM")))
}

/// Where KVM counts: a folder for each VM (needs debugfs).
const KVM_COUNTERS: &str = "/sys/kernel/debug/kvm";

/// The VMs of this host, for finding the one that is made next.
#[derive(Clone, Debug, Default)]
pub struct KvmVms {
    folders: BTreeSet<OsString>,
}

impl KvmVms {
    /// The VMs there are now.
    pub fn now() -> io::Result<Self> {
        let mut folders = BTreeSet::new();
        for entry in fs::read_dir(KVM_COUNTERS)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.insert(entry.file_name());
            }
        }
        Ok(KvmVms { folders })
    }

    /// The counters of the only VM that was made since, by their names.
    ///
    /// VMs are told by the thread that created them, which a VMM may have ended meanwhile.
    pub fn counters_of_the_new_one(&self) -> io::Result<BTreeMap<String, u64>> {
        let now = KvmVms::now()?;
        let mut new = now.folders.difference(&self.folders);
        let (Some(folder), None) = (new.next(), new.next()) else {
            return Err(io::Error::other("not one VM but none or several were made"));
        };
        counters(&Path::new(KVM_COUNTERS).join(folder))
    }
}

/// The files of `folder` that hold a number.
fn counters(folder: &Path) -> io::Result<BTreeMap<String, u64>> {
    let mut counters = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        // Not all are numbers, and some cannot be read.
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        if let Ok(count) = text.trim().parse() {
            counters.insert(entry.file_name().to_string_lossy().to_string(), count);
        }
    }
    Ok(counters)
}

/// What a process costs beside the RAM of its guests.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct OwnMemory {
    /// Its share of all its resident pages (`Pss`).
    pub share_kib: u64,
    /// The resident pages that nobody else has.
    pub private_kib: u64,
}

impl OwnMemory {
    /// Counts the mappings of process `pid`, without those that are as large as a guest's RAM.
    pub fn of_process(pid: u32, ram_bytes: u64) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
        let mut own = OwnMemory::default();
        let mut is_ram = false;
        for line in text.lines() {
            let (name, rest) = line.split_once(' ').unwrap_or((line, ""));
            let number = || -> u64 {
                rest.split_whitespace()
                    .next()
                    .and_then(|n| n.parse().ok())
                    .unwrap_or(0)
            };
            match name {
                "Size:" => is_ram = number() == ram_bytes >> 10,
                "Pss:" if !is_ram => own.share_kib += number(),
                "Private_Clean:" | "Private_Dirty:" if !is_ram => own.private_kib += number(),
                _ => {}
            }
        }
        Ok(own)
    }
}

/// The CPU time that each thread of process `pid` has had, by thread id: the thread's name and nanoseconds.
pub fn thread_times(pid: u32) -> io::Result<BTreeMap<u32, (String, u64)>> {
    let mut times = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let entry = entry?;
        let id = entry
            .file_name()
            .to_string_lossy()
            .parse()
            .map_err(io::Error::other)?;
        let name = fs::read_to_string(entry.path().join("comm"))?.trim().to_string();
        let spent = fs::read_to_string(entry.path().join("schedstat"))?;
        let nanoseconds = spent.split_whitespace().next().unwrap_or_default();
        times.insert(id, (name, nanoseconds.parse().map_err(io::Error::other)?));
    }
    Ok(times)
}

/// The number after `name` at the beginning of a line.
fn field(text: &str, name: &str) -> io::Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|rest| rest.split_whitespace().next());
    let number = number.ok_or_else(|| io::Error::other(format!("no {name} in /proc")))?;
    number.parse().map_err(io::Error::other)
}

/// `utime` and `stime`, fields 14 and 15 of proc(5)'s `stat`, counted behind the name, which may hold spaces.
fn cpu_ticks(stat: &str) -> io::Result<u64> {
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let mut ticks = rest.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
    match (ticks.next(), ticks.next()) {
        (Some(Ok(user)), Some(Ok(system))) => Ok(user + system),
        _ => Err(io::Error::other("no CPU times in /proc")),
    }
}
