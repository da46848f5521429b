//! The hot-plug registers: what changed in which slot, ejecting, and the names of network cards.
//!
//! Offsets from `layout::HOTPLUG_OFFSET`; a slot's number is `segment * 32 + slot`.
//!
//! | offset | width | register | read | write |
//! |---|---|---|---|---|
//! | 0x00 + 8 n | 4 | changed | slots of segment n to look at, clears them | ignored |
//! | 0x04 + 8 n | 4 | eject request | slots of segment n to let go of, clears them | ignored |
//! | 0x40 | 4 | eject | 0 | a slot's number: the guest has let go of the device |
//! | 0x44 | 4 | select | 0 | a slot's number: takes its name into the registers below |
//! | 0x48 | 4 | index | ACPI index; 0: the slot has no name | ignored |
//! | 0x50 | 1–8 | label | 136 bytes: the name in UTF-16, filled up with zeros | ignored |
//!
//! Everything else reads as all ones and changes nothing. What the guest writes is a slot's number at most: an eject
//! of a slot without a hot-pluggable device is logged and ignored. Index and label are taken when the slot is
//! selected, so that a name which changes meanwhile is read as it was and not as a mixture.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use crate::acpi::device::AcpiDevice;
use crate::acpi::ged::GedEvent;
use crate::acpi::saved::{PCI_HOTPLUG_SCHEMA, SavedPciHotplugV1};
use crate::bus::{BusClaim, BusDevice};
use crate::guest_log::GuestLog;
use crate::ids::{Bdf, NicName, UnitName};
use crate::memory::layout::{
    ACPI_REGISTERS_BYTES, HOTPLUG_EJECT_OFFSET, HOTPLUG_INDEX_OFFSET, HOTPLUG_LABEL_BYTES,
    HOTPLUG_LABEL_OFFSET, HOTPLUG_OFFSET, HOTPLUG_SELECT_OFFSET, SEGMENT_COUNT,
};
use crate::pci::device::PciDevice;
use crate::pci::slots::{OccupiedSlot, SlotReservation};
use crate::unit::{PauseTicket, RestoreError, SaveError, Section, Unit};

/// The number of bytes that [`PciHotplug`] answers from `layout::HOTPLUG_OFFSET`.
pub const PCI_HOTPLUG_BYTES: u64 = ACPI_REGISTERS_BYTES - HOTPLUG_OFFSET;
/// The bytes of the two registers of a segment.
pub(super) const SEGMENT_STRIDE: u64 = 8;
const SEGMENTS_END: u64 = SEGMENT_STRIDE * SEGMENT_COUNT as u64;
const LABEL_END: u64 = HOTPLUG_LABEL_OFFSET + HOTPLUG_LABEL_BYTES as u64;

// A name has at most as many UTF-16 units as bytes of UTF-8, and a final zero.
const _: () = assert!(2 * (NicName::MAX_BYTES + 1) <= HOTPLUG_LABEL_BYTES);

/// Hears what the guest does with slots. Implemented by the supervisor's mailbox; never blocks.
pub trait SlotListener: Send + Sync {
    /// The guest has let go of the device at `bdf`, asked or not, and does not see it any more.
    fn ejected(&self, bdf: Bdf);
}

/// What a network card is called in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotName {
    /// From 1 to `config::ACPI_INDEX_MAX`.
    pub acpi_index: u16,
    /// The name that the host chose.
    pub label: NicName,
}

/// The register file and the hot-pluggable devices; the unit `pci-hotplug`.
pub struct PciHotplug {
    acpi: Arc<AcpiDevice>,
    listener: Arc<dyn SlotListener>,
    log: GuestLog,
    /// Never held while the listener or the event device is called.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    changed: [u32; SEGMENT_COUNT as usize],
    eject_requests: [u32; SEGMENT_COUNT as usize],
    select: u32,
    selected: Selected,
    slots: BTreeMap<Bdf, Slot>,
    /// Of devices that were taken by force, until the guest lets go of them.
    remnants: BTreeMap<Bdf, Option<BusClaim>>,
}

/// The name of the selected slot as the guest reads it.
struct Selected {
    index: u32,
    label: [u8; HOTPLUG_LABEL_BYTES],
}

struct Slot {
    device: Arc<dyn PciDevice>,
    place: Place,
    name: Option<SlotName>,
}

enum Place {
    Seen(OccupiedSlot),
    /// The guest has ejected it, and the host has not taken it away; or it waits for the guest to let go of the device
    /// that was taken out of its slot by force.
    Ejected(SlotReservation),
}

/// A device that is not in its slot any more; the slot is taken until this is dropped.
#[derive(Debug)]
#[must_use = "dropping it frees the slot"]
pub enum Removed {
    /// The guest had let go of it.
    Ejected(SlotReservation),
    /// The guest saw it until now.
    ByForce(SlotReservation),
}

/// What a write to the eject register did.
enum Ejected {
    Device,
    /// `awaited` tells whether a new device is in the slot.
    Remnant {
        awaited: bool,
    },
    Nothing,
}

