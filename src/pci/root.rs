//! All PCI segments of a VM: their ECAMs on the bus, their host bridges and the choice of a slot.
//!
//! As a unit it holds what the guest wrote into the host bridges; which device sits where is configuration, not
//! state, and every device is a unit of its own.

use std::fmt;
use std::sync::Arc;

use serde_json::{Value, json};

use super::host_bridge::{HostBridge, PciSegment};
use super::saved::{PCI_ROOT_SCHEMA, SavedPciRootV1};
use super::slots::{OccupiedSlot, SlotError, SlotReservation, Slots};
use crate::bus::{Bus, BusClaim, BusError};
use crate::ids::{Bdf, IdError, UnitName};
use crate::memory::layout::{ECAM_SEGMENT_BYTES, SEGMENT_COUNT, ecam_address};
use crate::unit::{PauseTicket, RestoreError, SaveError, Section, Unit};

/// The PCI segments of a VM. Dropping it takes their ECAMs off the bus.
pub struct PciRoot {
    name: UnitName,
    segments: Vec<Segment>,
}

struct Segment {
    slots: Slots,
    host_bridge: Arc<HostBridge>,
    _bridge_slot: OccupiedSlot,
    _ecam: BusClaim,
}

/// Why the PCI segments could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PciRootError {
    /// Another device answers where an ECAM belongs.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A slot that belongs to a host bridge is taken.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The unit's name is not valid.
    #[error(transparent)]
    Name(#[from] IdError),
}

impl fmt::Debug for PciRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PciRoot({} segments)", self.segments.len())
    }
}

impl PciRoot {
    /// Makes every segment of the machine, each with its host bridge in slot 0, and puts the ECAMs on `mmio`.
    ///
    /// # Errors
    /// [`PciRootError::Bus`] when an ECAM's addresses are taken.
    pub fn new(mmio: &Bus) -> Result<Self, PciRootError> {
        let mut segments = Vec::with_capacity(usize::from(SEGMENT_COUNT));
        for bdf in (0..SEGMENT_COUNT).filter_map(|segment| Bdf::new(segment, 0)) {
            let slots = Slots::new(bdf.segment());
            let host_bridge = Arc::new(HostBridge::new());
            let bridge_slot = slots.reserve(bdf)?.occupy(host_bridge.clone());
            let ecam = Arc::new(PciSegment::new(slots.clone()));
            segments.push(Segment {
                slots,
                host_bridge,
                _bridge_slot: bridge_slot,
                _ecam: mmio.claim(ecam_address(bdf), ECAM_SEGMENT_BYTES, ecam)?,
            });
        }
        Ok(Self {
            name: UnitName::new("pci")?,
            segments,
        })
    }

    /// Reserves the slot at `bdf`.
    ///
    /// # Errors
    /// [`SlotError::NoSegment`] when the machine has no such segment, [`SlotError::Taken`].
    pub fn reserve(&self, bdf: Bdf) -> Result<SlotReservation, SlotError> {
        let segment = self.segments.get(usize::from(bdf.segment()));
        let segment = segment.ok_or(SlotError::NoSegment {
            bdf,
            segment_count: SEGMENT_COUNT,
        })?;
        segment.slots.reserve(bdf)
    }

    /// Reserves the first free slot: segments in order, then slots in order.
    ///
    /// # Errors
    /// [`SlotError::Full`] when there is none.
    pub fn reserve_free(&self) -> Result<SlotReservation, SlotError> {
        let free = self
            .segments
            .iter()
            .find_map(|segment| segment.slots.reserve_free());
        free.ok_or(SlotError::Full {
            slot_count: self.segments.len() * usize::from(Bdf::SLOT_COUNT - 1),
        })
    }

    /// The slots of `segment`, for those who ask which of them are occupied.
    pub fn slots(&self, segment: u16) -> Option<&Slots> {
        self.segments
            .get(usize::from(segment))
            .map(|segment| &segment.slots)
    }
}

impl Unit for PciRoot {
    fn name(&self) -> UnitName {
        self.name.clone()
    }

    fn reset(&self) {
        for segment in &self.segments {
            segment.host_bridge.reset();
        }
    }

    fn pause(&self, ticket: PauseTicket) {
        // The bridges never have anything in flight.
        drop(ticket);
    }

    fn resume(&self) {}

    fn save(&self) -> Result<Section, SaveError> {
        let bridges = self.segments.iter().map(|segment| segment.host_bridge.save());
        let saved = SavedPciRootV1 {
            host_bridges: bridges.collect(),
        };
        Section::encode(PCI_ROOT_SCHEMA, &saved)
    }

