//! The common configuration structure: the registers a driver sets a device up with (virtio 1.2 §4.1.4.3).
//!
//! [`FIELDS`] is the structure in the specification's order. A field is accessed by its natural width, a 64-bit one
//! also by halves; any other access reads as zero and writes nothing. Writing `device_status` has consequences
//! outside the registers and is handed back to the caller.

use super::interrupts::Interrupts;
use super::queue_setup::QueueSetup;
use crate::virtio::status::{DEVICE_NEEDS_RESET, DRIVER_OK, FEATURES_OK};

/// The fields of `struct virtio_pci_common_cfg`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigMsixVector,
    NumQueues,
    DeviceStatus,
    ConfigGeneration,
    QueueSelect,
    QueueSize,
    QueueMsixVector,
    QueueEnable,
    QueueNotifyOff,
    QueueDesc,
    QueueDriver,
    QueueDevice,
}

/// Offset, width in bytes and name of every field (virtio 1.2 §4.1.4.3).
const FIELDS: [(u64, usize, Field); 16] = [
    (0x00, 4, Field::DeviceFeatureSelect),
    (0x04, 4, Field::DeviceFeature),
    (0x08, 4, Field::DriverFeatureSelect),
    (0x0C, 4, Field::DriverFeature),
    (0x10, 2, Field::ConfigMsixVector),
    (0x12, 2, Field::NumQueues),
    (0x14, 1, Field::DeviceStatus),
    (0x15, 1, Field::ConfigGeneration),
    (0x16, 2, Field::QueueSelect),
    (0x18, 2, Field::QueueSize),
    (0x1A, 2, Field::QueueMsixVector),
    (0x1C, 2, Field::QueueEnable),
    (0x1E, 2, Field::QueueNotifyOff),
    (0x20, 8, Field::QueueDesc),
    (0x28, 8, Field::QueueDriver),
    (0x30, 8, Field::QueueDevice),
];

/// Which bits of a field an access covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    shift_bits: u32,
    mask: u64,
}

/// The registers of one device.
#[derive(Debug)]
pub struct CommonConfig {
    /// The features on offer.
    pub offered_features: u64,
    /// `device_feature_select`.
    pub device_feature_select: u32,
    /// `driver_feature_select`.
    pub driver_feature_select: u32,
    /// `driver_feature`, both halves.
    pub driver_features: u64,
    /// `device_status`.
    pub status: u8,
    /// `queue_select`.
    pub queue_select: u16,
    /// The registers of each queue.
    pub queues: Vec<QueueSetup>,
}

/// What a write to the registers means beyond them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteEffect {
    /// Nothing.
    None,
    /// The driver wrote this to `device_status`.
    Status(u8),
    /// The driver wrote where or when it must not; nothing changed.
    Ignored(&'static str),
}

impl CommonConfig {
    /// The registers after reset of a device that offers `offered_features` and queues of these sizes.
    pub fn new(offered_features: u64, queue_sizes_max: &[u16]) -> Self {
        Self {
            offered_features,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            queue_select: 0,
            queues: queue_sizes_max
                .iter()
                .map(|size| QueueSetup::new(*size))
                .collect(),
        }
    }