impl PciHotplug {
    /// Makes the registers of a machine without hot-pluggable devices. Events go through `acpi`.
    pub fn new(acpi: Arc<AcpiDevice>, listener: Arc<dyn SlotListener>) -> Self {
        Self {
            acpi,
            listener,
            log: GuestLog::new("pci-hotplug"),
            state: Mutex::default(),
        }
    }

    /// Makes `device` visible in its slot as one that can be ejected: the last step of adding it. A guest that runs
    /// already hears of it by [`PciHotplug::announce`]. Where the guest has not let go yet of a device that was taken by
    /// force, the new one is shown and announced when it has: the guest would eject one for the other.
    pub fn insert(&self, slot: SlotReservation, device: Arc<dyn PciDevice>, name: Option<SlotName>) {
        let bdf = slot.bdf();
        let mut state = self.lock();
        let place = if state.remnants.contains_key(&bdf) {
            Place::Ejected(slot)
        } else {
            Place::Seen(slot.occupy(device.clone()))
        };
        state.slots.insert(bdf, Slot { device, place, name });
    }

    /// Asks the guest to look at the slot.
    pub fn announce(&self, bdf: Bdf) {
        let mut state = self.lock();
        if state.remnants.contains_key(&bdf) {
            return;
        }
        if let Some(bits) = state.changed.get_mut(usize::from(bdf.segment())) {
            *bits |= bit(bdf);
        }
        drop(state);
        self.acpi.raise(GedEvent::PciHotplug);
    }

    /// Asks the guest to let go of the device at `bdf`; `false` when it sees no hot-pluggable one there.
    pub fn request_eject(&self, bdf: Bdf) -> bool {
        let mut state = self.lock();
        if !matches!(state.slots.get(&bdf), Some(slot) if matches!(slot.place, Place::Seen(_))) {
            return false;
        }
        state.request_eject(bdf);
        drop(state);
        self.acpi.raise(GedEvent::PciHotplug);
        true
    }

    /// Takes the device at `bdf` out of its slot and hands the slot back, still taken. `None` when no hot-pluggable
    /// device is there.
    pub fn remove(&self, bdf: Bdf) -> Option<Removed> {
        let mut state = self.lock();
        let slot = state.slots.remove(&bdf)?;
        state.forget_events(bdf);
        drop(state);
        Some(match slot.place {
            Place::Ejected(slot) => Removed::Ejected(slot),
            Place::Seen(slot) => Removed::ByForce(slot.vacate()),
        })
    }

    /// Tells the guest that the device at `bdf` was taken by force. Until its driver has let go of the device it finds
    /// `remnant` at its addresses.
    pub fn tell_taken(&self, bdf: Bdf, remnant: Option<BusClaim>) {
        let mut state = self.lock();
        state.remnants.insert(bdf, remnant);
        state.request_eject(bdf);
        drop(state);
        self.acpi.raise(GedEvent::PciHotplug);
    }

    /// Gives the card at `bdf` another label, which the guest reads when it looks the next time. A card that has no
    /// name in the guest gets none.
    pub fn rename(&self, bdf: Bdf, label: &NicName) {
        let mut state = self.lock();
        if let Some(name) = state.slots.get_mut(&bdf).and_then(|slot| slot.name.as_mut()) {
            name.label = label.clone();
        }
    }

