//! What lies where in BAR 0, and the capabilities that say so (virtio 1.2 §4.1.4).
//!
//! ```text
//! 0x0000 common configuration      0x3000 notifications, 4 bytes per queue
//! 0x1000 ISR status                0x4000 MSI-X table
//! 0x2000 device configuration      0x5000 MSI-X pending bits          size 0x8000
//! ```
//! Each part has a page of its own, so that a guest can map each as it likes.

use crate::pci::capability::{Capability, CapabilityError};
use crate::pci::config_space::{ConfigSpace, Identity};
use crate::virtio::device::DeviceType;
use crate::virtio::spec::{
    VIRTIO_PCI_CAP_COMMON_CFG, VIRTIO_PCI_CAP_DEVICE_CFG, VIRTIO_PCI_CAP_ISR_CFG, VIRTIO_PCI_CAP_NOTIFY_CFG,
    VIRTIO_PCI_CAP_PCI_CFG, VIRTIO_PCI_DEVICE_ID_BASE, VIRTIO_PCI_REVISION_ID, VIRTIO_PCI_VENDOR_ID,
};

/// The size of BAR 0.
pub const BAR_BYTES: u32 = 0x8000;
/// The bytes between the notification addresses of two queues (`notify_off_multiplier`).
pub const NOTIFY_OFF_MULTIPLIER: u32 = 4;
/// The most queues a device can have: one vector each and one for the configuration fill the MSI-X table's page.
pub const QUEUE_COUNT_MAX: u16 = 255;

const COMMON_OFFSET: u32 = 0x0000;
const ISR_OFFSET: u32 = 0x1000;
const DEVICE_OFFSET: u32 = 0x2000;
const NOTIFY_OFFSET: u32 = 0x3000;
const MSIX_TABLE_OFFSET: u32 = 0x4000;
const MSIX_PBA_OFFSET: u32 = 0x5000;
const PART_BYTES: u64 = 0x1000;

/// The length of the common configuration structure (virtio 1.2 §4.1.4.3, without the fields of features not offered).
const COMMON_BYTES: u32 = 0x38;
/// The length of the ISR status structure (virtio 1.2 §4.1.4.5).
const ISR_BYTES: u32 = 1;

/// The parts of BAR 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Common,
    Isr,
    Device,
    Notify,
    MsixTable,
    MsixPba,
}

/// The part that an access of `length_bytes` at `offset` falls into, and its offset there; `None` outside every part.
pub fn part(offset: u64, length_bytes: usize) -> Option<(Part, u64)> {
    let part = match u32::try_from(offset - offset % PART_BYTES).ok()? {
        COMMON_OFFSET => Part::Common,
        ISR_OFFSET => Part::Isr,
        DEVICE_OFFSET => Part::Device,
        NOTIFY_OFFSET => Part::Notify,
        MSIX_TABLE_OFFSET => Part::MsixTable,
        MSIX_PBA_OFFSET => Part::MsixPba,
        _ => return None,
    };
    let within = offset % PART_BYTES;
    (within + length_bytes as u64 <= PART_BYTES).then_some((part, within))
}

/// The notification address of queue `queue_index` in a BAR at `bar_address`.
pub fn notify_address(bar_address: u64, queue_index: u16) -> u64 {
    bar_address + u64::from(NOTIFY_OFFSET) + u64::from(queue_index) * u64::from(NOTIFY_OFF_MULTIPLIER)
}

/// The offsets of the two capabilities that the transport looks at after a write.
#[derive(Debug, Clone, Copy)]
pub struct CapabilityOffsets {
    /// The MSI-X capability.
    pub msix: u16,
    /// The configuration access capability.
    pub pci_cfg: u16,
}

/// The configuration space of a device of `device_type` with `queue_count` queues, its BAR at `bar_address` at
/// power-on.
///
/// # Errors
/// [`CapabilityError`] when the capabilities do not fit, which no device causes.
pub fn config_space(
    device_type: DeviceType,
    queue_count: u16,
    bar_address: u32,
) -> Result<(ConfigSpace, CapabilityOffsets), CapabilityError> {
    let device_id = VIRTIO_PCI_DEVICE_ID_BASE + device_type as u16;
    let mut space = ConfigSpace::new(Identity {
        vendor_id: VIRTIO_PCI_VENDOR_ID,
        device_id,
        revision_id: VIRTIO_PCI_REVISION_ID,
        class_code: class_code(device_type),
        subsystem_vendor_id: VIRTIO_PCI_VENDOR_ID,
        subsystem_id: device_id,
    });
    space.define_bar0(bar_address, BAR_BYTES);
    let msix = Capability::msix(queue_count + 1, MSIX_TABLE_OFFSET, MSIX_PBA_OFFSET);
    let msix = space.add_capability(&msix)?;
    let notify_bytes = u32::from(queue_count).max(1) * NOTIFY_OFF_MULTIPLIER;
    let multiplier = NOTIFY_OFF_MULTIPLIER.to_le_bytes();
    for (cfg_type, offset, length_bytes, tail) in [
        (VIRTIO_PCI_CAP_COMMON_CFG, COMMON_OFFSET, COMMON_BYTES, &[][..]),
        (VIRTIO_PCI_CAP_ISR_CFG, ISR_OFFSET, ISR_BYTES, &[]),
        (VIRTIO_PCI_CAP_DEVICE_CFG, DEVICE_OFFSET, PART_BYTES as u32, &[]),
        (
            VIRTIO_PCI_CAP_NOTIFY_CFG,
            NOTIFY_OFFSET,
            notify_bytes,
            &multiplier,
        ),
    ] {
        let body = structure(cfg_type, offset, length_bytes, tail);
        space.add_capability(&Capability::vendor_specific(&body, &[]))?;
    }
    // The driver writes bar, offset, length and data of the access it wants (virtio 1.2 §4.1.4.9).
    let body = structure(VIRTIO_PCI_CAP_PCI_CFG, 0, 0, &[0; 4]);
    let mut writable = structure(0, u32::MAX, u32::MAX, &[0xFF; 4]);
    writable[1] = 0xFF;
    let pci_cfg = space.add_capability(&Capability::vendor_specific(&body, &writable))?;
    let offsets = CapabilityOffsets {
        msix: u16::from(msix),
        pci_cfg: u16::from(pci_cfg),
    };
    Ok((space, offsets))
}

