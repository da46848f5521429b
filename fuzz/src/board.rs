//! The devices at fixed ports and addresses, as every machine has them.

use std::sync::Arc;

use vm_lifecycle::acpi::device::{ACPI_DEVICE_BYTES, AcpiDevice};
use vm_lifecycle::acpi::pvpanic::{PVPANIC_PORT, Pvpanic};
use vm_lifecycle::bus::{Bus, BusClaim};
use vm_lifecycle::legacy::i8042::I8042;
use vm_lifecycle::legacy::reset_control::ResetControl;
use vm_lifecycle::legacy::rtc::{RTC_PORT_COUNT, Rtc};
use vm_lifecycle::legacy::serial::Serial;
use vm_lifecycle::machine::fake::FakeVm;
use vm_lifecycle::machine::gsi::GsiTable;
use vm_lifecycle::memory::layout::{
    ACPI_REGISTERS_BASE, GED_GSI, I8042_COMMAND_PORT, RESET_CONTROL_PORT, RTC_PORT, SERIAL_GSI, SERIAL_PORT,
    SERIAL_PORT_COUNT,
};
use vm_lifecycle::unit::Unit;

use crate::Deaf;

/// The first port of each device.
pub const PORTS: [u16; 5] = [
    SERIAL_PORT,
    RTC_PORT,
    I8042_COMMAND_PORT,
    RESET_CONTROL_PORT,
    PVPANIC_PORT,
];

/// The devices on their buses.
pub struct Board {
    pub pio: Bus,
    pub mmio: Bus,
    pub serial: Arc<Serial>,
    pub acpi: Arc<AcpiDevice>,
    pub units: Vec<Arc<dyn Unit>>,
    _claims: Vec<BusClaim>,
}

impl Default for Board {
    fn default() -> Self {
        let gsi = GsiTable::new(Arc::new(FakeVm::default()));
        let line = |pin| gsi.line(pin).expect("the fake refuses nothing");
        let (pio, mmio) = (Bus::new(), Bus::new());
        let serial = Arc::new(Serial::new(line(SERIAL_GSI), Box::new(std::io::sink()), || ()));
        let acpi = Arc::new(AcpiDevice::new(line(GED_GSI), Arc::new(Deaf)));
        let rtc = Arc::new(Rtc::new());
        let pvpanic = Arc::new(Pvpanic::new(Arc::new(Deaf)));
        let claims = [
            pio.claim(SERIAL_PORT.into(), SERIAL_PORT_COUNT.into(), serial.clone()),
            pio.claim(RTC_PORT.into(), RTC_PORT_COUNT.into(), rtc.clone()),
            pio.claim(I8042_COMMAND_PORT.into(), 1, Arc::new(I8042::new(Arc::new(Deaf)))),
            pio.claim(
                RESET_CONTROL_PORT.into(),
                1,
                Arc::new(ResetControl::new(Arc::new(Deaf))),
            ),
            pio.claim(PVPANIC_PORT.into(), 1, pvpanic.clone()),
            mmio.claim(ACPI_REGISTERS_BASE, ACPI_DEVICE_BYTES, acpi.clone()),
        ];
        Self {
            pio,
            mmio,
            units: vec![serial.clone(), acpi.clone(), rtc, pvpanic],
            serial,
            acpi,
            _claims: claims.map(|claim| claim.expect("no two devices meet")).into(),
        }
    }
}