    fn restore(&self, section: &Section) -> Result<(), RestoreError> {
        let SavedPciRootV1 { host_bridges } = section.decode(PCI_ROOT_SCHEMA)?;
        if host_bridges.len() != self.segments.len() {
            return Err(RestoreError::Value {
                field: "host_bridges",
                value: host_bridges.len().to_string(),
                reason: "the machine has another number of segments",
            });
        }
        for (segment, saved) in self.segments.iter().zip(&host_bridges) {
            segment.host_bridge.restore(saved)?;
        }
        Ok(())
    }

    fn inspect(&self) -> Value {
        let mut occupied = Vec::new();
        for segment in &self.segments {
            let slots = (0..Bdf::SLOT_COUNT).filter(|slot| segment.slots.device(*slot).is_some());
            occupied.extend(slots.filter_map(|slot| Bdf::new(segment.slots.segment(), slot)));
        }
        json!({ "occupied": occupied })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(mmio: &Bus, bdf: Bdf, offset: u64) -> u32 {
        let mut data = [0; 4];
        assert!(
            mmio.read(ecam_address(bdf) + offset, &mut data),
            "the ecam answers"
        );
        u32::from_le_bytes(data)
    }

    fn bdf(segment: u16, slot: u8) -> Bdf {
        Bdf::new(segment, slot).expect("slots go to 31")
    }

    #[test]
    fn every_segment_shows_its_bridge_and_nothing_else() {
        let mmio = Bus::new();
        let root = PciRoot::new(&mmio).expect("the bus is empty");
        for segment in 0..SEGMENT_COUNT {
            assert_eq!(read(&mmio, bdf(segment, 0), 0), 0x0008_1B36);
            assert_eq!(read(&mmio, bdf(segment, 0), 8) >> 8, 0x06_0000);
            assert_eq!(read(&mmio, bdf(segment, 0), 0x34), 0, "no capabilities");
            for slot in 1..32 {
                assert_eq!(read(&mmio, bdf(segment, slot), 0), u32::MAX);
            }
        }
        let mut wide = [0; 8];
        assert!(mmio.read(ecam_address(bdf(0, 0)), &mut wide));
        assert_eq!(wide, [0xFF; 8]);
        drop(root);
        assert_eq!(mmio.range_count(), 0);
    }

    #[test]
    fn slots_are_chosen_in_order_over_all_segments_and_refused_by_name() {
        let root = PciRoot::new(&Bus::new()).expect("the bus is empty");
        let explicit = root.reserve(bdf(0, 2)).expect("free");
        let mut held = vec![
            root.reserve_free().expect("free"),
            root.reserve_free().expect("free"),
        ];
        assert_eq!((held[0].bdf(), held[1].bdf()), (bdf(0, 1), bdf(0, 3)));
        assert_eq!(
            root.reserve(bdf(0, 0)).expect_err("the bridge's"),
            SlotError::Taken { bdf: bdf(0, 0) }
        );
        assert_eq!(
            root.reserve(bdf(SEGMENT_COUNT, 1))
                .expect_err("no such segment")
                .to_string(),
            "slot 0004:00:01.0 is in no segment, the machine has 4"
        );
        held.extend((0..200).map_while(|_| root.reserve_free().ok()));
        assert_eq!(held.len() + 1, 4 * 31);
        assert_eq!(
            root.reserve_free().expect_err("full").to_string(),
            "all 124 slots of the machine are taken"
        );
        drop(explicit);
        assert_eq!(root.reserve_free().expect("free again").bdf(), bdf(0, 2));
    }

    #[test]
    fn the_guests_changes_to_a_bridge_are_reset_saved_and_restored() {
        let mmio = Bus::new();
        let root = PciRoot::new(&mmio).expect("the bus is empty");
        let command = ecam_address(bdf(1, 0)) + 4;
        assert!(mmio.write(command, &[0x06, 0]));
        let section = root.save().expect("it encodes");
        assert_eq!(
            serde_json::to_string(&section.body).expect("json"),
            r#"{"host_bridges":[{},{"4":6},{},{}]}"#
        );
        root.reset();
        assert_eq!(read(&mmio, bdf(1, 0), 4) & 0xFFFF, 0);
        root.restore(&section).expect("its own section");
        assert_eq!(read(&mmio, bdf(1, 0), 4) & 0xFFFF, 6);
        for (body, message) in [
            (
                r#"{"host_bridges":[{}]}"#,
                "saved host_bridges is 1: the machine has another number of segments",
            ),
            (
                r#"{"host_bridges":[{"0":1},{},{},{}]}"#,
                "saved config_space is 0x01 at 0x000: the register cannot hold it",
            ),
        ] {
            let body = serde_json::from_str(body).expect("json");
            let error = root
                .restore(&Section { schema: 1, body })
                .expect_err("impossible");
            assert_eq!(error.to_string(), message);
        }
    }
}
