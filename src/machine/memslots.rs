//! Memslots: which parts of guest memory the host shows to the guest, registered as guards.
//!
//! KVM offers a limited number of slots, so their numbers are recycled: the lowest free one is taken. A slot keeps
//! the memory behind it mapped; one that the host does not delete keeps it for ever.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_userspace_memory_region;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::HostVm;

/// The memslots of one VM.
#[derive(Clone)]
pub struct Memslots {
    inner: Arc<Inner>,
}

struct Inner {
    vm: Arc<dyn HostVm>,
    slot_count_max: u32,
    used: Mutex<BTreeSet<u32>>,
}

/// Why memory could not be shown to the guest.
#[derive(Debug, thiserror::Error)]
pub enum MemslotError {
    /// Every slot of the host is in use.
    #[error("all {slot_count_max} memslots of the vm are in use")]
    Exhausted {
        /// The number of memslots the host offers.
        slot_count_max: u32,
    },
    /// The range is not inside one region of guest memory.
    #[error("guest memory {address:#x}+{size_bytes:#x} is not inside one region")]
    Range {
        /// The first guest-physical address.
        address: u64,
        /// The length of the range.
        size_bytes: u64,
    },
    /// The host refused the slot.
    #[error("the host refused memslot {slot} for guest memory {address:#x}+{size_bytes:#x}")]
    Host {
        /// The number of the slot.
        slot: u32,
        /// The first guest-physical address.
        address: u64,
        /// The length of the range.
        size_bytes: u64,
        /// The host's error.
        #[source]
        source: io::Error,
    },
}

impl Memslots {
    /// Makes the memslots of `vm`, which offers `slot_count_max` of them.
    pub fn new(vm: Arc<dyn HostVm>, slot_count_max: u32) -> Self {
        Self {
            inner: Arc::new(Inner {
                vm,
                slot_count_max,
                used: Mutex::new(BTreeSet::new()),
            }),
        }
    }

    /// Shows `size_bytes` of `memory` from guest-physical `address` to the guest until the guard is dropped.
    ///
    /// # Errors
    /// [`MemslotError::Range`] when the range is empty or not inside one region, [`MemslotError::Exhausted`] when no
    /// slot is free, [`MemslotError::Host`] when the host refuses it.
    pub fn register(
        &self,
        memory: &Arc<GuestMemoryMmap>,
        address: u64,
        size_bytes: u64,
    ) -> Result<Memslot, MemslotError> {
        let range_error = MemslotError::Range { address, size_bytes };
        let Ok(length) = usize::try_from(size_bytes) else {
            return Err(range_error);
        };
        let host = match memory.get_slice(GuestAddress(address), length) {
            Ok(slice) if length > 0 => slice.ptr_guard_mut().as_ptr() as u64,
            _ => return Err(range_error),
        };
        let slot = self.inner.take()?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: address,
            memory_size: size_bytes,
            userspace_addr: host,
        };
        if let Err(source) = self.inner.vm.set_memslot(region) {
            self.inner.used().remove(&slot);
            return Err(MemslotError::Host {
                slot,
                address,
                size_bytes,
                source,
            });
        }
        Ok(Memslot {
            inner: self.inner.clone(),
            region,
            _memory: memory.clone(),
        })
    }

    /// The number of slots in use.
    pub fn used_count(&self) -> usize {
        self.inner.used().len()
    }
}

impl Inner {
    fn used(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the lowest free slot.
    fn take(&self) -> Result<u32, MemslotError> {
        let mut used = self.used();
        let slot = (0..self.slot_count_max).find(|slot| !used.contains(slot));
        let slot = slot.ok_or(MemslotError::Exhausted {
            slot_count_max: self.slot_count_max,
        })?;
        used.insert(slot);
        Ok(slot)
    }
}

/// A part of guest memory that the guest sees; dropping it takes it away from the guest.
#[must_use = "dropping the guard takes the memory away from the guest"]
pub struct Memslot {
    inner: Arc<Inner>,
    region: kvm_userspace_memory_region,
    _memory: Arc<GuestMemoryMmap>,
}

impl Memslot {
    /// The number of the slot, fixed until it is dropped.
    pub fn slot(&self) -> u32 {
        self.region.slot
    }
}

impl fmt::Debug for Memslot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let region = &self.region;
        write!(
            f,
            "Memslot({} at {:#x}+{:#x})",
            region.slot, region.guest_phys_addr, region.memory_size
        )
    }
}

impl Drop for Memslot {
    fn drop(&mut self) {
        let empty = kvm_userspace_memory_region {
            memory_size: 0,
            ..self.region
        };
        match self.inner.vm.set_memslot(empty) {
            Ok(()) => {
                self.inner.used().remove(&self.region.slot);
            }
            Err(error) => {
                log::error!("memslot {}: cannot delete it: {error}", self.region.slot);
                // The guest still sees this memory under this number: the number stays taken, and the mapping in place
                // for as long as the process lives, so that nothing else ever comes to these addresses.
                std::mem::forget(self._memory.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fake::FakeVm;

    fn memory() -> Arc<GuestMemoryMmap> {
        let ranges = [(GuestAddress(0), 0x4000), (GuestAddress(0x1_0000), 0x4000)];
        Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("small ranges map"))
    }

    #[test]
    fn a_dropped_slot_is_used_again() {
        let vm = Arc::new(FakeVm::default());
        let slots = Memslots::new(vm.clone(), 8);
        let memory = memory();
        let first = slots.register(&memory, 0, 0x1000).expect("slots are free");
        let second = slots.register(&memory, 0x1000, 0x1000).expect("slots are free");
        assert_eq!((first.slot(), second.slot(), vm.memslot_count()), (0, 1, 2));
        drop(first);
        assert_eq!((vm.memslot_count(), slots.used_count()), (1, 1));
        let third = slots.register(&memory, 0x2000, 0x1000).expect("slots are free");
        assert_eq!(third.slot(), 0);
    }

    #[test]
    fn a_slot_that_the_host_does_not_delete_keeps_its_number_and_its_mapping() {
        let vm = Arc::new(FakeVm::default());
        let slots = Memslots::new(vm.clone(), 8);
        let memory = memory();
        let mapping = Arc::downgrade(&memory);
        let kept = slots.register(&memory, 0, 0x1000).expect("slots are free");
        let gone = slots.register(&memory, 0x1000, 0x1000).expect("slots are free");
        drop(memory);
        drop(gone);
        vm.refuse_deletes(true);
        drop(kept);
        assert_eq!((vm.memslot_count(), slots.used_count()), (1, 1));
        assert_eq!(mapping.strong_count(), 1, "the guest still sees the memory");
    }

    #[test]
    fn running_out_names_the_limit() {
        let slots = Memslots::new(Arc::new(FakeVm::default()), 1);
        let memory = memory();
        let _kept = slots.register(&memory, 0, 0x1000).expect("one slot is free");
        let error = slots.register(&memory, 0x1000, 0x1000).expect_err("none is left");
        assert_eq!(error.to_string(), "all 1 memslots of the vm are in use");
    }

    #[test]
    fn a_range_outside_one_region_is_refused_by_address() {
        let slots = Memslots::new(Arc::new(FakeVm::default()), 8);
        for (address, size_bytes) in [(0x3000, 0x2000), (0x8000, 0x1000), (0, 0), (u64::MAX, 2)] {
            let error = slots
                .register(&memory(), address, size_bytes)
                .expect_err("not inside");
            let told = format!("guest memory {address:#x}+{size_bytes:#x} is not inside one region");
            assert_eq!(error.to_string(), told);
        }
        assert_eq!(slots.used_count(), 0);
    }
}
