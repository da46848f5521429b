//! What the hot-plug registers know of every slot, and what an eject by the guest means.
//!
//! A guest queues what it is told: between the moment in which it reads an eject request and its `_EJ0` anything can
//! happen to the slot, and a request that was made twice is answered twice. So every request that the guest has read
//! is counted until it is answered, and an answer that is not about the device in the slot leaves that device alone.
//!
//! ```text
//! eject of                         means
//! what was taken by force          the driver has let go: the next device in the slot is shown
//! a device that was asked for      it goes, from the guest and the host
//! another, requests unanswered     an answer about a device that was there before: this one stays, and is announced
//! another                          the guest's own affair: it is hidden, and the host keeps it
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::ids::{Bdf, SlotLabel};
use crate::memory::layout::{HOTPLUG_LABEL_BYTES, SEGMENT_COUNT};
use crate::pci::device::{Orphan, PciDevice};
use crate::pci::slots::{OccupiedSlot, SlotReservation};

/// What a device is called in the guest. Nothing here knows what kind of device it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotName {
    /// From 1 to `config::ACPI_INDEX_MAX`.
    pub acpi_index: u16,
    /// From the name that the host chose.
    pub label: SlotLabel,
}

/// Everything behind the registers' lock.
#[derive(Default)]
pub(super) struct State {
    pub changed: [u32; SEGMENT_COUNT as usize],
    pub eject_requests: [u32; SEGMENT_COUNT as usize],
    pub select: u32,
    pub selected: Selected,
    pub slots: BTreeMap<Bdf, Slot>,
    /// Slots whose device the guest was asked to let go of and may let go of at any time.
    pub asked: BTreeSet<Bdf>,
    /// How many requests to let go the guest has read and not answered, of slots where it is not zero.
    pub unanswered: BTreeMap<Bdf, u32>,
    /// Of devices that were taken by force, until the guest lets go of them.
    pub remnants: BTreeMap<Bdf, Box<dyn Orphan>>,
}

/// The name of the selected slot as the guest reads it.
pub(super) struct Selected {
    pub index: u32,
    pub label: [u8; HOTPLUG_LABEL_BYTES],
}

pub(super) struct Slot {
    pub device: Arc<dyn PciDevice>,
    pub place: Place,
    pub name: Option<SlotName>,
}

pub(super) enum Place {
    Seen(OccupiedSlot),
    /// The guest has ejected it, and the host has not taken it away; or it waits for the guest to let go of the device
    /// that was taken out of its slot by force.
    Hidden(SlotReservation),
}

/// What a write to the eject register did.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ejected {
    /// The device is hidden.
    Device {
        asked: bool,
    },
    /// The device was not meant and stays.
    NotMeant,
    /// `awaited` tells whether a new device is in the slot.
    Remnant {
        awaited: bool,
    },
    Nothing,
}

impl State {
    /// The guest reads which slots of the segment to let go of, and will answer each.
    pub fn take_eject_requests(&mut self, segment: usize) -> u32 {
        let bits = self.eject_requests.get_mut(segment).map_or(0, std::mem::take);
        let slots = (0..Bdf::SLOT_COUNT).filter(|slot| bits & (1 << slot) != 0);
        for bdf in slots.filter_map(|slot| Bdf::new(segment as u16, slot)) {
            let count = self.unanswered.entry(bdf).or_default();
            *count = count.saturating_add(1);
        }
        bits
    }

    /// The guest writes the number of the slot at `bdf` to the eject register.
    pub fn eject(&mut self, bdf: Bdf) -> Ejected {
        let answers = self.answer(bdf);
        if self.remnants.remove(&bdf).is_some() {
            // What it has not read was about the device that is gone.
            self.forget_request(bdf);
            self.show(bdf);
            let awaited = self.slots.contains_key(&bdf);
            return Ejected::Remnant { awaited };
        }
        let asked = self.asked.contains(&bdf);
        match self.slots.get(&bdf) {
            Some(slot) if slot.is_hidden() => Ejected::Nothing,
            None => Ejected::Nothing,
            Some(_) if answers && !asked => Ejected::NotMeant,
            Some(_) => {
                self.hide(bdf);
                self.forget_events(bdf);
                Ejected::Device { asked }
            }
        }
    }

    /// Counts an answer; `false` when nothing was to be answered.
    fn answer(&mut self, bdf: Bdf) -> bool {
        let Some(count) = self.unanswered.get_mut(&bdf) else {
            return false;
        };
        *count -= 1;
        if *count == 0 {
            self.unanswered.remove(&bdf);
        }
        true
    }

