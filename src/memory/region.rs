//! Guest RAM: one file in memory, mapped into this process and shown to the guest around the 32-bit hole.
//!
//! ```text
//! file     0 ............. 3 GiB ......... end
//! guest    0 ... LOW_RAM_END     HIGH_RAM_START ...
//! ```
//!
//! Pages are taken from the host when the guest first touches them. A file rather than anonymous memory, because
//! its holes can be punched and counted, and because other processes can be given it.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::file::{host_memory_bytes, memory_file, punch, resident_bytes};
use super::layout::{HIGH_RAM_START, LOW_RAM_END};
use crate::machine::memslots::{Memslot, MemslotError, Memslots};

/// The least RAM a VM can have, in bytes.
pub const RAM_MIN_BYTES: u64 = 64 << 20;
/// RAM is a multiple of this, in bytes.
pub const RAM_GRANULE_BYTES: u64 = 1 << 20;
/// The size of a huge page; RAM made of them is a multiple of it.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;
/// The size in bytes of a page of the others.
pub(super) const PAGE_BYTES: u64 = 4096;

/// How guest RAM is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RamOptions {
    /// Takes the RAM from the host's pool of 2 MiB pages (hugetlb), all of it reserved at once.
    pub huge_pages: bool,
}

/// One piece of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// The first guest-physical address.
    pub guest_address: u64,
    /// The length in bytes.
    pub size_bytes: u64,
    /// Where the piece begins in the file.
    pub file_offset: u64,
}

/// The RAM of one VM. The host takes it back when the last user of [`GuestRam::memory`] is gone.
#[derive(Debug)]
pub struct GuestRam {
    memory: Arc<GuestMemoryMmap>,
    file: Arc<File>,
    ranges: Vec<RamRange>,
    huge_pages: bool,
}

/// Why RAM cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The size is not a multiple of the granule.
    #[error("ram of {size_bytes} bytes is not a multiple of {granule_bytes} bytes")]
    Granule {
        /// What was asked for.
        size_bytes: u64,
        /// The granule.
        granule_bytes: u64,
    },
    /// The size is below the least possible one.
    #[error("ram of {size_bytes} bytes is below the minimum of {min_bytes} bytes")]
    TooSmall {
        /// What was asked for.
        size_bytes: u64,
        /// The minimum.
        min_bytes: u64,
    },
    /// The host does not have that much.
    #[error("ram of {size_bytes} bytes exceeds the host's memory of {host_bytes} bytes")]
    BeyondHost {
        /// What was asked for.
        size_bytes: u64,
        /// The host's memory.
        host_bytes: u64,
    },
    /// The guest could not address its end.
    #[error(
        "ram of {size_bytes} bytes ends at {end:#x}, beyond the {address_bits} address bits of the guest"
    )]
    BeyondAddress {
        /// What was asked for.
        size_bytes: u64,
        /// The first guest-physical address behind the RAM.
        end: u64,
        /// The number of guest-physical address bits.
        address_bits: u32,
    },
    /// The host refused a step.
    #[error("the host refused {what} for ram of {size_bytes} bytes")]
    Host {
        /// The step.
        what: &'static str,
        /// What was asked for.
        size_bytes: u64,
        /// The host's error.
        #[source]
        source: io::Error,
    },
}

