//! The hot-plug registers and the AML that uses them, side by side because they change together: what is in which slot,
//! what changed there, ejecting, and the names of the devices.
//!
//! Offsets from `layout::HOTPLUG_OFFSET`; a slot's number is `segment * 32 + slot`.
//!
//! | offset | width | register | read | write |
//! |---|---|---|---|---|
//! | 0x00 + 8 n | 4 | changed | slots of segment n to look at, clears them | ignored |
//! | 0x04 + 8 n | 4 | eject request | slots of segment n to let go of, clears them | ignored |
//! | 0x20 + 4 n | 4 | present | slots of segment n that show a device | ignored |
//! | 0x40 | 4 | eject | 0 | a slot's number: the guest has let go of the device |
//! | 0x44 | 4 | select | 0 | a slot's number: takes its name into the registers below |
//! | 0x48 | 4 | index | ACPI index; 0: the slot has no name | ignored |
//! | 0x50 | 1–8 | label | 136 bytes: the name in UTF-16, filled up with zeros | ignored |
//!
//! Everything else reads as all ones and changes nothing. What the guest writes is a slot's number at most: an eject
//! of a slot without a hot-pluggable device is logged and ignored. Index and label are taken when the slot is
//! selected, so that a name which changes meanwhile is read as it was and not as a mixture. What is present is asked of
//! the PCI segment itself, so that it cannot disagree with configuration space.
//!
//! ```text
//! \_SB  HPRG                    the registers
//!       HPNM (uuid, function, number)   Serialized: selects a slot and reads its name
//!       HPSC ()                 notifies the slots that changed or shall be let go of, segment by segment
//! PCxx  HPRF ()                 copies what is present into HPPR, and HPKN tells that it was copied
//!       HPST (bit)              a slot's _STA, from the copy: present and working, or not there
//!       HPNT (bits, code)       copies again, and Notify (Sxx, code) for each bit
//!       Sxx_                    _ADR _SUN _STA _EJ0 _DSM
//! ```
//! The copy is made with the first question, with news of the segment after the news was read, and with an eject: a boot
//! asks four times for each slot, which would be an exit each. A slot's AML is some ninety bytes. `_SUN` is the
//! slot's number over all segments, because Linux names slots by it and names are unique there. The label is a buffer of
//! UTF-16 as PCI Firmware 3.3 §4.6.7 wants its string; Linux makes UTF-8 of it (`drivers/pci/pci-label.c`), surrogate
//! pairs included, where an AML string may hold ASCII only.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use acpi_tables::aml::{
    And, Arg, BufferData, Device, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule,
    If, Index, Local, Method, MethodCall, Name, Notify, ONE, OpRegion, OpRegionSpace, Package, Path, Return,
    ShiftLeft, Store, Uuid, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::remnant;
pub use super::state::SlotName;
use super::state::{Ejected, Place, Slot, State, number_of, slot_of};
use crate::acpi::device::AcpiDevice;
use crate::acpi::ged::GedEvent;
use crate::bus::{Bus, BusDevice, BusError};
use crate::guest_log::GuestLog;
use crate::ids::{Bdf, SlotLabel};
use crate::memory::layout::{
    ACPI_REGISTERS_BASE, ACPI_REGISTERS_BYTES, HOTPLUG_EJECT_OFFSET, HOTPLUG_INDEX_OFFSET,
    HOTPLUG_LABEL_BYTES, HOTPLUG_LABEL_OFFSET, HOTPLUG_OFFSET, HOTPLUG_PRESENT_OFFSET, HOTPLUG_SELECT_OFFSET,
    SEGMENT_COUNT,
};
use crate::pci::device::{Orphan, PciDevice};
use crate::pci::root::PciRoot;
use crate::pci::slots::SlotReservation;

/// The number of bytes that [`PciHotplug`] answers from `layout::HOTPLUG_OFFSET`.
pub const PCI_HOTPLUG_BYTES: u64 = ACPI_REGISTERS_BYTES - HOTPLUG_OFFSET;
/// The bytes of the two registers that tell a segment's events.
const EVENT_STRIDE: u64 = 8;
const EVENTS_END: u64 = EVENT_STRIDE * SEGMENT_COUNT as u64;
/// The bytes of the register that tells what is in a segment.
const PRESENT_STRIDE: u64 = 4;
const PRESENT_END: u64 = HOTPLUG_PRESENT_OFFSET + PRESENT_STRIDE * SEGMENT_COUNT as u64;
const LABEL_END: u64 = HOTPLUG_LABEL_OFFSET + HOTPLUG_LABEL_BYTES as u64;

