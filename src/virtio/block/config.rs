//! What the driver is told of a disk: feature bits (virtio 1.2 §5.2.3) and configuration space (§5.2.4).
//!
//! All of it follows from the backend's properties and the number of queues, and never changes. Nothing in it can be
//! written: the cache mode is fixed (`VIRTIO_BLK_F_CONFIG_WCE` is not offered).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use crate::storage::{DiskProperties, SECTOR_BYTES};

/// The size of every queue.
pub(super) const QUEUE_SIZE: u16 = 256;
/// The most data segments of a request (`seg_max`): a chain of a full queue less the header and the status.
pub(super) const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// The largest data segment (`size_max`), in bytes.
pub(super) const SIZE_MAX_BYTES: u32 = 256 << 10;
/// The most data of one request, which follows from the two before.
pub(super) const REQUEST_BYTES_MAX: u32 = SEG_MAX * SIZE_MAX_BYTES;
/// The longest discard (`max_discard_sectors`): 2 GiB.
pub(super) const DISCARD_SECTORS_MAX: u32 = 1 << 22;
/// The longest clear (`max_write_zeroes_sectors`): 64 MiB, because the host may have to write every byte of it.
pub(super) const WRITE_ZEROES_SECTORS_MAX: u32 = 1 << 17;
/// Ranges in one discard or clear (`max_discard_seg`, `max_write_zeroes_seg`).
const SEGMENTS_PER_CLEAR: u32 = 1;
/// The length of `struct virtio_blk_config` up to the last field in use.
const CONFIG_BYTES: usize = 60;

/// The configuration space of a disk.
pub(super) struct ConfigSpace([u8; CONFIG_BYTES]);

impl ConfigSpace {
    /// Lays the fields out.
    pub(super) fn new(disk: &DiskProperties, queue_count: u16) -> Self {
        let mut space = Self([0; CONFIG_BYTES]);
        let blocks_per_physical = disk.physical_block_bytes / disk.logical_block_bytes;
        space.put(0, &(disk.capacity_bytes / SECTOR_BYTES).to_le_bytes()); // capacity
        space.put(8, &SIZE_MAX_BYTES.to_le_bytes()); // size_max
        space.put(12, &SEG_MAX.to_le_bytes()); // seg_max
        // 16: geometry, not offered
        space.put(20, &disk.logical_block_bytes.to_le_bytes()); // blk_size
        space.put(24, &[blocks_per_physical.trailing_zeros() as u8]); // topology.physical_block_exp
        // 25: topology.alignment_offset, 0
        space.put(26, &1u16.to_le_bytes()); // topology.min_io_size, in blocks
        // 28: topology.opt_io_size, 0: none suggested; 32: writeback, not offered
        space.put(34, &queue_count.to_le_bytes()); // num_queues
        if disk.discard {
            // Smaller discards free nothing on the host.
            let alignment = disk.physical_block_bytes / SECTOR_BYTES as u32;
            space.put(36, &DISCARD_SECTORS_MAX.to_le_bytes()); // max_discard_sectors
            space.put(40, &SEGMENTS_PER_CLEAR.to_le_bytes()); // max_discard_seg
            space.put(44, &alignment.to_le_bytes()); // discard_sector_alignment
        }
        if disk.write_zeroes {
            space.put(48, &WRITE_ZEROES_SECTORS_MAX.to_le_bytes()); // max_write_zeroes_sectors
            space.put(52, &SEGMENTS_PER_CLEAR.to_le_bytes()); // max_write_zeroes_seg
            space.put(56, &[u8::from(disk.discard)]); // write_zeroes_may_unmap
        }
        space
    }

    /// Reads at `offset`; what lies past the end stays as it is.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let Some(rest) = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.0.get(offset..))
        else {
            return;
        };
        let length = rest.len().min(data.len());
        data[..length].copy_from_slice(&rest[..length]);
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

/// The device's feature bits.
pub(super) fn features(disk: &DiskProperties, queue_count: u16) -> u64 {
    let bits = [
        (VIRTIO_BLK_F_SIZE_MAX, true),
        (VIRTIO_BLK_F_SEG_MAX, true),
        (VIRTIO_BLK_F_BLK_SIZE, true),
        (VIRTIO_BLK_F_TOPOLOGY, true),
        (VIRTIO_BLK_F_FLUSH, true),
        (VIRTIO_BLK_F_RO, disk.read_only),
        (VIRTIO_BLK_F_MQ, queue_count > 1),
        (VIRTIO_BLK_F_DISCARD, disk.discard),
        (VIRTIO_BLK_F_WRITE_ZEROES, disk.write_zeroes),
    ];
    bits.iter()
        .filter(|(_, offered)| *offered)
        .fold(0, |features, (bit, _)| features | 1 << bit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: DiskProperties = DiskProperties {
        capacity_bytes: 0x12_3456 * 512,
        read_only: false,
        logical_block_bytes: 1024,
        physical_block_bytes: 4096,
        discard: true,
        write_zeroes: true,
    };

    fn word(space: &ConfigSpace, offset: u64) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_fields_are_where_the_standard_has_them() {
        let space = ConfigSpace::new(&DISK, 3);
        let fields = [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56].map(|at| word(&space, at));
        let expected = [
            0x12_3456,
            0,
            262_144,
            254,
            0,
            1024,
            0x0001_0002,
            0,
            3 << 16,
            4_194_304,
            1,
            8,
            131_072,
            1,
            1,
        ];
        assert_eq!(fields, expected);
    }

    #[test]
    fn reads_past_the_end_leave_the_bytes_alone() {
        let space = ConfigSpace::new(&DISK, 1);
        let mut data = [0x55; 8];
        space.read(56, &mut data);
        assert_eq!(data, [1, 0, 0, 0, 0x55, 0x55, 0x55, 0x55]);
        for offset in [60, 61, 1 << 40, u64::MAX] {
            let mut data = [0x55; 8];
            space.read(offset, &mut data);
            assert_eq!(data, [0x55; 8], "offset {offset:#x}");
        }
    }

    #[test]
    fn features_follow_the_disk() {
        assert_eq!(features(&DISK, 1), 0b110_0110_0100_0110);
        let read_only = DiskProperties {
            read_only: true,
            discard: false,
            write_zeroes: false,
            ..DISK
        };
        assert_eq!(features(&read_only, 4), 0b001_0110_0110_0110);
    }
}
