//! The frozen saved forms of the ACPI register pages and of the panic port. All are read from untrusted sections.

use serde::{Deserialize, Serialize};

use super::ged::GedEvent;
use crate::ids::Bdf;
use crate::unit::RestoreError;

/// The schema of [`AcpiStateV1`].
pub const ACPI_SCHEMA: u32 = 1;
/// The schema of [`SavedPciHotplugV1`].
pub const PCI_HOTPLUG_SCHEMA: u32 = 1;
/// The schema of [`PvpanicStateV1`].
pub const PVPANIC_SCHEMA: u32 = 1;

/// The state of the ACPI register page, schema 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AcpiStateV1 {
    /// The select register: events that the guest has not read.
    pub ged_pending: u32,
}

impl AcpiStateV1 {
    /// Checks the values.
    ///
    /// # Errors
    /// [`RestoreError::Value`] when an event is pending that does not exist.
    pub fn checked(self) -> Result<Self, RestoreError> {
        if self.ged_pending & !GedEvent::ALL_BITS != 0 {
            return Err(RestoreError::Value {
                field: "ged_pending",
                value: format!("{:#x}", self.ged_pending),
                reason: "it names events that this machine does not have",
            });
        }
        Ok(self)
    }
}

/// The state of the PCI hot-plug registers, schema 1. Which devices there are and what they are called is
/// configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedPciHotplugV1 {
    /// The slots of each segment that the guest has not looked at, a bit each.
    pub changed: [u32; 4],
    /// The slots of each segment that the guest shall let go of and was not told of, a bit each.
    pub eject_requests: [u32; 4],
    /// The select register.
    pub select: u32,
    /// The slots whose device the guest does not see: it has ejected it and the host has not taken it away.
    pub ejected: Vec<Bdf>,
    /// The slots whose device the guest was asked to let go of.
    pub asked: Vec<Bdf>,
    /// The slots of which the guest was told to let go and has not answered.
    pub unanswered: Vec<SavedUnansweredV1>,
    /// What is left of devices that were taken by force; one that is there since waits among the `ejected`.
    pub remnants: Vec<SavedRemnantV1>,
}

/// How often the guest was told to let go of a slot and has not answered, schema 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedUnansweredV1 {
    /// The slot.
    pub bdf: Bdf,
    /// How often, at least once.
    pub count: u32,
}

/// What is left of a device that was taken by force, schema 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedRemnantV1 {
    /// The slot.
    pub bdf: Bdf,
    /// Where its registers were, if they answered: the first address, and how many.
    pub bar: Option<(u64, u64)>,
}

/// The state of the panic port, schema 1: it holds none, and says so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PvpanicStateV1 {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::testing::same_bytes;

    #[test]
    fn schema_1_reads_and_writes_these_bytes() {
        let text = r#"{"ged_pending":3}"#;
        same_bytes::<AcpiStateV1>(text);
    }

    #[test]
    fn hot_plug_schema_1_reads_and_writes_these_bytes() {
        let text = concat!(
            r#"{"changed":[256,0,0,1],"eject_requests":[0,2,0,0],"select":40,"ejected":["0001:00:1f.0"],"#,
            r#""asked":["0001:00:01.0"],"unanswered":[{"bdf":"0000:00:1f.0","count":2}],"#,
            r#""remnants":[{"bdf":"0003:00:1f.0","bar":[3221225472,16384]},{"bdf":"0002:00:01.0","bar":null}]}"#,
        );
        same_bytes::<SavedPciHotplugV1>(text);
    }

    #[test]
    fn the_panic_ports_schema_1_reads_and_writes_these_bytes() {
        let text = r#"{}"#;
        same_bytes::<PvpanicStateV1>(text);
    }
}
