//! How much memory the host can still promise to guests.
//!
//! A guest that was given memory has not touched it yet, so the host's free memory alone says too little: two VMs that
//! grow at once would be promised the same bytes. All VMs that share a [`HostMemory`] promise from one purse: what was
//! promised and is not yet taken counts as gone.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The memory that the VMs of one embedder share; cheap to clone, all clones are one purse.
#[derive(Clone, Default)]
pub struct HostMemory {
    purse: Arc<Purse>,
}

#[derive(Default)]
struct Purse {
    limit_bytes: Option<u64>,
    promises: Mutex<Promises>,
}

#[derive(Default)]
struct Promises {
    last_id: u64,
    made: BTreeMap<u64, Promise>,
}

struct Promise {
    bytes: u64,
    huge_pages: bool,
    vm: Arc<dyn Promised>,
    /// It was refused more, and is told when there may be.
    waits: bool,
}

/// A VM that is promised memory. Called with the purse locked, by any thread: both verbs return at once.
pub trait Promised: Send + Sync {
    /// What the VM has taken from the host, in bytes; of huge pages, also those that are reserved for it.
    fn taken_bytes(&self) -> u64;

    /// The VM was refused more, and another one gave something back.
    fn may_ask_again(&self);
}

/// What one VM was promised, until it is dropped.
pub struct MemoryPromise {
    purse: Arc<Purse>,
    id: u64,
}

/// Why memory cannot be promised.
#[derive(Debug, thiserror::Error)]
pub enum HostMemoryError {
    /// The host does not have so much left.
    #[error("{need_bytes} bytes more are needed, the host can promise {available_bytes} bytes")]
    Unavailable {
        /// What the VM would take beyond what it has taken.
        need_bytes: u64,
        /// What the host has left, less what is promised to other VMs.
        available_bytes: u64,
    },
    /// The VMs together may not have so much.
    #[error("{total_bytes} bytes for all vms exceed the limit of {limit_bytes} bytes")]
    Limit {
        /// What all VMs would be promised.
        total_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// The host does not tell how much it has.
    #[error("the host does not tell how much memory it has left")]
    Unknown(#[from] io::Error),
}

impl fmt::Debug for HostMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostMemory({} vms)", self.purse.promises().made.len())
    }
}

impl HostMemory {
    /// As much as the host has, and never more than `limit_bytes` for all VMs together.
    pub fn limited_to(limit_bytes: u64) -> Self {
        let purse = Purse {
            limit_bytes: Some(limit_bytes),
            promises: Mutex::default(),
        };
        Self {
            purse: Arc::new(purse),
        }
    }

    /// Promises `bytes` to `vm`, which starts, if the limit allows for them. Whether the host has them is not asked: a
    /// guest takes what it starts with page by page.
    ///
    /// # Errors
    /// [`HostMemoryError::Limit`].
    pub fn promise_start(
        &self,
        bytes: u64,
        huge_pages: bool,
        vm: Arc<dyn Promised>,
    ) -> Result<MemoryPromise, HostMemoryError> {
        let mut promises = self.purse.promises();
        within_limit(promises.made.values(), bytes, self.purse.limit_bytes)?;
        Ok(self.note(&mut promises, bytes, huge_pages, vm))
    }

    /// Takes note of `vm`, which has `bytes`, without a question.
    pub fn promise(&self, bytes: u64, huge_pages: bool, vm: Arc<dyn Promised>) -> MemoryPromise {
        self.note(&mut self.purse.promises(), bytes, huge_pages, vm)
    }

    fn note(
        &self,
        promises: &mut Promises,
        bytes: u64,
        huge_pages: bool,
        vm: Arc<dyn Promised>,
    ) -> MemoryPromise {
        promises.last_id += 1;
        let id = promises.last_id;
        let promise = Promise {
            bytes,
            huge_pages,
            vm,
            waits: false,
        };
        promises.made.insert(id, promise);
        MemoryPromise {
            purse: self.purse.clone(),
            id,
        }
    }
}

impl MemoryPromise {
    /// Raises the promise to `bytes`, if the host has them; a promise that is as large already stays. A VM that is
    /// refused is told when another one gives something back.
    ///
    /// # Errors
    /// [`HostMemoryError`] with what is there; the promise is as before.
    pub fn raise(&self, bytes: u64) -> Result<(), HostMemoryError> {
        let mut promises = self.purse.promises();
        let raised = promises.check(self.id, bytes, self.purse.limit_bytes);
        if let Some(own) = promises.made.get_mut(&self.id) {
            own.waits = raised.is_err();
            if raised.is_ok() {
                own.bytes = own.bytes.max(bytes);
            }
        }
        raised
    }

    /// Sets the promise to `bytes` without a question: memory was given back, or over-commit was asked for.
    pub fn set(&self, bytes: u64) {
        let mut promises = self.purse.promises();
        let Some(own) = promises.made.get_mut(&self.id) else {
            return;
        };
        let before_bytes = std::mem::replace(&mut own.bytes, bytes);
        if bytes < before_bytes {
            promises.tell_waiting();
        }
    }
}

