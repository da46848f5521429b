//! Runtime memory: the region behind the RAM whose blocks come and go while the guest runs (virtio 1.2 §5.15).
//!
//! The region is cut into slots. A slot is live while any block in it is plugged: only then it is mapped, only then the
//! guest sees it, and only then devices reach it. A guest that touches memory of a slot without plugged blocks finds
//! nothing there and costs the host nothing.
//!
//! ```text
//! first block plugged     map ─ memslot ─ devices
//! last block unplugged    devices ─ memslot ─ give the pages back
//! ```
//! A device that is still at work in a slot that went away keeps its mapping until it is done; what it wrote meanwhile
//! is given back the next time anybody plugs, unplugs or asks.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};

use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use super::file::{memory_file, punch, resident_bytes};
use super::layout::{RUNTIME_MEMORY_ALIGN_BYTES, runtime_memory_base};
use super::region::{GuestRam, PAGE_BYTES, RamError, RamOptions, RamRange, check_end, map};
use crate::machine::memslots::{Memslot, MemslotError, Memslots};

/// Memory is plugged and unplugged in blocks of this size.
pub const BLOCK_BYTES: u64 = 2 << 20;
/// The most slots of a region: a region that is larger has larger slots.
pub const SLOT_COUNT_MAX: u64 = 1024;

/// The region of one VM.
pub struct RuntimeMemory {
    base: u64,
    size_bytes: u64,
    slot_bytes: u64,
    options: RamOptions,
    file: Arc<File>,
    memslots: Memslots,
    /// What devices see: the RAM and the live slots.
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    slots: Mutex<Slots>,
    /// For those who must not wait for `slots`; written under it.
    live_bytes: AtomicU64,
}

#[derive(Default)]
struct Slots {
    live: BTreeMap<u64, LiveSlot>,
    /// Slots that a device was still at work in when they went away.
    retired: Vec<(u64, Weak<GuestRegionMmap>)>,
}

/// A slot with plugged blocks. The memslot goes before the mapping.
struct LiveSlot {
    /// Whether each of its blocks is plugged.
    plugged: Vec<bool>,
    _memslot: Memslot,
    region: Arc<GuestRegionMmap>,
}

impl LiveSlot {
    /// Marks the blocks of a range, which lies in the slot and begins `start` bytes behind its beginning.
    fn mark(&mut self, start: u64, length_bytes: u64, plugged: bool) {
        let blocks = start / BLOCK_BYTES..(start + length_bytes).div_ceil(BLOCK_BYTES);
        for block in blocks {
            self.plugged[block as usize] = plugged;
        }
    }
}

/// Why blocks cannot be plugged. Nothing has been plugged.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The range is not in the region.
    #[error("runtime memory {offset:#x}+{length_bytes:#x} is not in the region of {size_bytes:#x} bytes")]
    Range {
        /// Where the range begins in the region.
        offset: u64,
        /// Its length.
        length_bytes: u64,
        /// The size of the region.
        size_bytes: u64,
    },
    /// The host has no memslot for it.
    #[error(transparent)]
    Memslot(#[from] MemslotError),
    /// The host refused the mapping.
    #[error("the host refused a mapping for runtime memory at {address:#x}")]
    Map {
        /// The guest-physical address of the slot.
        address: u64,
        /// The host's error.
        #[source]
        source: io::Error,
    },
}

impl RuntimeMemory {
    /// Makes a region of `size_bytes`, a multiple of [`RUNTIME_MEMORY_ALIGN_BYTES`], behind `ram`. Nothing in it is
    /// plugged, and it costs nothing.
    ///
    /// # Errors
    /// [`RamError`] when the guest could not address its end or the host refuses the file.
    pub fn new(
        ram: &GuestRam,
        size_bytes: u64,
        options: RamOptions,
        address_bits: u32,
        memslots: Memslots,
    ) -> Result<Self, RamError> {
        let base = runtime_memory_base(ram.size_bytes());
        Self::check(ram, size_bytes, address_bits)?;
        let file = memory_file(size_bytes, options.huge_pages).map_err(|source| RamError::Host {
            what: "a memory file",
            size_bytes,
            source,
        })?;
        Ok(Self {
            base,
            size_bytes,
            slot_bytes: slot_bytes(size_bytes),
            options,
            file: Arc::new(file),
            memslots,
            memory: GuestMemoryAtomic::from(ram.memory().clone()),
            slots: Mutex::default(),
            live_bytes: AtomicU64::new(0),
        })
    }