impl GuestRam {
    /// Makes `size_bytes` of RAM, all zero, for a guest with `address_bits` guest-physical address bits
    /// (`Kvm::physical_address_bits`).
    ///
    /// # Errors
    /// [`RamError`] when the size is impossible, with the limit, or when the host refuses.
    pub fn new(size_bytes: u64, options: RamOptions, address_bits: u32) -> Result<Self, RamError> {
        let host_error = |what| {
            move |source| RamError::Host {
                what,
                size_bytes,
                source,
            }
        };
        let host_bytes = host_memory_bytes().map_err(host_error("to tell its memory"))?;
        check(size_bytes, options, address_bits, host_bytes)?;
        let file = memory_file(size_bytes, options.huge_pages).map_err(host_error("a memory file"))?;
        let file = Arc::new(file);
        let ranges = split(size_bytes);
        let mut regions = Vec::with_capacity(ranges.len());
        for range in &ranges {
            let region = map(&file, *range, options).map_err(host_error("a mapping"))?;
            regions.push(region);
        }
        let memory = GuestMemoryMmap::from_regions(regions)
            .map_err(|error| host_error("the guest's address map")(io::Error::other(error)))?;
        Ok(Self {
            memory: Arc::new(memory),
            file,
            ranges,
            huge_pages: options.huge_pages,
        })
    }

    /// The RAM as devices use it.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.memory
    }

    /// The pieces of the RAM, in address order.
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    /// The size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.size_bytes).sum()
    }

    /// The first guest-physical address behind the RAM below 4 GiB.
    pub fn low_end(&self) -> u64 {
        self.size_bytes().min(LOW_RAM_END)
    }

    /// What the RAM costs the host at this moment, in bytes.
    ///
    /// # Errors
    /// The host's error.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        resident_bytes(&self.file)
    }

    /// Makes the RAM all zero, as a power cycle does, and gives it back to the host, but for huge pages, which are kept:
    /// a page that is given back is no longer reserved, and without one the guest's next access would kill this process.
    /// Called while no vCPU runs and no device uses it.
    ///
    /// # Errors
    /// The host's error; the content is then unspecified.
    pub fn clear(&self) -> io::Result<()> {
        if self.huge_pages {
            return self.write_zeros();
        }
        punch(&self.file, 0, self.size_bytes())
    }

    /// Gives the whole pages in `address..address + length_bytes` that are RAM back to the host: they read as zeros
    /// until the guest writes to them again. Huge pages are kept, as in [`GuestRam::clear`]. The range may come from the
    /// guest.
    ///
    /// # Errors
    /// The host's error; a part may be given back.
    pub fn discard(&self, address: u64, length_bytes: u64) -> io::Result<()> {
        if self.huge_pages {
            return Ok(());
        }
        let end = address.saturating_add(length_bytes);
        for range in &self.ranges {
            let start = address.max(range.guest_address);
            let end = end.min(range.guest_address + range.size_bytes);
            let start = start.next_multiple_of(PAGE_BYTES);
            let end = end - end % PAGE_BYTES;
            if start < end {
                let offset = start - range.guest_address + range.file_offset;
                punch(&self.file, offset, end - start)?;
            }
        }
        Ok(())
    }

    fn write_zeros(&self) -> io::Result<()> {
        let zeros = vec![0; HUGE_PAGE_BYTES as usize];
        for range in &self.ranges {
            // RAM of huge pages is a multiple of them, and so is the end of the RAM below the hole.
            for offset in (0..range.size_bytes).step_by(zeros.len()) {
                let address = GuestAddress(range.guest_address + offset);
                let written = self.memory.write_slice(&zeros, address);
                written.map_err(io::Error::other)?;
            }
        }
        Ok(())
    }

    /// The file behind the RAM, for those who read or share it; [`GuestRam::ranges`] tells what lies where.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Shows the RAM to the guest until the slots are dropped.
    ///
    /// # Errors
    /// [`MemslotError`] when the host has no slot left or refuses one.
    pub fn plug_in(&self, slots: &Memslots) -> Result<Vec<Memslot>, MemslotError> {
        let register = |range: &RamRange| slots.register(&self.memory, range.guest_address, range.size_bytes);
        self.ranges.iter().map(register).collect()
    }
}

