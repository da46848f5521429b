//! The contract of a unit: one component of a VM that holds state the guest can see.
//!
//! vCPUs, interrupt controllers, devices and clocks are units. The VM's supervisor calls these verbs and nothing
//! else; a unit never calls the supervisor except through the listeners below. Every verb is mandatory, saving
//! included, so that a component added later cannot be forgotten by a checkpoint.
//!
//! Order of a pause: all vCPUs are parked first, then [`Unit::pause`] is called on every unit; the VM counts as
//! paused when the last [`PauseTicket`] is dropped. Order of a resume: units first, then vCPUs. Order of a restore:
//! guest RAM, because devices look into their rings; vCPUs, because the interrupt controllers deliver what they hold to
//! them; then the other units in the order in which they were built.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::ids::UnitName;

/// One component of a VM with state that the guest can see.
pub trait Unit: Send + Sync {
    /// The name of the unit, unique in its VM and the same after save and restore.
    fn name(&self) -> UnitName;

    /// Returns to the state after power-on. Called while every vCPU is parked; on return the unit touches no
    /// guest memory and holds no interrupt.
    fn reset(&self);

    /// Stops starting new work. The unit keeps `ticket` until it is quiet (nothing in flight touches guest memory)
    /// and drops it then; it must not block. Calling it on a paused unit is allowed.
    fn pause(&self, ticket: PauseTicket);

    /// Continues after [`Unit::pause`]. Work that arrived meanwhile is done now.
    fn resume(&self);

    /// The unit's state as a section. Called while the unit is paused and quiet.
    ///
    /// # Errors
    /// [`SaveError`] when the host refuses to tell a part of the state.
    fn save(&self) -> Result<Section, SaveError>;

    /// Takes over a saved state. Called on a freshly reset unit before any vCPU runs. The section is untrusted.
    ///
    /// # Errors
    /// [`RestoreError`] when the section is of an unknown schema or holds an impossible value; the unit is then
    /// in an unspecified but safe state and the VM must not be started.
    fn restore(&self, section: &Section) -> Result<(), RestoreError>;

    /// What the unit is doing, for people and tools. Never blocks on the guest or on I/O.
    fn inspect(&self) -> Value;
}

/// A unit's promise to be quiet soon; it is kept when the ticket is dropped.
///
/// All clones of one pause share a barrier; when the last of them goes, the barrier's owner is told.
#[derive(Clone)]
pub struct PauseTicket {
    _barrier: Arc<PauseBarrier>,
}

impl PauseTicket {
    /// Makes the first ticket of a pause. `when_quiet` runs once, on whichever thread drops the last clone; it must
    /// not block.
    pub fn new(when_quiet: impl FnOnce() + Send + Sync + 'static) -> Self {
        Self {
            _barrier: Arc::new(PauseBarrier {
                when_quiet: Some(Box::new(when_quiet)),
            }),
        }
    }
}

impl fmt::Debug for PauseTicket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PauseTicket")
    }
}

struct PauseBarrier {
    when_quiet: Option<Box<dyn FnOnce() + Send + Sync>>,
}

impl Drop for PauseBarrier {
    fn drop(&mut self) {
        if let Some(when_quiet) = self.when_quiet.take() {
            when_quiet();
        }
    }
}

/// The saved state of one unit: a schema number and a JSON body.
#[derive(Debug, Clone, PartialEq)]
pub struct Section {
    /// The version of the body's form, counted from 1 for each kind of unit.
    pub schema: u32,
    /// The body, as the unit's own frozen type wrote it.
    pub body: Value,
}

impl Section {
    /// Writes `state` as a section of `schema`.
    ///
    /// # Errors
    /// [`SaveError::Encode`] when the state cannot be expressed as JSON.
    pub fn encode(schema: u32, state: &impl Serialize) -> Result<Self, SaveError> {
        Ok(Self {
            schema,
            body: serde_json::to_value(state)?,
        })
    }