    fn eject(&self, number: u32) {
        let ejected = slot_of(number).map(|bdf| (bdf, self.lock().eject(bdf)));
        match ejected {
            Some((bdf, Ejected::Device)) => self.listener.ejected(bdf),
            Some((bdf, Ejected::Remnant { awaited: true })) => self.announce(bdf),
            Some((_, Ejected::Remnant { awaited: false })) => {}
            Some((_, Ejected::Nothing)) | None => self.log.warn(format_args!(
                "the guest ejects slot {number:#x}, where nothing can be ejected"
            )),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Hides the device at `bdf`, or removes what is left of one.
    fn eject(&mut self, bdf: Bdf) -> Ejected {
        if self.remnants.remove(&bdf).is_some() {
            self.show(bdf);
            let awaited = self.slots.contains_key(&bdf);
            return Ejected::Remnant { awaited };
        }
        match self.slots.remove(&bdf) {
            Some(Slot {
                device,
                place: Place::Seen(slot),
                name,
            }) => {
                let place = Place::Ejected(slot.vacate());
                self.slots.insert(bdf, Slot { device, place, name });
                self.forget_events(bdf);
                Ejected::Device
            }
            Some(slot) => {
                self.slots.insert(bdf, slot);
                Ejected::Nothing
            }
            None => Ejected::Nothing,
        }
    }

    fn request_eject(&mut self, bdf: Bdf) {
        if let Some(bits) = self.eject_requests.get_mut(usize::from(bdf.segment())) {
            *bits |= bit(bdf);
        }
    }

    /// Shows every device that was ejected and is still here.
    fn show_all(&mut self) {
        let all: Vec<_> = self.slots.keys().copied().collect();
        all.into_iter().for_each(|bdf| self.show(bdf));
    }

    /// Shows the device at `bdf`, if there is one.
    fn show(&mut self, bdf: Bdf) {
        if let Some(Slot { device, place, name }) = self.slots.remove(&bdf) {
            let place = match place {
                Place::Ejected(reservation) => Place::Seen(reservation.occupy(device.clone())),
                Place::Seen(slot) => Place::Seen(slot),
            };
            self.slots.insert(bdf, Slot { device, place, name });
        }
    }

    fn forget_events(&mut self, bdf: Bdf) {
        let segment = usize::from(bdf.segment());
        for bits in [&mut self.changed, &mut self.eject_requests] {
            if let Some(bits) = bits.get_mut(segment) {
                *bits &= !bit(bdf);
            }
        }
    }

    fn select(&mut self, number: u32) {
        self.select = number;
        let slot = slot_of(number).and_then(|bdf| self.slots.get(&bdf));
        self.selected = slot.and_then(|slot| slot.name.as_ref()).into();
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

/// The slot with this number.
fn slot_of(number: u32) -> Option<Bdf> {
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

fn bit(bdf: Bdf) -> u32 {
    1 << bdf.slot()
}

impl BusDevice for PciHotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        let word = match (offset, data.len()) {
            (0..SEGMENTS_END, 4) if offset.is_multiple_of(4) => {
                let segment = (offset / SEGMENT_STRIDE) as usize;
                let bits = if offset.is_multiple_of(SEGMENT_STRIDE) {
                    &mut state.changed
                } else {
                    &mut state.eject_requests
                };
                bits.get_mut(segment).map_or(0, std::mem::take)
            }
            (HOTPLUG_EJECT_OFFSET | HOTPLUG_SELECT_OFFSET, 4) => 0,
            (HOTPLUG_INDEX_OFFSET, 4) => state.selected.index,
            (HOTPLUG_LABEL_OFFSET..LABEL_END, count) => {
                let from = (offset - HOTPLUG_LABEL_OFFSET) as usize;
                match state.selected.label.get(from..from + count) {
                    Some(bytes) => data.copy_from_slice(bytes),
                    None => data.fill(0xFF),
                }
                return;
            }
            _ => return data.fill(0xFF),
        };
        data.copy_from_slice(&word.to_le_bytes());
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(word) = data.try_into().map(u32::from_le_bytes) else {
            return;
        };
        match offset {
            HOTPLUG_EJECT_OFFSET => self.eject(word),
            HOTPLUG_SELECT_OFFSET => self.lock().select(word),
            _ => {}
        }
    }
}

impl Unit for PciHotplug {
    fn name(&self) -> UnitName {
        UnitName::new("pci-hotplug").expect("a short name")
    }

    /// A device that the guest ejected and the host kept is in its slot again; requests are for the guest that is
    /// gone, and whoever made them decides what follows.
    fn reset(&self) {
        let mut state = self.lock();
        state.changed = Default::default();
        state.eject_requests = Default::default();
        state.remnants.clear();
        state.show_all();
        state.select(0);
    }

    fn pause(&self, ticket: PauseTicket) {
        // Nothing is ever in flight, and the event device keeps its line quiet.
        drop(ticket);
    }

    fn resume(&self) {}

    fn save(&self) -> Result<Section, SaveError> {
        let state = self.lock();
        let ejected = state.slots.iter().filter(|(_, slot)| slot.is_ejected());
        let saved = SavedPciHotplugV1 {
            changed: state.changed,
            eject_requests: state.eject_requests,
            select: state.select,
            ejected: ejected.map(|(bdf, _)| *bdf).collect(),
        };
        Section::encode(PCI_HOTPLUG_SCHEMA, &saved)
    }

    fn restore(&self, section: &Section) -> Result<(), RestoreError> {
        let SavedPciHotplugV1 {
            changed,
            eject_requests,
            select,
            ejected,
        } = section.decode(PCI_HOTPLUG_SCHEMA)?;
        let mut state = self.lock();
        for bdf in ejected {
            if !matches!(state.eject(bdf), Ejected::Device) {
                return Err(RestoreError::Value {
                    field: "ejected",
                    value: bdf.to_string(),
                    reason: "no device there can be ejected",
                });
            }
        }
        // Behind the ejects, which forget what was told of their slots.
        state.changed = changed;
        state.eject_requests = eject_requests;
        state.select(select);
        Ok(())
    }

    fn inspect(&self) -> Value {
        let state = self.lock();
        let slot = |(bdf, slot): (&Bdf, &Slot)| {
            let name = slot.name.as_ref();
            json!({
                "bdf": bdf,
                "ejected": slot.is_ejected(),
                "acpi_index": name.map(|name| name.acpi_index),
                "label": name.map(|name| name.label.as_str()),
            })
        };
        json!({
            "changed": state.changed,
            "eject_requests": state.eject_requests,
            "slots": state.slots.iter().map(slot).collect::<Vec<_>>(),
        })
    }
}

impl Slot {
    fn is_ejected(&self) -> bool {
        matches!(self.place, Place::Ejected(_))
    }
}
