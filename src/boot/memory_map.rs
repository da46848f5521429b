//! The memory map that the guest is given: where RAM is, and where it must not look for free addresses.
//!
//! One map for both boot protocols, whose types agree (ACPI 6.5 §15.4, Xen `start_info.h`). The windows of devices are
//! not in it: the guest learns them from ACPI.

use crate::memory::layout::{EBDA_START, ECAM_BASE, ECAM_SEGMENT_BYTES, HIGH_MEMORY_START, SEGMENT_COUNT};
use crate::memory::region::RamRange;

/// What an address range is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum MapKind {
    /// `E820_TYPE_RAM`, `XEN_HVM_MEMMAP_TYPE_RAM`.
    Ram = 1,
    /// `E820_TYPE_RESERVED`, `XEN_HVM_MEMMAP_TYPE_RESERVED`.
    Reserved = 2,
}

/// One range of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MapRange {
    pub(super) address: u64,
    pub(super) size_bytes: u64,
    pub(super) kind: MapKind,
}

/// Makes the map for RAM in `ranges`, the first of which begins at 0 and reaches above 1 MiB. In address order.
pub(super) fn memory_map(ranges: &[RamRange]) -> Vec<MapRange> {
    let between = |start: u64, end: u64, kind| MapRange {
        address: start,
        size_bytes: end.saturating_sub(start),
        kind,
    };
    let mut map = Vec::with_capacity(ranges.len() + 3);
    for range in ranges {
        let end = range.guest_address + range.size_bytes;
        if range.guest_address == 0 {
            map.push(between(0, EBDA_START, MapKind::Ram));
            // The ACPI tables are here.
            map.push(between(EBDA_START, HIGH_MEMORY_START, MapKind::Reserved));
            map.push(between(HIGH_MEMORY_START, end, MapKind::Ram));
        } else {
            map.push(between(range.guest_address, end, MapKind::Ram));
        }
    }
    // Linux uses the ECAM only where the map reserves it (PCI Firmware 3.3 §4.1.2).
    let ecam_end = ECAM_BASE + u64::from(SEGMENT_COUNT) * ECAM_SEGMENT_BYTES;
    map.push(between(ECAM_BASE, ecam_end, MapKind::Reserved));
    map.sort_by_key(|range| range.address);
    map
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::layout::{HIGH_RAM_START, LOW_RAM_END};

    fn ranges(size_bytes: u64) -> Vec<RamRange> {
        let low = size_bytes.min(LOW_RAM_END);
        let range = |guest_address, size_bytes, file_offset| RamRange {
            guest_address,
            size_bytes,
            file_offset,
        };
        let mut ranges = vec![range(0, low, 0)];
        if size_bytes > low {
            ranges.push(range(HIGH_RAM_START, size_bytes - low, low));
        }
        ranges
    }

    #[test]
    fn the_map_of_a_small_guest() {
        let kinds: Vec<_> = memory_map(&ranges(256 << 20))
            .iter()
            .map(|range| (range.address, range.size_bytes, range.kind))
            .collect();
        assert_eq!(
            kinds,
            [
                (0, 0x9_FC00, MapKind::Ram),
                (0x9_FC00, 0x6_0400, MapKind::Reserved),
                (0x10_0000, 0x0FF0_0000, MapKind::Ram),
                (0xE000_0000, 0x40_0000, MapKind::Reserved),
            ]
        );
    }

    proptest! {
        #[test]
        fn ranges_are_in_order_and_ram_is_all_there(mib in 64u64..=65536) {
            let map = memory_map(&ranges(mib << 20));
            for pair in map.windows(2) {
                prop_assert!(pair[0].address + pair[0].size_bytes <= pair[1].address);
            }
            let ram: u64 = map.iter().filter(|r| r.kind == MapKind::Ram).map(|r| r.size_bytes).sum();
            prop_assert_eq!(ram, (mib << 20) - (HIGH_MEMORY_START - EBDA_START));
            let in_hole = |r: &&MapRange| r.address < HIGH_RAM_START && r.address + r.size_bytes > LOW_RAM_END;
            prop_assert!(map.iter().filter(in_hole).all(|r| r.kind == MapKind::Reserved));
        }
    }
}