/// `struct virtio_pci_cap` after its length byte: type, BAR 0, id 0, two bytes of padding, offset, length, and what
/// the type adds (virtio 1.2 §4.1.4).
fn structure(cfg_type: u8, offset: u32, length_bytes: u32, tail: &[u8]) -> Vec<u8> {
    let mut body = vec![cfg_type, 0, 0, 0, 0];
    body.extend_from_slice(&offset.to_le_bytes());
    body.extend_from_slice(&length_bytes.to_le_bytes());
    body.extend_from_slice(tail);
    body
}

/// The class code that names the device to a guest without a driver (PCI 3.0 appendix D).
const fn class_code(device_type: DeviceType) -> u32 {
    match device_type {
        DeviceType::Net => 0x02_0000,
        // Mass storage controller, other.
        DeviceType::Block => 0x01_8000,
        // Simple communication controller, other.
        DeviceType::Console => 0x07_8000,
        // Fits no defined class.
        DeviceType::Rng | DeviceType::Balloon | DeviceType::Mem => 0xFF_0000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout::MMIO_SLOT_BYTES;

    #[test]
    fn an_access_belongs_to_one_part_or_to_none() {
        assert_eq!(part(0x0014, 1), Some((Part::Common, 0x14)));
        assert_eq!(part(0x1000, 1), Some((Part::Isr, 0)));
        assert_eq!(part(0x2FF8, 8), Some((Part::Device, 0xFF8)));
        assert_eq!(part(0x2FFC, 8), None, "it crosses into the next part");
        assert_eq!(part(0x6000, 4), None);
        assert_eq!(part(0x1_0000_0000, 1), None);
        assert_eq!(notify_address(0xC000_0000, 3), 0xC000_300C);
        assert!(u64::from(BAR_BYTES) <= MMIO_SLOT_BYTES);
    }

    /// Walks the list as a driver does and returns (type, bar, offset, length, capability length) of each structure.
    fn structures(space: &ConfigSpace) -> Vec<(u8, u8, u32, u32, u8)> {
        let mut found = Vec::new();
        let mut offset = space.word(0x34) & 0xFF;
        while offset != 0 {
            let header = space.dword(offset).to_le_bytes();
            if header[0] == 0x09 {
                let bar = space.word(offset + 4) as u8;
                let (start, length) = (space.dword(offset + 8), space.dword(offset + 12));
                found.push((header[3], bar, start, length, header[2]));
            }
            offset = u16::from(header[1]);
        }
        found
    }

    #[test]
    fn a_driver_finds_every_structure_behind_its_capability() {
        let (space, offsets) = config_space(DeviceType::Net, 3, 0xC008_0000).expect("it fits");
        assert_eq!(
            structures(&space),
            [
                (1, 0, 0x0000, 0x38, 16),
                (3, 0, 0x1000, 1, 16),
                (4, 0, 0x2000, 0x1000, 16),
                (2, 0, 0x3000, 12, 20),
                (5, 0, 0, 0, 20),
            ]
        );
        assert_eq!(space.dword(0), 0x1041_1AF4);
        assert_eq!(space.dword(8), 0x0200_0001);
        assert_eq!(space.dword(offsets.msix) >> 16, 3, "four vectors");
        assert_eq!(
            (space.dword(offsets.msix + 4), space.dword(offsets.msix + 8)),
            (0x4000, 0x5000)
        );
        assert_eq!(space.word(0x3C) >> 8, 0, "no interrupt pin");
    }

    #[test]
    fn only_the_access_window_of_the_last_capability_can_be_written() {
        let (mut space, offsets) = config_space(DeviceType::Block, 1, 0xC008_0000).expect("it fits");
        let before: Vec<u32> = (0x40..0x100)
            .step_by(4)
            .map(|offset| space.dword(offset))
            .collect();
        for offset in (0x40..0x100).step_by(4) {
            space.write(offset, &[0xFF; 4]);
        }
        let changed: Vec<u16> = (0x40..0x100)
            .step_by(4)
            .filter(|offset| space.dword(*offset) != before[usize::from((offset - 0x40) / 4)])
            .collect();
        let cfg = offsets.pci_cfg;
        assert_eq!(changed, [offsets.msix, cfg + 4, cfg + 8, cfg + 12, cfg + 16]);
        assert_eq!(space.dword(cfg + 4), 0xFF, "the bar number only");
    }
}
