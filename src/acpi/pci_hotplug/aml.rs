//! The AML of hot-plug: one device per slot below its host bridge, and the methods that they share in `\_SB`.
//!
//! ```text
//! \_SB  HPRG                    the registers
//!       HPNM (uuid, function, number)   Serialized: selects a slot and reads its name
//!       HPSC ()                 notifies the slots that changed or shall be let go of, segment by segment
//! PCxx  HPNT (bits, code)       Notify (Sxx, code) for each bit
//!       Sxx_                    _ADR _SUN _EJ0 _DSM
//! ```
//! A slot costs the guest's boot one object and its AML some sixty bytes. `_SUN` is the slot's number over all
//! segments, because Linux names slots by it and names are unique there. The label is a buffer of UTF-16 as PCI Firmware
//! 3.3 §4.6.7 wants its string; Linux makes UTF-8 of it (`drivers/pci/pci-label.c`), surrogate pairs included, where an
//! AML string may hold ASCII only.

use acpi_tables::aml::{
    And, Arg, BufferData, Device, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule,
    If, Index, Local, Method, MethodCall, Name, Notify, OpRegion, OpRegionSpace, Package, Path, Return,
    ShiftLeft, Store, Uuid, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::registers::{SEGMENT_STRIDE, number_of};
use crate::ids::Bdf;
use crate::memory::layout;

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
    let base = layout::ACPI_REGISTERS_BASE + layout::HOTPLUG_OFFSET;
    let base = u32::try_from(base).expect("the platform's registers lie below 4 GiB");
    let label_bits = 8 * layout::HOTPLUG_LABEL_BYTES;
    let length = layout::HOTPLUG_LABEL_OFFSET as u8 + layout::HOTPLUG_LABEL_BYTES as u8;
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
    for segment in 0..layout::SEGMENT_COUNT {
        words.push(FieldEntry::Named(event_field(b'C', segment), 32));
        words.push(FieldEntry::Named(event_field(b'E', segment), 32));
    }
    let segments_end = SEGMENT_STRIDE * u64::from(layout::SEGMENT_COUNT);
    words.push(reserved(segments_end, layout::HOTPLUG_EJECT_OFFSET));
    words.push(FieldEntry::Named(*b"HPEJ", 32));
    words.push(FieldEntry::Named(*b"HPSL", 32));
    words.push(FieldEntry::Named(*b"HPIX", 32));
    field(FieldAccessType::DWord, words).to_aml_bytes(aml);
    let label = vec![
        reserved(0, layout::HOTPLUG_LABEL_OFFSET),
        FieldEntry::Named(*b"HPLB", label_bits),
    ];
    field(FieldAccessType::QWord, label).to_aml_bytes(aml);
}

/// `HPC0`, `HPE0`: the slots of a segment that changed, and those to let go of.
fn event_field(kind: u8, segment: u16) -> [u8; 4] {
    let digit = b'0' + u8::try_from(segment).expect("there are few segments");
    [b'H', b'P', kind, digit]
}

fn event_path(kind: u8, segment: u16) -> Path {
    Path::new(&String::from_utf8_lossy(&event_field(kind, segment)))
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
    for segment in 0..layout::SEGMENT_COUNT {
        for (kind, code) in [(b'C', DEVICE_CHECK), (b'E', EJECT_REQUEST)] {
            let bits = event_path(kind, segment);
            let notify = Path::new(&format!("\\_SB_.PC{segment:02X}.HPNT"));
            MethodCall::new(notify, vec![&bits, &code]).to_aml_bytes(&mut body);
        }
    }
    Method::new("HPSC".into(), 0, true, vec![&Raw(body)]).to_aml_bytes(aml);
}

/// The slots of a host bridge, for its scope, from the first that a device can have.
pub struct Slots {
    /// The bridge's segment.
    pub segment: u16,
    /// The first slot with a device of the user.
    pub first_slot: u8,
}

impl Aml for Slots {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let mut notifications = Vec::new();
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
        Method::new("HPNT".into(), 2, true, vec![&Raw(notifications)]).to_aml_bytes(sink);
    }
}

fn slot_path(bdf: Bdf) -> Path {
    Path::new(&format!("S{:02X}_", bdf.slot()))
}

fn slot(bdf: Bdf) -> Vec<u8> {
    let address = u32::from(bdf.slot()) << 16;
    let number = number_of(bdf);
    let name = MethodCall::new("HPNM".into(), vec![&Arg(0), &Arg(2), &number]);
    let mut aml = Vec::new();
    Device::new(
        slot_path(bdf),
        vec![
            &Name::new("_ADR".into(), &address),
            &Name::new("_SUN".into(), &number),
            &Method::new(
                "_EJ0".into(),
                1,
                false,
                vec![&Store::new(&Path::new("HPEJ"), &number)],
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