    /// Checks that a guest with `ram` could address the end of a region of `size_bytes`.
    ///
    /// # Errors
    /// [`RamError::BeyondAddress`].
    pub fn check(ram: &GuestRam, size_bytes: u64, address_bits: u32) -> Result<(), RamError> {
        let end = runtime_memory_base(ram.size_bytes()).saturating_add(size_bytes);
        check_end(size_bytes, end, address_bits)
    }

    /// The first guest-physical address.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// The size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Guest memory as devices use it: the RAM and what is plugged.
    pub fn memory(&self) -> &GuestMemoryAtomic<GuestMemoryMmap> {
        &self.memory
    }

    /// Makes `length_bytes` from `offset` on, multiples of [`BLOCK_BYTES`] and none of them plugged, part of the guest's
    /// memory. They read as zeros, but for huge pages in a slot that the guest has had all the time.
    ///
    /// # Errors
    /// [`PlugError`]; nothing has changed then.
    pub fn plug(&self, offset: u64, length_bytes: u64) -> Result<(), PlugError> {
        let mut slots = self.slots();
        if let Err(error) = self.sweep(&mut slots) {
            log::warn!("runtime memory is not given back: {error}");
        }
        let pieces = self.pieces(offset, length_bytes)?;
        let mut fresh = BTreeMap::new();
        for &(index, _, _) in &pieces {
            if !slots.live.contains_key(&index) {
                fresh.insert(index, self.make_live(index)?);
            }
        }
        self.show(fresh.values().map(|slot| &slot.region));
        for (index, slot) in fresh {
            self.live_bytes.fetch_add(slot.region.len(), Ordering::Release);
            slots.live.insert(index, slot);
        }
        for (index, start, piece_bytes) in pieces {
            if let Some(slot) = slots.live.get_mut(&index) {
                slot.mark(start % self.slot_bytes, piece_bytes, true);
            }
        }
        Ok(())
    }

    /// Takes `length_bytes` from `offset` on, multiples of [`BLOCK_BYTES`] and plugged or not, away from the guest and
    /// gives them back to the host; huge pages when their whole slot is unplugged, because a page of a mapped slot that
    /// is given back is no longer reserved.
    ///
    /// # Errors
    /// The host's error when it does not take the pages back. The guest has lost them all the same.
    pub fn unplug(&self, offset: u64, length_bytes: u64) -> io::Result<()> {
        let mut slots = self.slots();
        let mut result = self.sweep(&mut slots);
        let pieces = self.pieces(offset, length_bytes).map_err(io::Error::other)?;
        for (index, start, piece_bytes) in pieces {
            let Some(slot) = slots.live.get_mut(&index) else {
                continue;
            };
            slot.mark(start % self.slot_bytes, piece_bytes, false);
            let given_back = if !slot.plugged.contains(&true) {
                self.retire(&mut slots, index)
            } else if self.options.huge_pages {
                Ok(())
            } else {
                punch(&self.file, start, piece_bytes)
            };
            result = result.and(given_back);
        }
        result
    }

    /// Takes everything away, as a power cycle does.
    ///
    /// # Errors
    /// The host's error when it does not take the pages back. The guest has lost them all the same.
    pub fn clear(&self) -> io::Result<()> {
        let mut slots = self.slots();
        let live: Vec<_> = slots.live.keys().copied().collect();
        let results = live.into_iter().map(|index| self.retire(&mut slots, index));
        let result = results.fold(Ok(()), Result::and);
        result.and(punch(&self.file, 0, self.size_bytes))
    }

    /// Gives the whole pages of `address..address + length_bytes` that are in the region back to the host, though they
    /// stay the guest's; huge pages are kept. The range may come from the guest.
    ///
    /// # Errors
    /// The host's error.
    pub fn discard(&self, address: u64, length_bytes: u64) -> io::Result<()> {
        if self.options.huge_pages {
            return Ok(());
        }
        let end = address
            .saturating_add(length_bytes)
            .min(self.base + self.size_bytes);
        let start = address.max(self.base).next_multiple_of(PAGE_BYTES);
        let end = end - end % PAGE_BYTES;
        if start < end {
            punch(&self.file, start - self.base, end - start)?;
        }
        Ok(())
    }