impl Drop for MemoryPromise {
    fn drop(&mut self) {
        let mut promises = self.purse.promises();
        let gone = promises.made.remove(&self.id);
        promises.tell_waiting();
        // The last word of a VM may be to unmap all its memory, and others must not wait for that.
        drop(promises);
        drop(gone);
    }
}

impl Purse {
    fn promises(&self) -> MutexGuard<'_, Promises> {
        self.promises.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Promises {
    /// Checks that promise `id` can be `bytes`. Of another VM counts what it was promised, or what it has if that is
    /// more: a guest can touch memory again that it gave back.
    fn check(&self, id: u64, bytes: u64, limit_bytes: Option<u64>) -> Result<(), HostMemoryError> {
        let Some(own) = self.made.get(&id).filter(|own| own.bytes < bytes) else {
            return Ok(());
        };
        let others = self.made.iter().filter(|(other, _)| **other != id);
        let others: Vec<_> = others.map(|(_, promise)| promise).collect();
        within_limit(others.iter().copied(), bytes, limit_bytes)?;
        let of_same_kind = others.iter().filter(|other| other.huge_pages == own.huge_pages);
        let promised_bytes: u64 = of_same_kind.map(|other| other.untaken(other.bytes)).sum();
        let available_bytes = available_bytes(own.huge_pages)?.saturating_sub(promised_bytes);
        let need_bytes = own.untaken(bytes);
        if need_bytes > available_bytes {
            return Err(HostMemoryError::Unavailable {
                need_bytes,
                available_bytes,
            });
        }
        Ok(())
    }

    /// Tells those who were refused that something was given back.
    fn tell_waiting(&mut self) {
        for promise in self.made.values_mut().filter(|promise| promise.waits) {
            promise.waits = false;
            promise.vm.may_ask_again();
        }
    }
}

/// Checks that `bytes` beside what others hold are within the limit, if there is one.
fn within_limit<'a>(
    others: impl Iterator<Item = &'a Promise>,
    bytes: u64,
    limit_bytes: Option<u64>,
) -> Result<(), HostMemoryError> {
    let Some(limit_bytes) = limit_bytes else {
        return Ok(());
    };
    let held = others.map(|other| other.bytes.max(other.vm.taken_bytes()));
    let total_bytes = held.sum::<u64>().saturating_add(bytes);
    if total_bytes > limit_bytes {
        return Err(HostMemoryError::Limit {
            total_bytes,
            limit_bytes,
        });
    }
    Ok(())
}

impl Promise {
    /// The part of `bytes` that the VM has not taken from the host.
    fn untaken(&self, bytes: u64) -> u64 {
        bytes.saturating_sub(self.vm.taken_bytes())
    }
}

/// What this process could take from the host now, in bytes: of its huge pages, or of its ordinary memory without
/// swapping, within the control groups (v2) that it is in.
fn available_bytes(huge_pages: bool) -> io::Result<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let number = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
        let word = line.and_then(|rest| rest.split_whitespace().next());
        word.and_then(|word| word.parse::<u64>().ok())
    };
    let missing = || io::Error::other("/proc/meminfo lacks a field");
    if huge_pages {
        let free = number("HugePages_Free:").ok_or_else(missing)?;
        let reserved = number("HugePages_Rsvd:").ok_or_else(missing)?;
        return Ok(free.saturating_sub(reserved) * super::region::HUGE_PAGE_BYTES);
    }
    let host_bytes = number("MemAvailable:").ok_or_else(missing)? * 1024;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let left = control_groups(&groups).filter_map(|group| left_in(&group));
    Ok(left.fold(host_bytes, u64::min))
}

/// The folders of the control group (v2) in `/proc/self/cgroup` and of all groups around it.
fn control_groups(text: &str) -> impl Iterator<Item = PathBuf> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
    let path = path.map(|path| Path::new("/sys/fs/cgroup").join(path));
    let groups: Vec<_> = path
        .iter()
        .flat_map(|path| path.ancestors())
        .map(Path::to_owned)
        .collect();
    groups
        .into_iter()
        .filter(|group| group.starts_with("/sys/fs/cgroup"))
}

