//! The hot-plug registers: what changed in which slot, ejecting, and the names of the devices in them.
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

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::remnant::Remnant;
use super::state::{Ejected, Place, Slot, State};
use crate::acpi::device::AcpiDevice;
use crate::acpi::ged::GedEvent;
use crate::bus::{Bus, BusDevice, BusError};
use crate::guest_log::GuestLog;
use crate::ids::{Bdf, SlotLabel};
use crate::memory::layout::{
    ACPI_REGISTERS_BYTES, HOTPLUG_EJECT_OFFSET, HOTPLUG_INDEX_OFFSET, HOTPLUG_LABEL_BYTES,
    HOTPLUG_LABEL_OFFSET, HOTPLUG_OFFSET, HOTPLUG_SELECT_OFFSET, SEGMENT_COUNT,
};
use crate::pci::device::PciDevice;
use crate::pci::slots::SlotReservation;

/// The number of bytes that [`PciHotplug`] answers from `layout::HOTPLUG_OFFSET`.
pub const PCI_HOTPLUG_BYTES: u64 = ACPI_REGISTERS_BYTES - HOTPLUG_OFFSET;
/// The bytes of the two registers of a segment.
pub(super) const SEGMENT_STRIDE: u64 = 8;
const SEGMENTS_END: u64 = SEGMENT_STRIDE * SEGMENT_COUNT as u64;
const LABEL_END: u64 = HOTPLUG_LABEL_OFFSET + HOTPLUG_LABEL_BYTES as u64;

// A name has at most as many UTF-16 units as bytes of UTF-8, and a final zero.
const _: () = assert!(2 * (SlotLabel::MAX_BYTES + 1) <= HOTPLUG_LABEL_BYTES);

/// Hears what the guest does with slots. Implemented by the supervisor's mailbox; never blocks.
pub trait SlotListener: Send + Sync {
    /// The guest has let go of the device at `bdf` and does not see it any more. `asked` tells whether it was asked to;
    /// one that was not is the guest's own affair.
    fn ejected(&self, bdf: Bdf, asked: bool);
}

/// What a device is called in the guest. Nothing here knows what kind of device it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotName {
    /// From 1 to `config::ACPI_INDEX_MAX`.
    pub acpi_index: u16,
    /// From the name that the host chose.
    pub label: SlotLabel,
}

/// The register file and the hot-pluggable devices; the unit `pci-hotplug`.
pub struct PciHotplug {
    acpi: Arc<AcpiDevice>,
    mmio: Bus,
    listener: Arc<dyn SlotListener>,
    log: GuestLog,
    /// Never held while the listener or the event device is called.
    state: Mutex<State>,
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

impl PciHotplug {
    /// Makes the registers of a machine without hot-pluggable devices. Events go through `acpi`; devices have their
    /// registers on `mmio`.
    pub fn new(acpi: Arc<AcpiDevice>, mmio: Bus, listener: Arc<dyn SlotListener>) -> Self {
        Self {
            acpi,
            mmio,
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
            Place::Hidden(slot)
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
        state.note_changed(bdf);
        drop(state);
        self.acpi.raise(GedEvent::PciHotplug);
    }

    /// Asks the guest to let go of the device at `bdf`; `false` when it sees no hot-pluggable one there.
    pub fn request_eject(&self, bdf: Bdf) -> bool {
        let mut state = self.lock();
        if !state.is_seen(bdf) {
            return false;
        }
        state.asked.insert(bdf);
        state.request_eject(bdf);
        drop(state);
        self.acpi.raise(GedEvent::PciHotplug);
        true
    }

    /// Withdraws the request to let go of the device at `bdf` and asks the guest to look at it, also if it has let go of
    /// it without being asked. `false` when there is no such device, or the guest has let go of it as it was asked to.
    pub fn offer(&self, bdf: Bdf) -> bool {
        let mut state = self.lock();
        let offered = state.offer(bdf);
        drop(state);
        if offered {
            self.announce(bdf);
        }
        offered
    }

    /// Takes the device at `bdf` out of its slot and hands the slot back, still taken. `None` when no hot-pluggable
    /// device is there.
    pub fn remove(&self, bdf: Bdf) -> Option<Removed> {
        let mut state = self.lock();
        let slot = state.slots.remove(&bdf)?;
        state.asked.remove(&bdf);
        state.forget_events(bdf);
        drop(state);
        Some(match slot.place {
            Place::Hidden(slot) => Removed::Ejected(slot),
            Place::Seen(slot) => Removed::ByForce(slot.vacate()),
        })
    }

    /// Tells the guest that the device at `bdf` was taken by force. Until its driver has let go of the device it finds
    /// zeros at `range`, where the device's registers were and no device is any more.
    pub fn tell_taken(&self, bdf: Bdf, range: Option<Range<u64>>) {
        // Where the guest has put another device meanwhile, nothing is left of this one but its slot.
        let remnant = self.remnant(range).or_else(|_| self.remnant(None));
        let mut state = self.lock();
        state.remnants.extend(remnant.ok().map(|remnant| (bdf, remnant)));
        state.request_eject(bdf);
        drop(state);
        self.acpi.raise(GedEvent::PciHotplug);
    }

    /// Gives the device at `bdf` another label, which the guest reads when it looks the next time. A device that has no
    /// name in the guest gets none.
    pub fn rename(&self, bdf: Bdf, label: &SlotLabel) {
        self.lock().rename(bdf, label);
    }

    fn eject(&self, number: u32) {
        let ejected = slot_of(number).map(|bdf| (bdf, self.lock().eject(bdf)));
        match ejected {
            Some((bdf, Ejected::Device { asked })) => self.listener.ejected(bdf, asked),
            Some((bdf, Ejected::Remnant { awaited: true } | Ejected::NotMeant)) => self.announce(bdf),
            Some((_, Ejected::Remnant { awaited: false })) => {}
            Some((_, Ejected::Nothing)) | None => self.log.warn(format_args!(
                "the guest ejects slot {number:#x}, where nothing can be ejected"
            )),
        }
    }

    pub(super) fn remnant(&self, range: Option<Range<u64>>) -> Result<Remnant, BusError> {
        Remnant::new(&self.mmio, range)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
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

impl BusDevice for PciHotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        let word = match (offset, data.len()) {
            (0..SEGMENTS_END, 4) if offset.is_multiple_of(4) => {
                let segment = (offset / SEGMENT_STRIDE) as usize;
                if offset.is_multiple_of(SEGMENT_STRIDE) {
                    state.changed.get_mut(segment).map_or(0, std::mem::take)
                } else {
                    state.take_eject_requests(segment)
                }
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