const _: () = assert!(EVENTS_END <= HOTPLUG_PRESENT_OFFSET && PRESENT_END <= HOTPLUG_EJECT_OFFSET);
// A name has at most as many UTF-16 units as bytes of UTF-8, and a final zero.
const _: () = assert!(2 * (SlotLabel::MAX_BYTES + 1) <= HOTPLUG_LABEL_BYTES);

/// Hears what the guest does with slots. Implemented by the supervisor's mailbox; never blocks.
pub trait SlotListener: Send + Sync {
    /// The guest has let go of the device at `bdf` and does not see it any more. `asked` tells whether it was asked to;
    /// one that was not is the guest's own affair.
    fn ejected(&self, bdf: Bdf, asked: bool);
}

/// The register file and the hot-pluggable devices; the unit `pci-hotplug`.
pub struct PciHotplug {
    acpi: Arc<AcpiDevice>,
    pci: Arc<PciRoot>,
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
    /// Makes the registers of a machine without hot-pluggable devices. Events go through `acpi`; devices are in slots of
    /// `pci` and have their registers on `mmio`.
    pub fn new(acpi: Arc<AcpiDevice>, pci: Arc<PciRoot>, mmio: Bus, listener: Arc<dyn SlotListener>) -> Self {
        Self {
            acpi,
            pci,
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
    /// it without being asked. A guest that has not let go of the one before is asked for that again: it may have
    /// forgotten (a kernel that starts another one). `false` when there is no such device, or the guest has let go of it
    /// as it was asked to.
    pub fn offer(&self, bdf: Bdf) -> bool {
        let mut state = self.lock();
        if !state.offer(bdf) {
            return false;
        }
        if state.remnants.contains_key(&bdf) {
            state.request_eject(bdf);
        } else {
            state.note_changed(bdf);
        }
        drop(state);
        self.acpi.raise(GedEvent::PciHotplug);
        true
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

    /// Tells the guest that the device at `bdf` was taken by force. What is left of it is kept until the guest's driver
    /// has let go of the device.
    pub fn tell_taken(&self, bdf: Bdf, left: Box<dyn Orphan>) {
        let mut state = self.lock();
        state.remnants.insert(bdf, left);
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

    pub(super) fn restored_remnant(&self, range: Option<Range<u64>>) -> Result<Box<dyn Orphan>, BusError> {
        remnant::restored(&self.mmio, range)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for PciHotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        let word = match (offset, data.len()) {
            (0..EVENTS_END, 4) if offset.is_multiple_of(4) => {
                let segment = (offset / EVENT_STRIDE) as usize;
                if offset.is_multiple_of(EVENT_STRIDE) {
                    state.changed.get_mut(segment).map_or(0, std::mem::take)
                } else {
                    state.take_eject_requests(segment)
                }
            }
            (HOTPLUG_PRESENT_OFFSET..PRESENT_END, 4) if offset.is_multiple_of(PRESENT_STRIDE) => {
                let segment = (offset - HOTPLUG_PRESENT_OFFSET) / PRESENT_STRIDE;
                self.pci.present(segment as u16)
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

/// The `_DSM` interface of PCI devices (PCI Firmware 3.3 §4.6).
const PCI_DSM_UUID: &str = "E5C937D0-3553-4D7A-9117-EA4D19C3434D";
/// `_DSM` function 7: the device's name (PCI Firmware 3.3 §4.6.7).
const DSM_NAME: u8 = 7;
/// What function 0 of a slot with a name tells: functions 0 and 7 are there.
const DSM_FUNCTIONS: u8 = 1 << DSM_NAME | 1;
/// Notification: look at the device (ACPI 6.5 table 5.162).
const DEVICE_CHECK: u8 = 1;
/// Notification: let go of the device (ACPI 6.5 table 5.162).
const EJECT_REQUEST: u8 = 3;

/// `_STA` of a slot with a device: present, enabled, shown and functioning (ACPI 6.5 §6.3.7).
const STATUS_PRESENT: u8 = 0b1111;

/// The scan that `_EVT` calls.
pub fn scan() -> MethodCall<'static> {
    MethodCall::new("\\_SB_.HPSC".into(), Vec::new())
}

/// Writes the registers and the shared methods, for the scope `\_SB`.
pub fn shared(aml: &mut Vec<u8>) {
    registers(aml);
    name_method(aml);
    scan_method(aml);
}

fn registers(aml: &mut Vec<u8>) {
    let base = ACPI_REGISTERS_BASE + HOTPLUG_OFFSET;
    let base = u32::try_from(base).expect("the platform's registers lie below 4 GiB");
    let label_bits = 8 * HOTPLUG_LABEL_BYTES;
    let length = HOTPLUG_LABEL_OFFSET as u8 + HOTPLUG_LABEL_BYTES as u8;
    OpRegion::new("HPRG".into(), OpRegionSpace::SystemMemory, &base, &length).to_aml_bytes(aml);
    let field = |access, fields| {
        Field::new(
            "HPRG".into(),
            access,
            FieldLockRule::NoLock,
            FieldUpdateRule::WriteAsZeroes,
            fields,
        )
    };
    let reserved = |from: u64, to: u64| FieldEntry::Reserved(8 * (to - from) as usize);
    let mut words = Vec::new();
    for segment in 0..SEGMENT_COUNT {
        words.push(FieldEntry::Named(field_of(b'C', segment), 32));
        words.push(FieldEntry::Named(field_of(b'E', segment), 32));
    }
    words.push(reserved(EVENTS_END, HOTPLUG_PRESENT_OFFSET));
    for segment in 0..SEGMENT_COUNT {
        words.push(FieldEntry::Named(field_of(b'P', segment), 32));
    }
    words.push(reserved(PRESENT_END, HOTPLUG_EJECT_OFFSET));
    words.push(FieldEntry::Named(*b"HPEJ", 32));
    words.push(FieldEntry::Named(*b"HPSL", 32));
    words.push(FieldEntry::Named(*b"HPIX", 32));
    field(FieldAccessType::DWord, words).to_aml_bytes(aml);
    let label = vec![
        reserved(0, HOTPLUG_LABEL_OFFSET),
        FieldEntry::Named(*b"HPLB", label_bits),
    ];
    field(FieldAccessType::QWord, label).to_aml_bytes(aml);
}

/// `HPC0`, `HPE0`, `HPP0`: the slots of a segment that changed, those to let go of, and those with a device.
fn field_of(kind: u8, segment: u16) -> [u8; 4] {
    let digit = b'0' + u8::try_from(segment).expect("there are few segments");
    [b'H', b'P', kind, digit]
}

fn field_path(kind: u8, segment: u16) -> Path {
    Path::new(&String::from_utf8_lossy(&field_of(kind, segment)))
}

/// `HPNM`: functions 0 and 7 of a slot's `_DSM`. A register is read for these two functions alone.
fn name_method(aml: &mut Vec<u8>) {
    let (uuid, function, number) = (Arg(0), Arg(1), Arg(2));
    let (index, answer) = (Local(0), Local(1));
    let none = BufferData::new(vec![0]);
    let functions = BufferData::new(vec![DSM_FUNCTIONS]);
    let asked = ShiftLeft::new(&ZERO, &1u8, &function);
    let label = Path::new("HPLB");
    let empty = Package::new(vec![&ZERO, &ZERO]);
    let (first, second) = (
        Index::new(&ZERO, &answer, &ZERO),
        Index::new(&ZERO, &answer, &1u8),
    );
    Method::new(
        "HPNM".into(),
        3,
        true,
        vec![
            &If::new(
                &Equal::new(&uuid, &Uuid::new(PCI_DSM_UUID)),
                vec![&If::new(
                    &And::new(&ZERO, &asked, &DSM_FUNCTIONS),
                    vec![
                        &Store::new(&Path::new("HPSL"), &number),
                        &Store::new(&index, &Path::new("HPIX")),
                        &If::new(
                            &index,
                            vec![
                                &If::new(&Equal::new(&function, &ZERO), vec![&Return::new(&functions)]),
                                &Store::new(&answer, &empty),
                                &Store::new(&first, &index),
                                &Store::new(&second, &label),
                                &Return::new(&answer),
                            ],
                        ),
                    ],
                )],
            ),
            &Return::new(&none),
        ],
    )
    .to_aml_bytes(aml);
}

/// `HPSC`: reading the bits clears them, so each is told once.
fn scan_method(aml: &mut Vec<u8>) {
    let mut body = Vec::new();
    for segment in 0..SEGMENT_COUNT {
        for (kind, code) in [(b'C', DEVICE_CHECK), (b'E', EJECT_REQUEST)] {
            let bits = field_path(kind, segment);
            let notify = Path::new(&format!("\\_SB_.PC{segment:02X}.HPNT"));
            MethodCall::new(notify, vec![&bits, &code]).to_aml_bytes(&mut body);
        }
    }
    Method::new("HPSC".into(), 0, true, vec![&Raw(body)]).to_aml_bytes(aml);
}

/// The slots of a host bridge, for its scope, from the first that a device can have.
pub struct SlotDevices {
    /// The bridge's segment.
    pub segment: u16,
    /// The first slot with a device of the user.
    pub first_slot: u8,
}

impl Aml for SlotDevices {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        presence(self.segment, sink);
        let mut notifications = Vec::new();
        MethodCall::new("HPRF".into(), Vec::new()).to_aml_bytes(&mut notifications);
        let slots = self.first_slot..Bdf::SLOT_COUNT;
        for bdf in slots.filter_map(|slot| Bdf::new(self.segment, slot)) {
            slot(bdf).iter().for_each(|byte| sink.byte(*byte));
            let bit = 1u32 << bdf.slot();
            If::new(
                &And::new(&ZERO, &Arg(0), &bit),
                vec![&Notify::new(&slot_path(bdf), &Arg(1))],
            )
            .to_aml_bytes(&mut notifications);
        }
        let notifications = Raw(notifications);
        let news = If::new(&Arg(0), vec![&notifications]);
        Method::new("HPNT".into(), 2, true, vec![&news]).to_aml_bytes(sink);
    }
}

/// What `_STA` answers from: the copy, how it is made, and how a slot asks it.
fn presence(segment: u16, sink: &mut dyn AmlSink) {
    let (is_known, copy) = (Path::new("HPKN"), Path::new("HPPR"));
    let register = field_path(b'P', segment);
    Name::new("HPKN".into(), &ZERO).to_aml_bytes(sink);
    Name::new("HPPR".into(), &ZERO).to_aml_bytes(sink);
    let stores = [Store::new(&copy, &register), Store::new(&is_known, &ONE)];
    Method::new("HPRF".into(), 0, false, vec![&stores[0], &stores[1]]).to_aml_bytes(sink);
    Method::new(
        "HPST".into(),
        1,
        false,
        vec![
            &If::new(
                &Equal::new(&is_known, &ZERO),
                vec![&MethodCall::new("HPRF".into(), Vec::new())],
            ),
            &If::new(
                &And::new(&ZERO, &copy, &Arg(0)),
                vec![&Return::new(&STATUS_PRESENT)],
            ),
            &Return::new(&ZERO),
        ],
    )
    .to_aml_bytes(sink);
}

fn slot_path(bdf: Bdf) -> Path {
    Path::new(&format!("S{:02X}_", bdf.slot()))
}

fn slot(bdf: Bdf) -> Vec<u8> {
    let address = u32::from(bdf.slot()) << 16;
    let number = number_of(bdf);
    let bit = 1u32 << bdf.slot();
    let status = MethodCall::new("HPST".into(), vec![&bit]);
    let copy = MethodCall::new("HPRF".into(), Vec::new());
    let name = MethodCall::new("HPNM".into(), vec![&Arg(0), &Arg(2), &number]);
    let mut aml = Vec::new();
    Device::new(
        slot_path(bdf),
        vec![
            &Name::new("_ADR".into(), &address),
            &Name::new("_SUN".into(), &number),
            &Method::new("_STA".into(), 0, false, vec![&Return::new(&status)]),
            &Method::new(
                "_EJ0".into(),
                1,
                false,
                vec![&Store::new(&Path::new("HPEJ"), &number), &copy],
            ),
            &Method::new("_DSM".into(), 4, false, vec![&Return::new(&name)]),
        ],
    )
    .to_aml_bytes(&mut aml);
    aml
}

/// AML that is written already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}