/// What is left in a control group before its limit; `None` when it has none.
fn left_in(group: &Path) -> Option<u64> {
    let number = |name: &str| {
        fs::read_to_string(group.join(name))
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    };
    let limit_bytes = number("memory.max")?;
    let used_bytes = number("memory.current")?;
    let statistics = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let cache = statistics
        .lines()
        .find_map(|line| line.strip_prefix("inactive_file "));
    let cache_bytes = cache
        .and_then(|text| text.trim().parse::<u64>().ok())
        .unwrap_or(0);
    Some(limit_bytes.saturating_sub(used_bytes.saturating_sub(cache_bytes)))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    const MIB: u64 = 1 << 20;

    /// A VM that has taken so much.
    #[derive(Default)]
    struct Has {
        taken_bytes: AtomicU64,
        told_count: AtomicU64,
    }

    impl Promised for Has {
        fn taken_bytes(&self) -> u64 {
            self.taken_bytes.load(Ordering::Relaxed)
        }

        fn may_ask_again(&self) {
            self.told_count.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn has(taken_bytes: u64) -> Arc<Has> {
        Arc::new(Has {
            taken_bytes: taken_bytes.into(),
            told_count: AtomicU64::default(),
        })
    }

    #[test]
    fn two_vms_are_not_promised_the_same_bytes() {
        let memory = HostMemory::limited_to(64 * MIB);
        let first = memory.promise(16 * MIB, false, has(0));
        let second = memory.promise(16 * MIB, false, has(16 * MIB));
        first.raise(40 * MIB).expect("40 and 16 are below 64");
        let error = second.raise(32 * MIB).expect_err("40 and 32 are above 64");
        let told = format!(
            "{} bytes for all vms exceed the limit of {} bytes",
            72 * MIB,
            64 * MIB
        );
        assert_eq!(error.to_string(), told);
        first.set(32 * MIB);
        second.raise(32 * MIB).expect("32 and 32 are 64");
        second
            .raise(8 * MIB)
            .expect("a promise is not lowered by raising it");
        assert!(
            first.raise(33 * MIB).is_err(),
            "32 are still promised to the other"
        );
        drop(second);
        first.raise(64 * MIB).expect("the other vm is gone");
    }

    #[test]
    fn what_vms_start_with_is_within_the_limit() {
        let memory = HostMemory::limited_to(64 * MIB);
        let first = memory
            .promise_start(48 * MIB, false, has(0))
            .expect("48 are below 64");
        let start = || memory.promise_start(17 * MIB, false, has(0));
        let error = start().err().expect("48 and 17 are above 64");
        assert!(matches!(error, HostMemoryError::Limit { total_bytes, .. } if total_bytes == 65 * MIB));
        drop(memory.promise(17 * MIB, false, has(0)));
        drop(first);
        start().expect("the other vm is gone");
        assert!(memory.promise_start(u64::MAX, false, has(0)).is_err());
    }

    #[test]
    fn what_a_guest_has_beyond_its_promise_counts() {
        let memory = HostMemory::limited_to(64 * MIB);
        let (first, greedy) = (memory.promise(0, false, has(0)), has(16 * MIB));
        let _second = memory.promise(16 * MIB, false, greedy.clone());
        first.raise(48 * MIB).expect("48 and 16 are 64");
        first.set(0);
        greedy.taken_bytes.store(32 * MIB, Ordering::Relaxed);
        let error = first.raise(48 * MIB).expect_err("48 and 32 are above 64");
        assert!(matches!(error, HostMemoryError::Limit { .. }), "{error}");
    }

    #[test]
    fn who_was_refused_is_told_when_something_is_given_back() {
        let memory = HostMemory::limited_to(64 * MIB);
        let waiting = has(0);
        let first = memory.promise(16 * MIB, false, waiting.clone());
        let told_count = || waiting.told_count.load(Ordering::Relaxed);
        let second = memory.promise(48 * MIB, false, has(0));
        second.set(47 * MIB);
        assert_eq!(told_count(), 0, "it was refused nothing");
        first.raise(64 * MIB).expect_err("64 and 47 are above 64");
        second.set(40 * MIB);
        second.set(30 * MIB);
        assert_eq!(told_count(), 1, "it has to ask again first");
        first.raise(64 * MIB).expect_err("64 and 30 are above 64");
        drop(second);
        assert_eq!(told_count(), 2);
        first.raise(64 * MIB).expect("the other vm is gone");
    }

    #[test]
    fn the_last_of_a_vm_goes_when_others_can_ask() {
        struct Asks(HostMemory);
        impl Promised for Asks {
            fn taken_bytes(&self) -> u64 {
                0
            }
            fn may_ask_again(&self) {}
        }
        impl Drop for Asks {
            fn drop(&mut self) {
                drop(self.0.promise(0, false, has(0)));
            }
        }
        let memory = HostMemory::default();
        drop(memory.promise(MIB, false, Arc::new(Asks(memory.clone()))));
    }

    #[test]
    fn what_is_promised_and_not_taken_counts_as_gone() {
        let memory = HostMemory::default();
        let host_bytes = available_bytes(false).expect("the host tells");
        let first = memory.promise(0, false, has(0));
        let second = memory.promise(0, false, has(0));
        first.raise(host_bytes / 2).expect("half is there");
        let error = second
            .raise(host_bytes * 3 / 4)
            .expect_err("the half that is left is less");
        assert!(matches!(error, HostMemoryError::Unavailable { .. }), "{error}");
        let taken = memory.promise(0, false, has(host_bytes));
        taken.raise(host_bytes).expect("it takes nothing more");
    }

    #[test]
    fn a_process_is_bound_by_all_groups_around_it() {
        let groups: Vec<_> = control_groups("1:name=x:/y\n0::/a/b\n").collect();
        let expected = ["/sys/fs/cgroup/a/b", "/sys/fs/cgroup/a", "/sys/fs/cgroup"];
        assert_eq!(groups, expected.map(PathBuf::from));
        assert_eq!(control_groups("").count(), 0);
    }
}
