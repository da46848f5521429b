//! The DSDT: the devices that the guest cannot find by probing (ACPI 6.5 §5.2.11.1).
//!
//! ```text
//! \_S5                       power off
//! \_SB  PC00 … PC03          one host bridge per PCI segment: bus 0, a 32-bit memory window, _OSC, hot-plug slots
//!       MBRD                 addresses that belong to the platform: ECAM, ACPI registers
//!       COM1 RTC_ PEVT       serial port, real-time clock, panic port
//!       PWRB GED_            power button and the events that reach it
//! ```
//!
//! No object here touches a register before an event came, but for what is in a slot and its name: there are no other
//! `_STA` and no `_INI` methods, all resources are constant, and processors are in the MADT alone.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, Field,
    FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed,
    Method, Name, NotEqual, Notify, OpRegion, OpRegionSpace, Or, Package, Path, ResourceTemplate, Return,
    Scope, Store, Uuid, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::ged::GedEvent;
use super::pci_hotplug::registers as hotplug;
use super::power::SLP_TYP_S5;
use super::pvpanic::PVPANIC_PORT;
use crate::config::first_slot;
use crate::memory::layout;

/// The interface of `_OSC` for PCI host bridges (PCI Firmware 3.3 §4.5.1).
const OSC_UUID: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
/// What `_OSC` leaves to the guest: PME, AER and the PCI Express capability. Hot-plug stays with ACPI, and so this
/// omits bit 0 (PCI Express native hot-plug) and bit 1 (SHPC).
const OSC_GRANTED: u32 = 0b1_1100;
/// `_OSC` result: the UUID is not known (PCI Firmware 3.3 table 4-6).
const OSC_UNRECOGNIZED_UUID: u8 = 1 << 2;
/// `_OSC` result: some of what was asked for is withheld.
const OSC_CAPABILITIES_MASKED: u8 = 1 << 4;
/// The notification of a pressed power button (ACPI 6.5 table 5.165).
const POWER_BUTTON_PRESSED: u8 = 0x80;

/// Writes the body of the DSDT, without its header.
pub fn body() -> Vec<u8> {
    let mut aml = Vec::with_capacity(2048);
    sleep_states(&mut aml);
    let mut devices = Vec::with_capacity(16384);
    hotplug::shared(&mut devices);
    for segment in 0..layout::SEGMENT_COUNT {
        host_bridge(segment, &mut devices);
    }
    motherboard_resources(&mut devices);
    serial_port(&mut devices);
    real_time_clock(&mut devices);
    panic_port(&mut devices);
    power_button(&mut devices);
    generic_event_device(&mut devices);
    aml.vec(&Scope::raw("_SB_".into(), devices));
    aml
}

/// `\_S5`: the value for the sleep control register. The other three elements are unused (ACPI 6.5 §7.4.2.6).
fn sleep_states(aml: &mut Vec<u8>) {
    let s5 = Package::new(vec![&SLP_TYP_S5, &ZERO, &ZERO, &ZERO]);
    Name::new("_S5_".into(), &s5).to_aml_bytes(aml);
}

/// One PCI Express host bridge: `PNP0A08`, for older guests compatible with `PNP0A03`.
fn host_bridge(segment: u16, aml: &mut Vec<u8>) {
    let bus = AddressSpace::<u16>::new_bus_number(0, 0);
    let first = address_32(layout::mmio_window(segment));
    let last = first + (layout::MMIO_SEGMENT_BYTES - 1) as u32;
    let memory = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        first,
        last,
        None::<u32>,
    );
    Device::new(
        Path::new(&format!("PC{segment:02X}")),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &segment),
            &Name::new("_SEG".into(), &segment),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&bus, &memory])),
            &OscMethod,
            &hotplug::SlotDevices {
                segment,
                first_slot: first_slot(segment),
            },
        ],
    )
    .to_aml_bytes(aml);
}

/// `_OSC`: answers from the guest's own buffer, without an exit. The DWORDs of the buffer are status, the features
/// that the guest supports, and the control that it asks for (PCI Firmware 3.3 §4.5.1).
struct OscMethod;