    /// Returns every register to its value after reset.
    pub fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.size_max).collect();
        *self = Self::new(self.offered_features, &sizes);
    }

    /// The driver set `DRIVER_OK` and the device can still work.
    pub fn is_ready(&self) -> bool {
        self.status & (DRIVER_OK | DEVICE_NEEDS_RESET) == DRIVER_OK
    }

    /// The driver reads at `offset`.
    pub fn read(&self, offset: u64, data: &mut [u8], interrupts: &Interrupts) {
        data.fill(0);
        if let Some((field, span)) = find(offset, data.len()) {
            let value = (self.field(field, interrupts) & span.mask) >> span.shift_bits;
            let length_bytes = data.len();
            data.copy_from_slice(&value.to_le_bytes()[..length_bytes]);
        }
    }

    /// The driver writes at `offset`.
    pub fn write(&mut self, offset: u64, data: &[u8], interrupts: &Interrupts) -> WriteEffect {
        let Some((field, span)) = find(offset, data.len()) else {
            return WriteEffect::Ignored("an access that is no field of the common configuration");
        };
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let before = self.field(field, interrupts) & !span.mask;
        let value = before | (u64::from_le_bytes(bytes) << span.shift_bits);
        self.set_field(field, value, interrupts)
    }

    fn field(&self, field: Field, interrupts: &Interrupts) -> u64 {
        let queue = self.queues.get(usize::from(self.queue_select));
        match field {
            Field::DeviceFeatureSelect => u64::from(self.device_feature_select),
            Field::DeviceFeature => word_of(self.offered_features, self.device_feature_select),
            Field::DriverFeatureSelect => u64::from(self.driver_feature_select),
            Field::DriverFeature => word_of(self.driver_features, self.driver_feature_select),
            Field::ConfigMsixVector => u64::from(interrupts.config_vector()),
            Field::NumQueues => self.queues.len() as u64,
            Field::DeviceStatus => u64::from(self.status),
            Field::ConfigGeneration => u64::from(interrupts.config_generation()),
            Field::QueueSelect => u64::from(self.queue_select),
            // A queue that does not exist has size 0 (virtio 1.2 §4.1.4.3.1).
            Field::QueueSize => queue.map_or(0, |queue| u64::from(queue.size)),
            Field::QueueMsixVector => u64::from(interrupts.queue_vector(self.queue_select)),
            Field::QueueEnable => u64::from(queue.is_some_and(|queue| queue.enabled)),
            Field::QueueNotifyOff => queue.map_or(0, |_| u64::from(self.queue_select)),
            Field::QueueDesc => queue.map_or(0, |queue| queue.desc_table),
            Field::QueueDriver => queue.map_or(0, |queue| queue.avail_ring),
            Field::QueueDevice => queue.map_or(0, |queue| queue.used_ring),
        }
    }

    fn set_field(&mut self, field: Field, value: u64, interrupts: &Interrupts) -> WriteEffect {
        match field {
            Field::DeviceFeatureSelect => self.device_feature_select = value as u32,
            Field::DriverFeatureSelect => self.driver_feature_select = value as u32,
            Field::DriverFeature => return self.set_driver_feature(value),
            Field::ConfigMsixVector => interrupts.set_config_vector(value as u16),
            Field::DeviceStatus => return WriteEffect::Status(value as u8),
            Field::QueueSelect => self.queue_select = value as u16,
            Field::QueueMsixVector => interrupts.set_queue_vector(self.queue_select, value as u16),
            Field::QueueSize
            | Field::QueueEnable
            | Field::QueueDesc
            | Field::QueueDriver
            | Field::QueueDevice => return self.set_queue_field(field, value),
            Field::DeviceFeature | Field::NumQueues | Field::ConfigGeneration | Field::QueueNotifyOff => {
                return WriteEffect::Ignored("a write to a read-only field");
            }
        }
        WriteEffect::None
    }

    fn set_driver_feature(&mut self, value: u64) -> WriteEffect {
        if self.status & FEATURES_OK != 0 {
            return WriteEffect::Ignored("a write to driver_feature after FEATURES_OK");
        }
        match self.driver_feature_select {
            0 => self.driver_features = (self.driver_features & !0xFFFF_FFFF) | value,
            1 => self.driver_features = (self.driver_features & 0xFFFF_FFFF) | (value << 32),
            // No feature above 63 is offered, so none can be accepted.
            _ if value != 0 => return WriteEffect::Ignored("a feature above 63"),
            _ => {}
        }
        WriteEffect::None
    }

    fn set_queue_field(&mut self, field: Field, value: u64) -> WriteEffect {
        if self.status & DRIVER_OK != 0 {
            return WriteEffect::Ignored("a change of a queue after DRIVER_OK");
        }
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return WriteEffect::Ignored("a change of a queue that does not exist");
        };
        if queue.enabled {
            return WriteEffect::Ignored("a change of a queue after queue_enable");
        }
        match field {
            Field::QueueSize => queue.size = value as u16,
            Field::QueueEnable => match value {
                1 => queue.enabled = true,
                _ => return WriteEffect::Ignored("a value other than 1 in queue_enable"),
            },
            Field::QueueDesc => queue.desc_table = value,
            Field::QueueDriver => queue.avail_ring = value,
            Field::QueueDevice => queue.used_ring = value,
            _ => return WriteEffect::Ignored("a write to a field that is not a queue's"),
        }
        WriteEffect::None
    }
}

/// The 32 bits of a feature set that a select register shows.
fn word_of(features: u64, select: u32) -> u64 {
    match select {
        0 => features & 0xFFFF_FFFF,
        1 => features >> 32,
        _ => 0,
    }
}