/// Checks a size against all limits.
fn check(size_bytes: u64, options: RamOptions, address_bits: u32, host_bytes: u64) -> Result<(), RamError> {
    let granule_bytes = if options.huge_pages {
        HUGE_PAGE_BYTES
    } else {
        RAM_GRANULE_BYTES
    };
    if !size_bytes.is_multiple_of(granule_bytes) {
        return Err(RamError::Granule {
            size_bytes,
            granule_bytes,
        });
    }
    if size_bytes < RAM_MIN_BYTES {
        return Err(RamError::TooSmall {
            size_bytes,
            min_bytes: RAM_MIN_BYTES,
        });
    }
    if size_bytes > host_bytes {
        return Err(RamError::BeyondHost {
            size_bytes,
            host_bytes,
        });
    }
    check_end(size_bytes, guest_end(size_bytes), address_bits)
}

/// Checks that the guest can address memory of `size_bytes` up to `end`.
pub(super) fn check_end(size_bytes: u64, end: u64, address_bits: u32) -> Result<(), RamError> {
    if address_bits < u64::BITS && end > 1 << address_bits {
        return Err(RamError::BeyondAddress {
            size_bytes,
            end,
            address_bits,
        });
    }
    Ok(())
}

/// The first guest-physical address behind RAM of `size_bytes`, at most the host's memory.
fn guest_end(size_bytes: u64) -> u64 {
    match size_bytes.checked_sub(LOW_RAM_END) {
        None | Some(0) => size_bytes,
        Some(high) => HIGH_RAM_START.saturating_add(high),
    }
}

/// Lays RAM around the 32-bit hole.
fn split(size_bytes: u64) -> Vec<RamRange> {
    let low = RamRange {
        guest_address: 0,
        size_bytes: size_bytes.min(LOW_RAM_END),
        file_offset: 0,
    };
    let high = RamRange {
        guest_address: HIGH_RAM_START,
        size_bytes: size_bytes - low.size_bytes,
        file_offset: low.size_bytes,
    };
    let mut ranges = vec![low];
    if high.size_bytes > 0 {
        ranges.push(high);
    }
    ranges
}

/// Maps one piece of the file.
pub(super) fn map(file: &Arc<File>, range: RamRange, options: RamOptions) -> io::Result<GuestRegionMmap> {
    let length = usize::try_from(range.size_bytes).map_err(io::Error::other)?;
    // Huge pages are reserved by the mapping: without them, a guest's access would kill this process.
    let no_reserve = if options.huge_pages {
        0
    } else {
        libc::MAP_NORESERVE
    };
    let mapping = MmapRegionBuilder::new(length)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | no_reserve)
        .with_file_offset(FileOffset::from_arc(file.clone(), range.file_offset))
        .with_hugetlbfs(options.huge_pages)
        .build()
        .map_err(|error| match error {
            MmapRegionError::Mmap(error) => error,
            other => io::Error::other(other),
        })?;
    advise(mapping.as_ptr(), length, libc::MADV_DONTDUMP)?;
    if !options.huge_pages && range.file_offset.is_multiple_of(HUGE_PAGE_BYTES) {
        // A host that keeps no huge pages for files refuses; small pages work as well.
        let _ = advise(mapping.as_ptr(), length, libc::MADV_HUGEPAGE);
    }
    GuestRegionMmap::new(mapping, GuestAddress(range.guest_address))
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EOVERFLOW))
}

