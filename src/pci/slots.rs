//! The 32 slots of a segment and the guards that hold them.
//!
//! ```text
//! empty ──reserve──► SlotReservation ──occupy──► OccupiedSlot
//!   ▲                      │    ▲                     │
//!   └───────drop───────────┘    └───────vacate────────┤
//!   └────────────────────────drop─────────────────────┘
//! ```
//! A reserved slot reads as empty: a device becomes visible with the last step of building it, and its slot stays
//! taken between its disappearance and the end of its removal.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::device::PciDevice;
use crate::ids::Bdf;

/// Why a slot could not be reserved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// The machine has no such segment.
    #[error("slot {bdf} is in no segment, the machine has {segment_count}")]
    NoSegment {
        /// The address asked for.
        bdf: Bdf,
        /// The machine's segments.
        segment_count: u16,
    },
    /// The slot is reserved or occupied.
    #[error("slot {bdf} is taken")]
    Taken {
        /// The address asked for.
        bdf: Bdf,
    },
    /// No slot of any segment is free.
    #[error("all {slot_count} slots of the machine are taken")]
    Full {
        /// The machine's usable slots.
        slot_count: usize,
    },
}

/// The slots of one segment; clones share them.
#[derive(Clone)]
pub struct Slots {
    segment: u16,
    table: Arc<Mutex<[Slot; Bdf::SLOT_COUNT as usize]>>,
}

#[derive(Clone)]
enum Slot {
    Empty,
    Reserved,
    Occupied(Arc<dyn PciDevice>),
}

impl Slots {
    /// Makes the slots of `segment`, all empty.
    pub fn new(segment: u16) -> Self {
        Self {
            segment,
            table: Arc::new(Mutex::new([const { Slot::Empty }; Bdf::SLOT_COUNT as usize])),
        }
    }

    /// The segment these slots belong to.
    pub fn segment(&self) -> u16 {
        self.segment
    }

    /// Reserves the slot at `bdf`.
    ///
    /// # Errors
    /// [`SlotError::Taken`], also for a slot of another segment.
    pub fn reserve(&self, bdf: Bdf) -> Result<SlotReservation, SlotError> {
        let mut table = self.lock();
        let slot = &mut table[usize::from(bdf.slot())];
        if bdf.segment() != self.segment || !matches!(slot, Slot::Empty) {
            return Err(SlotError::Taken { bdf });
        }
        *slot = Slot::Reserved;
        Ok(SlotReservation {
            hold: SlotHold {
                slots: self.clone(),
                bdf,
            },
        })
    }

    /// Reserves the first empty slot; `None` when there is none.
    pub fn reserve_free(&self) -> Option<SlotReservation> {
        let mut slots = (0..Bdf::SLOT_COUNT).filter_map(|slot| Bdf::new(self.segment, slot));
        slots.find_map(|bdf| self.reserve(bdf).ok())
    }

    /// The function in slot number `slot`, if the guest can see one.
    pub fn device(&self, slot: u8) -> Option<Arc<dyn PciDevice>> {
        match self.lock().get(usize::from(slot)) {
            Some(Slot::Occupied(device)) => Some(device.clone()),
            Some(Slot::Empty | Slot::Reserved) | None => None,
        }
    }

    /// A bit for each slot in which the guest sees a function.
    pub fn present(&self) -> u32 {
        let table = self.lock();
        let seen = table
            .iter()
            .enumerate()
            .filter(|(_, slot)| matches!(slot, Slot::Occupied(_)));
        seen.fold(0, |bits, (slot, _)| bits | 1 << slot)
    }

    fn set(&self, bdf: Bdf, slot: Slot) {
        let former = std::mem::replace(&mut self.lock()[usize::from(bdf.slot())], slot);
        // The last reference to a device may go here, with the lock released.
        drop(former);
    }

    fn lock(&self) -> MutexGuard<'_, [Slot; Bdf::SLOT_COUNT as usize]> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A taken slot; dropping it empties the slot.
struct SlotHold {
    slots: Slots,
    bdf: Bdf,
}

impl Drop for SlotHold {
    fn drop(&mut self) {
        self.slots.set(self.bdf, Slot::Empty);
    }
}

/// A slot that is taken and reads as empty. Dropping it frees the slot.
#[must_use = "dropping the reservation frees the slot"]
pub struct SlotReservation {
    hold: SlotHold,
}

/// A slot with a function that the guest sees. Dropping it removes the function and frees the slot.
#[must_use = "dropping the guard removes the device"]
pub struct OccupiedSlot {
    hold: SlotHold,
}

impl SlotReservation {
    /// The slot's address.
    pub fn bdf(&self) -> Bdf {
        self.hold.bdf
    }

    /// Makes `device` visible to the guest in this slot: the last step of adding it.
    pub fn occupy(self, device: Arc<dyn PciDevice>) -> OccupiedSlot {
        let Self { hold } = self;
        hold.slots.set(hold.bdf, Slot::Occupied(device));
        OccupiedSlot { hold }
    }
}

impl OccupiedSlot {
    /// The slot's address.
    pub fn bdf(&self) -> Bdf {
        self.hold.bdf
    }

    /// Hides the device from the guest and lets go of it; the slot stays taken.
    pub fn vacate(self) -> SlotReservation {
        let Self { hold } = self;
        hold.slots.set(hold.bdf, Slot::Reserved);
        SlotReservation { hold }
    }
}

impl fmt::Debug for SlotReservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SlotReservation({})", self.bdf())
    }
}

impl fmt::Debug for OccupiedSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OccupiedSlot({})", self.bdf())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;

    impl PciDevice for Nothing {
        fn config_read(&self, _offset: u16, _data: &mut [u8]) {}
        fn config_write(&self, _offset: u16, _data: &[u8]) {}
    }

    fn bdf(slot: u8) -> Bdf {
        Bdf::new(2, slot).expect("slots go to 31")
    }

    #[test]
    fn a_slot_is_visible_only_while_it_is_occupied() {
        let slots = Slots::new(2);
        let device = Arc::new(Nothing);
        let reservation = slots.reserve(bdf(5)).expect("all are empty");
        assert!(slots.device(5).is_none());
        assert_eq!(
            slots.reserve(bdf(5)).expect_err("reserved").to_string(),
            "slot 0002:00:05.0 is taken"
        );
        let occupied = reservation.occupy(device.clone());
        assert!(slots.device(5).is_some());
        assert_eq!(slots.present(), 1 << 5);
        let reservation = occupied.vacate();
        assert!(slots.device(5).is_none());
        assert_eq!(slots.present(), 0);
        assert_eq!(Arc::strong_count(&device), 1, "the slot let go of the device");
        assert!(slots.reserve(bdf(5)).is_err(), "taken until the removal ends");
        drop(reservation);
        drop(slots.reserve(bdf(5)).expect("free again").occupy(device.clone()));
        assert!(slots.device(5).is_none());
        assert_eq!(Arc::strong_count(&device), 1);
    }

    #[test]
    fn the_first_free_slot_is_the_lowest_and_the_last_is_the_end() {
        let slots = Slots::new(2);
        let mut held: Vec<_> = (0..32).map_while(|_| slots.reserve_free()).collect();
        assert_eq!(held.len(), 32);
        assert!(slots.reserve_free().is_none());
        drop(held.remove(7));
        assert_eq!(slots.reserve_free().map(|slot| slot.bdf()), Some(bdf(7)));
        assert!(slots.device(32).is_none() && slots.device(255).is_none());
    }
}
