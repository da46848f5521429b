//! One queue as the driver sets it up, before it becomes a ring in a device's hands (virtio 1.2 §4.1.4.3).
//!
//! The driver's values are kept as written, so that it reads back what it wrote, and are checked when the device is
//! activated: [`QueueSetup::build`] is the only way from here to a ring.

use virtio_queue::{Queue, QueueState};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// The registers of one queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueSetup {
    /// The largest size the device offers, a power of two.
    pub size_max: u16,
    /// `queue_size`.
    pub size: u16,
    /// `queue_enable`.
    pub enabled: bool,
    /// `queue_desc`: the descriptor table.
    pub desc_table: u64,
    /// `queue_driver`: the available ring.
    pub avail_ring: u64,
    /// `queue_device`: the used ring.
    pub used_ring: u64,
}

/// How far both rings have been worked through; zero for a fresh queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RingPosition {
    /// The available entry that is looked at next.
    pub next_avail: u16,
    /// The used entry that is written next.
    pub next_used: u16,
}

/// Why a queue cannot work as the driver set it up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueueSetupError {
    /// The size is zero, not a power of two or above the device's limit.
    #[error("size {size} is not a power of two up to {size_max}")]
    Size { size: u16, size_max: u16 },
    /// The address is zero or not aligned as its part of the ring must be.
    #[error("the {part} at {address:#x} has no address aligned to {align_bytes} bytes")]
    Address {
        part: &'static str,
        address: u64,
        align_bytes: u64,
    },
    /// A part of the ring is not in guest memory.
    #[error("the {part} at {address:#x}+{length_bytes:#x} is outside guest memory")]
    OutsideMemory {
        part: &'static str,
        address: u64,
        length_bytes: u64,
    },
}

impl QueueSetup {
    /// The registers of a queue after reset: the largest size, disabled, nowhere.
    pub const fn new(size_max: u16) -> Self {
        Self {
            size_max,
            size: size_max,
            enabled: false,
            desc_table: 0,
            avail_ring: 0,
            used_ring: 0,
        }
    }

    /// Makes the ring at `position`, with notification suppression by index if `event_idx`.
    ///
    /// # Errors
    /// [`QueueSetupError`] when the driver's values cannot work in `memory`.
    pub fn build(
        &self,
        position: RingPosition,
        event_idx: bool,
        memory: &GuestMemoryMmap,
    ) -> Result<Queue, QueueSetupError> {
        let entries = u64::from(self.size);
        // virtio 1.2 §2.7: 16 bytes per descriptor, 2 per available and 8 per used entry, three 16-bit words a ring.
        self.check("descriptor table", self.desc_table, 16, 16 * entries, memory)?;
        self.check("available ring", self.avail_ring, 2, 6 + 2 * entries, memory)?;
        self.check("used ring", self.used_ring, 4, 6 + 8 * entries, memory)?;
        let state = QueueState {
            max_size: self.size_max,
            next_avail: position.next_avail,
            next_used: position.next_used,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: true,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        };
        // The addresses are aligned, so only the size can be wrong.
        Queue::try_from(state).map_err(|_| QueueSetupError::Size {
            size: self.size,
            size_max: self.size_max,
        })
    }

    /// Checks one part of the ring. `virtio-queue` checks the same, but tells the log about it without a limit.
    fn check(
        &self,
        part: &'static str,
        address: u64,
        align_bytes: u64,
        length_bytes: u64,
        memory: &GuestMemoryMmap,
    ) -> Result<(), QueueSetupError> {
        if address == 0 || !address.is_multiple_of(align_bytes) {
            return Err(QueueSetupError::Address {
                part,
                address,
                align_bytes,
            });
        }
        if !memory.check_range(GuestAddress(address), length_bytes as usize) {
            return Err(QueueSetupError::OutsideMemory {
                part,
                address,
                length_bytes,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::QueueT;

    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).expect("64 KiB are free")
    }

    fn setup() -> QueueSetup {
        QueueSetup {
            size: 8,
            enabled: true,
            desc_table: 0x1000,
            avail_ring: 0x2000,
            used_ring: 0x3000,
            ..QueueSetup::new(16)
        }
    }

    fn refusal(setup: &QueueSetup) -> String {
        let built = setup.build(RingPosition::default(), false, &memory());
        built.expect_err("it cannot work").to_string()
    }

    #[test]
    fn a_good_set_up_becomes_a_ring_at_its_position() {
        let position = RingPosition {
            next_avail: 0xFFFF,
            next_used: 0xFFFE,
        };
        let queue = setup().build(position, true, &memory()).expect("it can work");
        let state = queue.state();
        assert_eq!(
            (state.size, state.max_size, state.event_idx_enabled),
            (8, 16, true)
        );
        assert_eq!(
            (state.next_avail, state.next_used, state.ready),
            (0xFFFF, 0xFFFE, true)
        );
        assert!(queue.is_valid(&memory()));
    }

    #[test]
    fn the_last_byte_of_memory_can_be_used_and_not_passed() {
        let mut setup = setup();
        setup.used_ring = 0x1_0000 - 72;
        setup
            .build(RingPosition::default(), false, &memory())
            .expect("70 bytes fit");
        setup.used_ring = 0x1_0000 - 68;
        assert_eq!(
            refusal(&setup),
            "the used ring at 0xffbc+0x46 is outside guest memory"
        );
    }

    #[test]
    fn a_bad_set_up_is_refused_by_name_and_limit() {
        let with = |change: fn(&mut QueueSetup)| {
            let mut setup = setup();
            change(&mut setup);
            refusal(&setup)
        };
        assert_eq!(with(|q| q.size = 0), "size 0 is not a power of two up to 16");
        assert_eq!(with(|q| q.size = 12), "size 12 is not a power of two up to 16");
        assert_eq!(with(|q| q.size = 32), "size 32 is not a power of two up to 16");
        assert_eq!(
            with(|q| q.desc_table = 0x1008),
            "the descriptor table at 0x1008 has no address aligned to 16 bytes"
        );
        assert_eq!(
            with(|q| q.avail_ring = 0),
            "the available ring at 0x0 has no address aligned to 2 bytes"
        );
        assert_eq!(
            with(|q| q.desc_table = u64::MAX - 15),
            "the descriptor table at 0xfffffffffffffff0+0x80 is outside guest memory"
        );
    }
}