fn advise(address: *mut u8, length: usize, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: the range is one mapping of our own, and both pieces of advice change no content.
    if unsafe { libc::madvise(address.cast(), length, advice) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    use super::*;
    use crate::machine::fake::FakeVm;

    #[test]
    fn impossible_sizes_are_refused_with_both_numbers() {
        let none = RamOptions::default();
        let huge = RamOptions { huge_pages: true };
        let gib = 1 << 30;
        for (size_bytes, options, address_bits, told) in [
            (
                gib + 4096,
                none,
                36,
                "ram of 1073745920 bytes is not a multiple of 1048576 bytes",
            ),
            (
                gib + (1 << 20),
                huge,
                36,
                "ram of 1074790400 bytes is not a multiple of 2097152 bytes",
            ),
            (
                1 << 20,
                none,
                36,
                "ram of 1048576 bytes is below the minimum of 67108864 bytes",
            ),
            (
                0,
                none,
                36,
                "ram of 0 bytes is below the minimum of 67108864 bytes",
            ),
            (
                64 * gib,
                none,
                46,
                "ram of 68719476736 bytes exceeds the host's memory of 34359738368 bytes",
            ),
            (
                4 * gib,
                none,
                32,
                "ram of 4294967296 bytes ends at 0x140000000, beyond the 32 address bits of the guest",
            ),
        ] {
            let error = check(size_bytes, options, address_bits, 32 * gib).expect_err(told);
            assert_eq!(error.to_string(), told);
        }
        check(3 * gib, none, 32, 32 * gib).expect("it ends at the hole");
    }

    #[test]
    fn ram_costs_what_was_touched_and_nothing_after_a_clear() {
        let ram = GuestRam::new(RAM_MIN_BYTES, RamOptions::default(), 36).expect("64 MiB are there");
        assert_eq!(ram.resident_bytes().expect("the file has metadata"), 0);
        let middle = GuestAddress(RAM_MIN_BYTES / 2);
        ram.memory().write_obj(7u64, middle).expect("in ram");
        let resident_bytes = ram.resident_bytes().expect("the file has metadata");
        assert!(
            (4096..=HUGE_PAGE_BYTES).contains(&resident_bytes),
            "{resident_bytes}"
        );
        ram.clear().expect("a memory file has holes");
        assert_eq!(ram.resident_bytes().expect("the file has metadata"), 0);
        assert_eq!(ram.memory().read_obj::<u64>(middle).expect("in ram"), 0);
    }

    #[test]
    fn large_pages_line_up_in_the_guest_and_the_host() {
        let ram = GuestRam::new(LOW_RAM_END + HUGE_PAGE_BYTES, RamOptions::default(), 40)
            .expect("untouched ram costs nothing");
        for range in ram.ranges() {
            let host = ram.memory().get_host_address(GuestAddress(range.guest_address));
            let host = host.expect("in ram") as u64;
            assert_eq!(host % HUGE_PAGE_BYTES, range.guest_address % HUGE_PAGE_BYTES);
        }
    }

    #[test]
    fn ram_above_the_hole_is_a_region_of_its_own() {
        let size_bytes = LOW_RAM_END + RAM_GRANULE_BYTES;
        let ram = GuestRam::new(size_bytes, RamOptions::default(), 40).expect("untouched ram costs nothing");
        let regions: Vec<_> = ram
            .memory()
            .iter()
            .map(|region| (region.start_addr().0, region.len()))
            .collect();
        assert_eq!(regions, [(0, LOW_RAM_END), (HIGH_RAM_START, RAM_GRANULE_BYTES)]);
        let vm = Arc::new(FakeVm::default());
        let slots = ram
            .plug_in(&Memslots::new(vm.clone(), 2))
            .expect("two are enough");
        assert_eq!(vm.memslot_count(), 2);
        drop(slots);
        assert_eq!(vm.memslot_count(), 0);
        assert_eq!((ram.low_end(), ram.size_bytes()), (LOW_RAM_END, size_bytes));
    }

    proptest! {
        #[test]
        fn the_pieces_cover_the_file_and_stay_out_of_the_hole(mib in 64u64..=65536) {
            let ranges = split(mib << 20);
            let mut offset = 0;
            for range in &ranges {
                prop_assert_eq!(range.file_offset, offset);
                offset += range.size_bytes;
                let end = range.guest_address + range.size_bytes;
                prop_assert!(end <= LOW_RAM_END || range.guest_address >= HIGH_RAM_START);
            }
            prop_assert_eq!(offset, mib << 20);
            let last = ranges[ranges.len() - 1];
            prop_assert_eq!(guest_end(mib << 20), last.guest_address + last.size_bytes);
        }
    }
}