/// The field that an access of `length_bytes` at `offset` reaches, and which bits of it.
fn find(offset: u64, length_bytes: usize) -> Option<(Field, Span)> {
    FIELDS.iter().find_map(|&(start, width, field)| {
        let within = offset.checked_sub(start)?;
        let whole = within == 0 && length_bytes == width;
        let half = width == 8 && length_bytes == 4 && (within == 0 || within == 4);
        // Computed only for an access that fits, or the shifts could overflow.
        (whole || half).then(|| {
            let span = Span {
                shift_bits: within as u32 * 8,
                mask: (u64::MAX >> (64 - length_bytes * 8)) << (within * 8),
            };
            (field, span)
        })
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::guest_log::GuestLog;
    use crate::machine::fake::FakeVm;
    use crate::machine::gsi::GsiTable;

    fn interrupts() -> Interrupts {
        let gsi = GsiTable::new(Arc::new(FakeVm::default()));
        Interrupts::new(2, gsi, GuestLog::new("test"))
    }

    fn read(config: &CommonConfig, interrupts: &Interrupts, offset: u64, length_bytes: usize) -> u64 {
        let mut bytes = [0xFF; 8];
        config.read(offset, &mut bytes[..length_bytes], interrupts);
        bytes[length_bytes..].fill(0);
        u64::from_le_bytes(bytes)
    }

    #[test]
    fn the_table_is_in_order_without_gaps() {
        let mut expected = 0;
        for (offset, width, field) in FIELDS {
            assert_eq!(offset, expected, "{field:?}");
            assert!(offset.is_multiple_of(width as u64), "{field:?}");
            expected += width as u64;
        }
        assert_eq!(expected, 0x38);
    }

    #[test]
    fn features_are_shown_and_taken_by_words() {
        let interrupts = interrupts();
        let mut config = CommonConfig::new(0x0000_0003_0000_0005, &[8, 8]);
        for (select, word) in [(0u32, 5), (1, 3), (2, 0), (u32::MAX, 0)] {
            config.write(0x00, &select.to_le_bytes(), &interrupts);
            assert_eq!(read(&config, &interrupts, 0x04, 4), word);
        }
        for (select, word) in [(0u32, 0x11u32), (1, 0x22), (2, 0x33)] {
            config.write(0x08, &select.to_le_bytes(), &interrupts);
            config.write(0x0C, &word.to_le_bytes(), &interrupts);
        }
        assert_eq!(config.driver_features, 0x0000_0022_0000_0011);
        config.status = FEATURES_OK;
        config.write(0x08, &[0; 4], &interrupts);
        let late = config.write(0x0C, &[0xFF; 4], &interrupts);
        assert_eq!(
            late,
            WriteEffect::Ignored("a write to driver_feature after FEATURES_OK")
        );
        assert_eq!(config.driver_features, 0x0000_0022_0000_0011);
    }

    #[test]
    fn a_64_bit_address_is_written_in_halves_or_at_once() {
        let interrupts = interrupts();
        let mut config = CommonConfig::new(0, &[8, 8]);
        config.write(0x16, &1u16.to_le_bytes(), &interrupts);
        config.write(0x20, &0x5566_7780u32.to_le_bytes(), &interrupts);
        config.write(0x24, &0x1122_3344u32.to_le_bytes(), &interrupts);
        config.write(0x30, &0x99u64.to_le_bytes(), &interrupts);
        assert_eq!(config.queues[1].desc_table, 0x1122_3344_5566_7780);
        assert_eq!(read(&config, &interrupts, 0x20, 8), 0x1122_3344_5566_7780);
        assert_eq!(read(&config, &interrupts, 0x24, 4), 0x1122_3344);
        assert_eq!(config.queues[1].used_ring, 0x99);
        assert_eq!(config.queues[0], QueueSetup::new(8));
    }

    #[test]
    fn only_the_natural_width_reaches_a_field() {
        let interrupts = interrupts();
        let mut config = CommonConfig::new(u64::MAX, &[8]);
        for (offset, length) in [
            (0x04, 1),
            (0x05, 4),
            (0x12, 4),
            (0x14, 2),
            (0x22, 4),
            (0x38, 2),
            (0x1000, 4),
        ] {
            assert_eq!(
                read(&config, &interrupts, offset, length),
                0,
                "{length} at {offset:#x}"
            );
            let effect = config.write(offset, &vec![1; length], &interrupts);
            assert!(
                matches!(effect, WriteEffect::Ignored(_)),
                "{length} at {offset:#x}"
            );
        }
        assert_eq!(config.write(0x14, &[3], &interrupts), WriteEffect::Status(3));
        assert_eq!(config.status, 0, "the caller decides");
    }

    #[test]
    fn a_queue_that_does_not_exist_reads_as_unavailable_and_an_enabled_one_is_fixed() {
        let interrupts = interrupts();
        let mut config = CommonConfig::new(0, &[8, 16]);
        config.write(0x16, &2u16.to_le_bytes(), &interrupts);
        assert_eq!(read(&config, &interrupts, 0x18, 2), 0);
        assert_eq!(read(&config, &interrupts, 0x1A, 2), 0xFFFF);
        let effect = config.write(0x1C, &1u16.to_le_bytes(), &interrupts);
        assert_eq!(
            effect,
            WriteEffect::Ignored("a change of a queue that does not exist")
        );
        config.write(0x16, &1u16.to_le_bytes(), &interrupts);
        assert_eq!(read(&config, &interrupts, 0x18, 2), 16);
        assert_eq!(read(&config, &interrupts, 0x1E, 2), 1);
        let effect = config.write(0x1C, &2u16.to_le_bytes(), &interrupts);
        assert_eq!(
            effect,
            WriteEffect::Ignored("a value other than 1 in queue_enable")
        );
        config.write(0x1C, &1u16.to_le_bytes(), &interrupts);
        let effect = config.write(0x18, &4u16.to_le_bytes(), &interrupts);
        assert_eq!(
            effect,
            WriteEffect::Ignored("a change of a queue after queue_enable")
        );
        assert_eq!((config.queues[1].size, config.queues[1].enabled), (16, true));
        config.status = DRIVER_OK;
        config.write(0x16, &0u16.to_le_bytes(), &interrupts);
        let effect = config.write(0x1C, &1u16.to_le_bytes(), &interrupts);
        assert_eq!(
            effect,
            WriteEffect::Ignored("a change of a queue after DRIVER_OK")
        );
    }
}
