//! The guest's memory statistics (virtio 1.2 §5.5.6.3): what a driver writes into its buffer.
//!
//! Pure. Every entry is the driver's word; unknown ones are ignored, missing ones stay unknown.

/// The size of `struct virtio_balloon_stat`.
const STAT_BYTES: usize = 10;
/// A buffer of statistics is at most this long.
pub(super) const STATS_BYTES_MAX: usize = 4096;

/// What the guest says of its memory. `None`: its driver does not say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BalloonStats {
    /// Swapped in since its start, in bytes (`VIRTIO_BALLOON_S_SWAP_IN`).
    pub swapped_in_bytes: Option<u64>,
    /// Swapped out since its start, in bytes (`VIRTIO_BALLOON_S_SWAP_OUT`).
    pub swapped_out_bytes: Option<u64>,
    /// Major page faults since its start (`VIRTIO_BALLOON_S_MAJFLT`).
    pub major_fault_count: Option<u64>,
    /// Minor page faults since its start (`VIRTIO_BALLOON_S_MINFLT`).
    pub minor_fault_count: Option<u64>,
    /// Not used for anything, in bytes (`VIRTIO_BALLOON_S_MEMFREE`).
    pub free_bytes: Option<u64>,
    /// All there is, in bytes (`VIRTIO_BALLOON_S_MEMTOT`).
    pub total_bytes: Option<u64>,
    /// What new programs could get without swapping, estimated, in bytes (`VIRTIO_BALLOON_S_AVAIL`).
    pub available_bytes: Option<u64>,
    /// What can be had back quickly without I/O, in bytes (`VIRTIO_BALLOON_S_CACHES`).
    pub cache_bytes: Option<u64>,
    /// Huge pages allocated since its start (`VIRTIO_BALLOON_S_HTLB_PGALLOC`).
    pub huge_page_count: Option<u64>,
    /// Huge pages that could not be allocated since its start (`VIRTIO_BALLOON_S_HTLB_PGFAIL`).
    pub huge_page_failure_count: Option<u64>,
}

impl BalloonStats {
    /// Reads a driver's buffer. An entry that is cut off at the end is ignored.
    pub(super) fn parse(buffer: &[u8]) -> Self {
        let mut stats = Self::default();
        for entry in buffer.chunks_exact(STAT_BYTES) {
            let [t0, t1, value @ ..] = entry else { continue };
            let Ok(value) = <[u8; 8]>::try_from(value) else {
                continue;
            };
            let field = match u16::from_le_bytes([*t0, *t1]) {
                0 => &mut stats.swapped_in_bytes,
                1 => &mut stats.swapped_out_bytes,
                2 => &mut stats.major_fault_count,
                3 => &mut stats.minor_fault_count,
                4 => &mut stats.free_bytes,
                5 => &mut stats.total_bytes,
                6 => &mut stats.available_bytes,
                7 => &mut stats.cache_bytes,
                8 => &mut stats.huge_page_count,
                9 => &mut stats.huge_page_failure_count,
                _ => continue,
            };
            *field = Some(u64::from_le_bytes(value));
        }
        stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(tag: u16, value: u64) -> Vec<u8> {
        [tag.to_le_bytes().as_slice(), &value.to_le_bytes()].concat()
    }

    #[test]
    fn every_tag_has_its_field_and_unknown_ones_none() {
        let mut buffer: Vec<u8> = (0..10)
            .rev()
            .flat_map(|tag| entry(tag, 100 + u64::from(tag)))
            .collect();
        buffer.extend(entry(10, 7));
        buffer.extend(entry(0xFFFF, 7));
        buffer.extend([4, 0, 1]);
        let expected = BalloonStats {
            swapped_in_bytes: Some(100),
            swapped_out_bytes: Some(101),
            major_fault_count: Some(102),
            minor_fault_count: Some(103),
            free_bytes: Some(104),
            total_bytes: Some(105),
            available_bytes: Some(106),
            cache_bytes: Some(107),
            huge_page_count: Some(108),
            huge_page_failure_count: Some(109),
        };
        assert_eq!(BalloonStats::parse(&buffer), expected);
        let few = BalloonStats {
            free_bytes: Some(u64::MAX),
            ..BalloonStats::default()
        };
        assert_eq!(BalloonStats::parse(&entry(4, u64::MAX)), few);
        assert_eq!(BalloonStats::parse(&[]), BalloonStats::default());
    }
}