    /// What the region costs the host at this moment, in bytes. Does not wait for slots that come or go meanwhile.
    ///
    /// # Errors
    /// The host's error.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        match self.slots.try_lock() {
            Ok(mut slots) => self.sweep(&mut slots)?,
            Err(TryLockError::Poisoned(slots)) => self.sweep(&mut slots.into_inner())?,
            // Whoever has them sweeps.
            Err(TryLockError::WouldBlock) => {}
        }
        resident_bytes(&self.file)
    }

    /// How much of the region the guest sees, in bytes: the slots with plugged blocks, whole. Never waits.
    pub fn live_bytes(&self) -> u64 {
        self.live_bytes.load(Ordering::Acquire)
    }

    /// The size of a slot in bytes.
    pub fn slot_bytes(&self) -> u64 {
        self.slot_bytes
    }

    /// The number of slots that the guest sees.
    pub fn live_slot_count(&self) -> usize {
        self.slots().live.len()
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts a range at the borders of slots: index of the slot, start in the region, length.
    fn pieces(&self, offset: u64, length_bytes: u64) -> Result<Vec<(u64, u64, u64)>, PlugError> {
        let end = offset.checked_add(length_bytes);
        let Some(end) = end.filter(|end| *end <= self.size_bytes) else {
            return Err(PlugError::Range {
                offset,
                length_bytes,
                size_bytes: self.size_bytes,
            });
        };
        let (mut pieces, mut start) = (Vec::new(), offset);
        while start < end {
            let index = start / self.slot_bytes;
            let piece_end = end.min((index + 1) * self.slot_bytes);
            pieces.push((index, start, piece_end - start));
            start = piece_end;
        }
        Ok(pieces)
    }

    /// The slot's place: first offset in the region and length.
    fn place(&self, index: u64) -> (u64, u64) {
        let start = index * self.slot_bytes;
        (start, self.slot_bytes.min(self.size_bytes - start))
    }

    /// Maps a slot and shows it to the guest.
    fn make_live(&self, index: u64) -> Result<LiveSlot, PlugError> {
        let (start, size_bytes) = self.place(index);
        let range = RamRange {
            guest_address: self.base + start,
            size_bytes,
            file_offset: start,
        };
        let refused = |source| PlugError::Map {
            address: range.guest_address,
            source,
        };
        let region = Arc::new(map(&self.file, range, self.options).map_err(refused)?);
        let alone = GuestMemoryMmap::from_arc_regions(vec![region.clone()]);
        let alone = Arc::new(alone.map_err(|error| refused(io::Error::other(error)))?);
        let memslot = self.memslots.register(&alone, range.guest_address, size_bytes)?;
        Ok(LiveSlot {
            plugged: vec![false; (size_bytes / BLOCK_BYTES) as usize],
            _memslot: memslot,
            region,
        })
    }

    /// Shows slots to devices.
    fn show<'r>(&self, regions: impl Iterator<Item = &'r Arc<GuestRegionMmap>>) {
        for region in regions {
            let now = self.memory.memory().into_inner();
            match now.insert_region(region.clone()) {
                Ok(with) => self.replace(with),
                // Slots do not meet each other, and the RAM ends before the first.
                Err(error) => log::error!("devices do not reach runtime memory: {error}"),
            }
        }
    }

    /// Takes a live slot away from devices and guest, and gives its pages back.
    fn retire(&self, slots: &mut Slots, index: u64) -> io::Result<()> {
        let Some(slot) = slots.live.remove(&index) else {
            return Ok(());
        };
        let now = self.memory.memory().into_inner();
        match now.remove_region(GuestAddress(slot.region.start_addr().0), slot.region.len()) {
            Ok((without, _)) => self.replace(without),
            Err(error) => log::error!("devices still reach runtime memory: {error}"),
        }
        drop(now);
        let at_work = Arc::downgrade(&slot.region);
        self.live_bytes.fetch_sub(slot.region.len(), Ordering::Release);
        drop(slot);
        if at_work.strong_count() > 0 {
            slots.retired.push((index, at_work));
        }
        let (start, length_bytes) = self.place(index);
        punch(&self.file, start, length_bytes)
    }

    /// Gives back what devices wrote into slots that had gone away already.
    fn sweep(&self, slots: &mut Slots) -> io::Result<()> {
        let done = slots
            .retired
            .extract_if(.., |(_, at_work)| at_work.strong_count() == 0);
        let done: Vec<_> = done.collect();
        for (index, _) in done {
            // A slot that came back meanwhile holds what its guest wrote.
            if !slots.live.contains_key(&index) {
                let (start, length_bytes) = self.place(index);
                punch(&self.file, start, length_bytes)?;
            }
        }
        Ok(())
    }

    fn replace(&self, memory: GuestMemoryMmap) {
        let lock = self.memory.lock();
        lock.unwrap_or_else(PoisonError::into_inner).replace(memory);
    }
}

/// The size of a slot of a region of `region_bytes`.
fn slot_bytes(region_bytes: u64) -> u64 {
    let share = region_bytes.div_ceil(SLOT_COUNT_MAX);
    share.div_ceil(RUNTIME_MEMORY_ALIGN_BYTES).next_power_of_two() * RUNTIME_MEMORY_ALIGN_BYTES
}

#[cfg(test)]
mod tests;
