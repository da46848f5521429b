//! The panic port: a guest's kernel reports its own panic here, so that a panic is told from a hang or a power-off.
//!
//! Linux finds it by the DSDT's device `QEMU0001` and its driver `pvpanic-mmio`. Reading the port tells which events
//! the host understands, writing sets the bits of those that happened (QEMU docs/specs/pvpanic).

use std::sync::Arc;

use serde_json::{Value, json};

use super::saved::{PVPANIC_SCHEMA, PvpanicStateV1};
use crate::bus::BusDevice;
use crate::guest_log::GuestLog;
use crate::ids::UnitName;
use crate::unit::{PauseTicket, PowerListener, PowerRequest, RestoreError, SaveError, Section, Unit};

/// The port; claim one port for it.
pub const PVPANIC_PORT: u16 = 0x505;
/// `PVPANIC_PANICKED`: the kernel panicked and nobody in the guest deals with it.
const PANICKED: u8 = 1 << 0;
/// `PVPANIC_CRASH_LOADED`: the kernel panicked and a crash kernel in the guest takes over.
const CRASH_LOADED: u8 = 1 << 1;

/// The panic port; the unit `pvpanic`. It holds no state.
pub struct Pvpanic {
    power: Arc<dyn PowerListener>,
    log: GuestLog,
}

impl Pvpanic {
    /// Makes a port that tells `power` when the guest panicked.
    pub fn new(power: Arc<dyn PowerListener>) -> Self {
        Self {
            power,
            log: GuestLog::new("pvpanic"),
        }
    }
}

impl BusDevice for Pvpanic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        match data {
            [byte] => *byte = PANICKED | CRASH_LOADED,
            _ => data.fill(0xFF),
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let [events] = data else { return };
        if events & PANICKED != 0 {
            self.power.power_request(PowerRequest::Panicked);
        } else if events & CRASH_LOADED != 0 {
            self.log
                .warn(format_args!("the guest panicked and boots its crash kernel"));
        }
    }
}

impl Unit for Pvpanic {
    fn name(&self) -> UnitName {
        UnitName::new("pvpanic").expect("a short name")
    }

    fn reset(&self) {}

    fn pause(&self, _ticket: PauseTicket) {}

    fn resume(&self) {}

    fn save(&self) -> Result<Section, SaveError> {
        Section::encode(PVPANIC_SCHEMA, &PvpanicStateV1 {})
    }

    fn restore(&self, section: &Section) -> Result<(), RestoreError> {
        let PvpanicStateV1 {} = section.decode(PVPANIC_SCHEMA)?;
        Ok(())
    }

    fn inspect(&self) -> Value {
        json!({})
    }
}