    /// Reads the body as the frozen type of `schema`.
    ///
    /// # Errors
    /// [`RestoreError::Schema`] when the section has another schema, [`RestoreError::Decode`] when the body does not
    /// have the form of that type.
    pub fn decode<T: DeserializeOwned>(&self, schema: u32) -> Result<T, RestoreError> {
        if self.schema != schema {
            return Err(RestoreError::Schema {
                have: self.schema,
                know: schema,
            });
        }
        Ok(T::deserialize(&self.body)?)
    }
}

/// Why a unit's state could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The state could not be written as JSON.
    #[error("cannot encode the state")]
    Encode(#[from] serde_json::Error),
    /// The host refused to tell a part of the state.
    #[error("the host does not give {what}")]
    Host {
        /// The part of the state, such as `lapic of vcpu 0`.
        what: String,
        /// The host's error.
        #[source]
        source: std::io::Error,
    },
}

/// Why a saved state was refused.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The section's form is not known to this library.
    #[error("schema {have} is unknown here, schema {know} is understood")]
    Schema { have: u32, know: u32 },
    /// The body does not have the form its schema says.
    #[error("the saved state is malformed")]
    Decode(#[from] serde_json::Error),
    /// A value is impossible for this unit.
    #[error("saved {field} is {value}: {reason}")]
    Value {
        field: &'static str,
        value: String,
        reason: &'static str,
    },
    /// The host refused the state.
    #[error("the host does not accept {what}")]
    Host {
        /// The part of the state, such as `lapic of vcpu 0`.
        what: String,
        /// The host's error.
        #[source]
        source: std::io::Error,
    },
}

/// What units report to the owner of the VM. Implemented by the supervisor's mailbox; never blocks.
pub trait UnitListener: Send + Sync {
    /// The driver of the unit became ready (`DRIVER_OK`) or went away (device reset).
    fn driver_ready(&self, unit: &UnitName, ready: bool);

    /// The guest's driver broke the rules and the device waits for a reset (virtio 1.2 §2.1.2 DEVICE_NEEDS_RESET).
    fn needs_reset(&self, unit: &UnitName, reason: &str);
}

/// What the guest asks of the platform through ports and ACPI registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerRequest {
    /// The guest switched itself off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset (i8042, ACPI reset register, port 0xcf9).
    Reset,
    /// The guest reported its own panic (pvpanic).
    Panicked,
}

/// Receives the guest's power requests. Implemented by the supervisor's mailbox; never blocks.
pub trait PowerListener: Send + Sync {
    /// The guest, on whatever vCPU, made `request`.
    fn power_request(&self, request: PowerRequest);
}

/// What the frozen saved forms are tested with.
#[cfg(test)]
pub(crate) mod testing {
    use serde::Serialize;
    use serde::de::DeserializeOwned;

    /// A form reads `text` and writes it again, byte for byte: a saved state of another day stays readable.
    pub(crate) fn same_bytes<T: Serialize + DeserializeOwned>(text: &str) {
        let form: T = serde_json::from_str(text).expect("this is the form");
        assert_eq!(serde_json::to_string(&form).expect("it encodes"), text);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn quiet_is_told_once_when_the_last_ticket_goes() {
        let count = Arc::new(AtomicU32::new(0));
        let seen = count.clone();
        let first = PauseTicket::new(move || {
            seen.fetch_add(1, Ordering::SeqCst);
        });
        let second = first.clone();
        drop(first);
        assert_eq!(count.load(Ordering::SeqCst), 0);
        drop(second);
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_section_of_another_schema_is_refused_by_number() {
        let section = Section::encode(2, &7u32).expect("a number encodes");
        assert_eq!(
            section
                .decode::<u32>(1)
                .expect_err("schema 2 is not 1")
                .to_string(),
            "schema 2 is unknown here, schema 1 is understood"
        );
        assert_eq!(section.decode::<u32>(2).expect("same schema"), 7);
    }
}
