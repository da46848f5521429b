//! The saved form of a virtio PCI device, frozen per version.
//!
//! Only what a driver can change is written down: limits and offers are the device's own and come from its
//! construction. Everything in it is untrusted on the way back and is checked by the part that takes it over.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::queue_setup::{QueueSetup, RingPosition};
use crate::pci::saved::{SavedConfigSpaceV1, SavedMsixV1};

/// The schema of a virtio PCI device's section.
pub const VIRTIO_PCI_SCHEMA: u32 = 1;

/// A virtio PCI device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedVirtioPciV1 {
    /// The virtio device id (virtio 1.2 §5).
    pub device_type: u16,
    /// `device_feature_select`.
    pub device_feature_select: u32,
    /// `driver_feature_select`.
    pub driver_feature_select: u32,
    /// The features the driver accepted, or was about to.
    pub driver_features: u64,
    /// `device_status`.
    pub status: u8,
    /// `queue_select`.
    pub queue_select: u16,
    /// Every queue, in index order.
    pub queues: Vec<SavedQueueV1>,
    /// Vectors, ISR status and generation.
    pub interrupts: SavedInterruptsV1,
    /// What the guest changed in the configuration space.
    pub config_space: SavedConfigSpaceV1,
    /// The device's own state, in the device's own form.
    pub device: Value,
}

/// One queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedQueueV1 {
    /// `queue_size`.
    pub size: u16,
    /// `queue_enable`.
    pub enabled: bool,
    /// `queue_desc`.
    pub desc_table: u64,
    /// `queue_driver`.
    pub avail_ring: u64,
    /// `queue_device`.
    pub used_ring: u64,
    /// The available entry that is looked at next.
    pub next_avail: u16,
    /// The used entry that is written next.
    pub next_used: u16,
}

/// The interrupts of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedInterruptsV1 {
    /// ISR status.
    pub isr: u8,
    /// `config_generation`.
    pub config_generation: u8,
    /// `config_msix_vector`.
    pub config_vector: u16,
    /// `queue_msix_vector` of every queue.
    pub queue_vectors: Vec<u16>,
    /// The MSI-X vectors.
    pub msix: SavedMsixV1,
}

impl SavedQueueV1 {
    /// Writes a queue down.
    pub fn new(setup: &QueueSetup, position: RingPosition) -> Self {
        let QueueSetup {
            // The device's own, not the guest's.
            size_max: _,
            size,
            enabled,
            desc_table,
            avail_ring,
            used_ring,
        } = *setup;
        let RingPosition {
            next_avail,
            next_used,
        } = position;
        Self {
            size,
            enabled,
            desc_table,
            avail_ring,
            used_ring,
            next_avail,
            next_used,
        }
    }

    /// Reads a queue of a device whose limit is `size_max`. The values are checked when the ring is built.
    pub fn parts(&self, size_max: u16) -> (QueueSetup, RingPosition) {
        let Self {
            size,
            enabled,
            desc_table,
            avail_ring,
            used_ring,
            next_avail,
            next_used,
        } = *self;
        let setup = QueueSetup {
            size_max,
            size,
            enabled,
            desc_table,
            avail_ring,
            used_ring,
        };
        let position = RingPosition {
            next_avail,
            next_used,
        };
        (setup, position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::testing::same_bytes;

    #[test]
    fn schema_1_reads_and_writes_these_bytes() {
        let text = concat!(
            r#"{"device_type":1,"device_feature_select":1,"driver_feature_select":0,"driver_features":4294967296,"status":15,"#,
            r#""queue_select":2,"queues":[{"size":256,"enabled":true,"desc_table":4096,"avail_ring":8192,"used_ring":12288,"#,
            r#""next_avail":7,"next_used":6}],"interrupts":{"isr":1,"config_generation":3,"config_vector":0,"#,
            r#""queue_vectors":[1],"msix":{"vectors":[{"address":4276092928,"data":49,"masked":false,"pending":true}]}},"#,
            r#""config_space":{"4":6,"60":255},"device":{"any":["thing"]}}"#
        );
        same_bytes::<SavedVirtioPciV1>(text);
    }
}
