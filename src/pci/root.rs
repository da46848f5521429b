//! All PCI segments of a VM: their ECAMs on the bus, their host bridge and the choice of a slot.
//!
//! Segment 0 shows its host bridge as a function, because programs look for one there. The others do without: a
//! kernel finds segments by ACPI, and a function that does nothing costs it seventy exits at each boot.
//!
//! As a unit it holds what the guest wrote into the host bridge; which device sits where is configuration, not
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
    host_bridge: Arc<HostBridge>,
    segments: Vec<Segment>,
    _bridge_slot: OccupiedSlot,
    /// Slot 0 of the other segments, so that nobody else takes it.
    _unused_slots: Vec<SlotReservation>,
}

struct Segment {
    slots: Slots,
    _ecam: BusClaim,
}

/// Why the PCI segments could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PciRootError {
    /// Another device answers where an ECAM belongs.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The slot that belongs to the host bridge is taken.
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
    /// Makes every segment of the machine, with the host bridge in the first slot, and puts the ECAMs on `mmio`.
    ///
    /// # Errors
    /// [`PciRootError::Bus`] when an ECAM's addresses are taken.
    pub fn new(mmio: &Bus) -> Result<Self, PciRootError> {
        let mut segments = Vec::with_capacity(usize::from(SEGMENT_COUNT));
        let mut first_slots = Vec::with_capacity(usize::from(SEGMENT_COUNT));
        for bdf in (0..SEGMENT_COUNT).filter_map(|segment| Bdf::new(segment, 0)) {
            let slots = Slots::new(bdf.segment());
            first_slots.push(slots.reserve(bdf)?);
            let ecam = Arc::new(PciSegment::new(slots.clone()));
            segments.push(Segment {
                slots,
                _ecam: mmio.claim(ecam_address(bdf), ECAM_SEGMENT_BYTES, ecam)?,
            });
        }
        let host_bridge = Arc::new(HostBridge::new());
        let bridge_slot = first_slots.remove(0).occupy(host_bridge.clone());
        Ok(Self {
            name: UnitName::new("pci")?,
            host_bridge,
            segments,
            _bridge_slot: bridge_slot,
            _unused_slots: first_slots,
        })
    }

    /// A bit for each slot of the segment in which the guest sees a device; none for a segment that is not there.
    pub fn present(&self, segment: u16) -> u32 {
        let segment = self.segments.get(usize::from(segment));
        segment.map_or(0, |segment| segment.slots.present())
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
        self.host_bridge.reset();
    }

    fn pause(&self, ticket: PauseTicket) {
        // The bridge never has anything in flight.
        drop(ticket);
    }

    fn resume(&self) {}

    fn save(&self) -> Result<Section, SaveError> {
        let saved = SavedPciRootV1 {
            host_bridge: self.host_bridge.save(),
        };
        Section::encode(PCI_ROOT_SCHEMA, &saved)
    }

    fn restore(&self, section: &Section) -> Result<(), RestoreError> {
        let SavedPciRootV1 { host_bridge } = section.decode(PCI_ROOT_SCHEMA)?;
        self.host_bridge.restore(&host_bridge)
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
    fn the_first_segment_shows_its_bridge_and_nothing_else_is_shown() {
        let mmio = Bus::new();
        let root = PciRoot::new(&mmio).expect("the bus is empty");
        assert_eq!(read(&mmio, bdf(0, 0), 0), 0x0008_1B36);
        assert_eq!(read(&mmio, bdf(0, 0), 8) >> 8, 0x06_0000);
        assert_eq!(read(&mmio, bdf(0, 0), 0x34), 0, "no capabilities");
        assert_eq!(read(&mmio, bdf(0, 0), 0x100), u32::MAX, "no extended space");
        for slot in 1..32 {
            assert_eq!(read(&mmio, bdf(0, slot), 0), u32::MAX);
        }
        for segment in 1..SEGMENT_COUNT {
            for slot in 0..32 {
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
        assert!(root.reserve(bdf(3, 0)).is_err(), "nobody's");
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
    fn the_guests_changes_to_the_bridge_are_reset_saved_and_restored() {
        let mmio = Bus::new();
        let root = PciRoot::new(&mmio).expect("the bus is empty");
        let command = ecam_address(bdf(0, 0)) + 4;
        assert!(mmio.write(command, &[0x06, 0]));
        let section = root.save().expect("it encodes");
        assert_eq!(
            serde_json::to_string(&section.body).expect("json"),
            r#"{"host_bridge":{"4":6}}"#
        );
        root.reset();
        assert_eq!(read(&mmio, bdf(0, 0), 4) & 0xFFFF, 0);
        root.restore(&section).expect("its own section");
        assert_eq!(read(&mmio, bdf(0, 0), 4) & 0xFFFF, 6);
        let body = serde_json::from_str(r#"{"host_bridge":{"0":1}}"#).expect("json");
        let error = root
            .restore(&Section { schema: 1, body })
            .expect_err("impossible");
        assert_eq!(
            error.to_string(),
            "saved config_space is 0x01 at 0x000: the register cannot hold it"
        );
    }
}