impl Aml for OscMethod {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let status = Path::new("CDW1");
        let control = Path::new("CDW3");
        let granted = Local(0);
        Method::new(
            "_OSC".into(),
            4,
            true,
            vec![
                &CreateDWordField::new(&Path::new("CDW1"), &Arg(3), &ZERO),
                &If::new(
                    &Equal::new(&Arg(0), &Uuid::new(OSC_UUID)),
                    vec![
                        &CreateDWordField::new(&Path::new("CDW3"), &Arg(3), &8u8),
                        &And::new(&granted, &control, &OSC_GRANTED),
                        &If::new(
                            &NotEqual::new(&granted, &control),
                            vec![&Or::new(&status, &status, &OSC_CAPABILITIES_MASKED)],
                        ),
                        &Store::new(&control, &granted),
                    ],
                ),
                &Else::new(vec![&Or::new(&status, &status, &OSC_UNRECOGNIZED_UUID)]),
                &Return::new(&Arg(3)),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The addresses of the platform itself. Linux uses an ECAM only when it is reserved here (PCI Firmware 3.3 §4.1.2).
fn motherboard_resources(aml: &mut Vec<u8>) {
    let ecam_bytes = layout::ECAM_SEGMENT_BYTES * u64::from(layout::SEGMENT_COUNT);
    let ecam = Memory32Fixed::new(true, address_32(layout::ECAM_BASE), address_32(ecam_bytes));
    let registers = Memory32Fixed::new(
        true,
        address_32(layout::ACPI_REGISTERS_BASE),
        address_32(layout::ACPI_REGISTERS_BYTES),
    );
    Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam, &registers])),
        ],
    )
    .to_aml_bytes(aml);
}

fn serial_port(aml: &mut Vec<u8>) {
    let port = layout::SERIAL_PORT;
    let ports = IO::new(port, port, 1, layout::SERIAL_PORT_COUNT as u8);
    let interrupt = edge_interrupt(layout::SERIAL_GSI);
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    )
    .to_aml_bytes(aml);
}

/// The CMOS clock, without its interrupt: a machine that never sleeps needs no wake alarm, and a guest that is not
/// offered one does not program it.
fn real_time_clock(aml: &mut Vec<u8>) {
    let ports = IO::new(layout::RTC_PORT, layout::RTC_PORT, 1, 2);
    Device::new(
        "RTC_".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports])),
        ],
    )
    .to_aml_bytes(aml);
}

fn panic_port(aml: &mut Vec<u8>) {
    let port = IO::new(PVPANIC_PORT, PVPANIC_PORT, 1, 1);
    Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&port])),
        ],
    )
    .to_aml_bytes(aml);
}

fn power_button(aml: &mut Vec<u8>) {
    Device::new(
        "PWRB".into(),
        vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))],
    )
    .to_aml_bytes(aml);
}

/// The Generic Event Device: `_EVT` reads the select register once and notifies one device per bit.
fn generic_event_device(aml: &mut Vec<u8>) {
    let select = address_32(layout::ACPI_REGISTERS_BASE + layout::GED_SELECT_OFFSET);
    let region = OpRegion::new("ESRG".into(), OpRegionSpace::SystemMemory, &select, &4u8);
    let field = Field::new(
        "ESRG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"ESEL", 32)],
    );
    let interrupt = level_interrupt(layout::GED_GSI);
    Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
            &region,
            &field,
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &Store::new(&Local(0), &Path::new("ESEL")),
                    &When {
                        event: GedEvent::PowerButton,
                        then: &Notify::new(&Path::new("\\_SB_.PWRB"), &POWER_BUTTON_PRESSED),
                    },
                    &When {
                        event: GedEvent::PciHotplug,
                        then: &hotplug::scan(),
                    },
                ],
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// `If (Local0 & event) { then }`.
struct When<'a> {
    event: GedEvent,
    then: &'a dyn Aml,
}

impl Aml for When<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let bit = self.event.bit();
        let (events, nowhere) = (Local(0), ZERO);
        let is_pending = And::new(&nowhere, &events, &bit);
        If::new(&is_pending, vec![self.then]).to_aml_bytes(sink);
    }
}

/// An exclusive, edge-triggered, active-high interrupt of the device itself.
fn edge_interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// An exclusive, level-triggered, active-high interrupt of the device itself.
fn level_interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, false, false, false, gsi)
}

/// An address or a size of the platform, which all lie below 4 GiB.
fn address_32(address: u64) -> u32 {
    u32::try_from(address).expect("the platform's registers lie below 4 GiB")
}
