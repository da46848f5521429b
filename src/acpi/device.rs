//! The page of ACPI registers: what the guest's AML and its ACPI core read and write.
//!
//! | offset | width | register | read | write |
//! |---|---|---|---|---|
//! | 0x000 | 4 | GED select | pending events, clears them | ignored |
//! | 0x100 | 1 | sleep control | 0 | `SLP_EN` with type 5 switches off |
//! | 0x101 | 1 | sleep status | 0 | ignored |
//! | 0x102 | 1 | reset | 0 | 0x42 resets |
//!
//! An access of another width or elsewhere reads as all ones and changes nothing. The PCI hot-plug registers have the
//! next page and a device of their own.

use std::sync::Arc;

use serde_json::{Value, json};

use super::ged::{Ged, GedEvent};
use super::power;
use super::saved::{ACPI_SCHEMA, AcpiStateV1};
use crate::bus::BusDevice;
use crate::ids::UnitName;
use crate::machine::gsi::IrqLine;
use crate::memory::layout::{
    GED_SELECT_OFFSET, HOTPLUG_OFFSET, RESET_OFFSET, SLEEP_CONTROL_OFFSET, SLEEP_STATUS_OFFSET,
};
use crate::unit::{PauseTicket, PowerListener, PowerRequest, RestoreError, SaveError, Section, Unit};

/// The number of bytes that [`AcpiDevice`] answers from `layout::ACPI_REGISTERS_BASE`.
pub const ACPI_DEVICE_BYTES: u64 = HOTPLUG_OFFSET;

/// The ACPI register page; the unit `acpi`.
pub struct AcpiDevice {
    ged: Ged,
    power: Arc<dyn PowerListener>,
}

impl AcpiDevice {
    /// Makes the page. `line` is connected to `layout::GED_GSI`; `power` hears power-off and reset.
    pub fn new(line: IrqLine, power: Arc<dyn PowerListener>) -> Self {
        Self {
            ged: Ged::new(line),
            power,
        }
    }

    /// Presses the power button once. The guest decides what it does about it; nothing here waits for that. Pressed
    /// while the device is paused, the button reaches the guest when it is resumed.
    pub fn press_power_button(&self) {
        self.ged.raise(GedEvent::PowerButton);
    }

    /// Tells the guest of `event`, or does so when the device is resumed.
    pub fn raise(&self, event: GedEvent) {
        self.ged.raise(event);
    }

    fn request(&self, request: Option<PowerRequest>) {
        if let Some(request) = request {
            self.power.power_request(request);
        }
    }
}

impl BusDevice for AcpiDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (GED_SELECT_OFFSET, 4) => data.copy_from_slice(&self.ged.take_pending().to_le_bytes()),
            (SLEEP_CONTROL_OFFSET | SLEEP_STATUS_OFFSET | RESET_OFFSET, 1) => data.fill(0),
            _ => data.fill(0xFF),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (SLEEP_CONTROL_OFFSET, [value]) => self.request(power::sleep_control(*value)),
            (RESET_OFFSET, [value]) => self.request(power::reset(*value)),
            _ => {}
        }
    }
}

impl Unit for AcpiDevice {
    fn name(&self) -> UnitName {
        UnitName::new("acpi").expect("a short name")
    }

    fn reset(&self) {
        self.ged.set_pending(0);
    }

    fn pause(&self, _ticket: PauseTicket) {
        self.ged.pause();
    }

    fn resume(&self) {
        self.ged.resume();
    }

    fn save(&self) -> Result<Section, SaveError> {
        let state = AcpiStateV1 {
            ged_pending: self.ged.pending(),
        };
        Section::encode(ACPI_SCHEMA, &state)
    }

    fn restore(&self, section: &Section) -> Result<(), RestoreError> {
        let AcpiStateV1 { ged_pending } = section.decode::<AcpiStateV1>(ACPI_SCHEMA)?.checked()?;
        self.ged.set_pending(ged_pending);
        Ok(())
    }

    fn inspect(&self) -> Value {
        json!({ "ged_pending": self.ged.pending() })
    }
}