    /// Takes back that the guest shall let go of the device at `bdf`, and shows it; `false` when it cannot be had back.
    pub fn offer(&mut self, bdf: Bdf) -> bool {
        let Some(slot) = self.slots.get(&bdf) else {
            return false;
        };
        if slot.is_hidden() && self.asked.contains(&bdf) {
            return false;
        }
        self.asked.remove(&bdf);
        self.forget_request(bdf);
        if !self.remnants.contains_key(&bdf) {
            self.show(bdf);
        }
        true
    }

    pub fn request_eject(&mut self, bdf: Bdf) {
        if let Some(bits) = self.eject_requests.get_mut(usize::from(bdf.segment())) {
            *bits |= bit(bdf);
        }
    }

    pub fn note_changed(&mut self, bdf: Bdf) {
        if let Some(bits) = self.changed.get_mut(usize::from(bdf.segment())) {
            *bits |= bit(bdf);
        }
    }

    /// Shows every device that is hidden.
    pub fn show_all(&mut self) {
        let all: Vec<_> = self.slots.keys().copied().collect();
        all.into_iter().for_each(|bdf| self.show(bdf));
    }

    /// Shows the device at `bdf`, if there is one.
    pub fn show(&mut self, bdf: Bdf) {
        if let Some(Slot { device, place, name }) = self.slots.remove(&bdf) {
            let place = match place {
                Place::Hidden(reservation) => Place::Seen(reservation.occupy(device.clone())),
                Place::Seen(slot) => Place::Seen(slot),
            };
            self.slots.insert(bdf, Slot { device, place, name });
        }
    }

    /// Hides the device at `bdf`, if there is one.
    pub fn hide(&mut self, bdf: Bdf) {
        if let Some(Slot { device, place, name }) = self.slots.remove(&bdf) {
            let place = match place {
                Place::Seen(slot) => Place::Hidden(slot.vacate()),
                Place::Hidden(reservation) => Place::Hidden(reservation),
            };
            self.slots.insert(bdf, Slot { device, place, name });
        }
    }

    /// What the guest has not read of the slot means nothing any more.
    pub fn forget_events(&mut self, bdf: Bdf) {
        if let Some(bits) = self.changed.get_mut(usize::from(bdf.segment())) {
            *bits &= !bit(bdf);
        }
        self.forget_request(bdf);
    }

    /// Takes back what the guest has not read of a request, unless it is about a device that was taken by force: the one
    /// behind that would wait for ever.
    pub fn forget_request(&mut self, bdf: Bdf) {
        if self.remnants.contains_key(&bdf) {
            return;
        }
        if let Some(bits) = self.eject_requests.get_mut(usize::from(bdf.segment())) {
            *bits &= !bit(bdf);
        }
    }

    pub fn rename(&mut self, bdf: Bdf, label: &SlotLabel) {
        if let Some(name) = self.slots.get_mut(&bdf).and_then(|slot| slot.name.as_mut()) {
            name.label = label.clone();
        }
    }

    pub fn select(&mut self, number: u32) {
        self.select = number;
        let slot = slot_of(number).and_then(|bdf| self.slots.get(&bdf));
        self.selected = slot.and_then(|slot| slot.name.as_ref()).into();
    }

    pub fn is_seen(&self, bdf: Bdf) -> bool {
        self.slots.get(&bdf).is_some_and(|slot| !slot.is_hidden())
    }
}

impl Slot {
    pub fn is_hidden(&self) -> bool {
        matches!(self.place, Place::Hidden(_))
    }
}

impl Default for Selected {
    fn default() -> Self {
        Self {
            index: 0,
            label: [0; HOTPLUG_LABEL_BYTES],
        }
    }
}

impl From<Option<&SlotName>> for Selected {
    fn from(name: Option<&SlotName>) -> Self {
        let mut selected = Self::default();
        if let Some(SlotName { acpi_index, label }) = name {
            selected.index = (*acpi_index).into();
            let units = label.as_str().encode_utf16().map(u16::to_le_bytes);
            for (place, unit) in selected.label.chunks_exact_mut(2).zip(units) {
                place.copy_from_slice(&unit);
            }
        }
        selected
    }
}

fn bit(bdf: Bdf) -> u32 {
    1 << bdf.slot()
}

/// The slot with this number.
pub(super) fn slot_of(number: u32) -> Option<Bdf> {
    let (segment, slot) = (
        number / u32::from(Bdf::SLOT_COUNT),
        number % u32::from(Bdf::SLOT_COUNT),
    );
    let segment = u16::try_from(segment)
        .ok()
        .filter(|segment| *segment < SEGMENT_COUNT)?;
    Bdf::new(segment, slot as u8)
}

/// The number of the slot at `bdf`.
pub(super) fn number_of(bdf: Bdf) -> u32 {
    u32::from(bdf.segment()) * u32::from(Bdf::SLOT_COUNT) + u32::from(bdf.slot())
}
