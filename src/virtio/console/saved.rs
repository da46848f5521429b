//! The frozen saved form of the console. Host ends are not part of it: after a restore the guest is told that they
//! are closed, and sees them open when the embedder connects new ones. One that is connected before the VM is resumed
//! gets what the guest had waiting, from the next whole buffer on; otherwise that is lost. What is read here is
//! untrusted.

use serde::{Deserialize, Serialize};

use super::control::Dialogue;
use super::port::Port;
use crate::unit::RestoreError;

/// The ports in the order of their numbers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ConsoleV1 {
    ports: Vec<PortV1>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PortV1 {
    name: String,
    ready: bool,
    guest_open: bool,
    told_open: bool,
    owes_add: bool,
    owes_console: bool,
    owes_name: bool,
    /// A part of the next buffer to transmit was sent.
    partly_sent: bool,
}

impl ConsoleV1 {
    /// The saved form of `ports`.
    pub(super) fn new(ports: &[Port]) -> Self {
        Self {
            ports: ports.iter().map(PortV1::new).collect(),
        }
    }

    /// Gives `ports` their saved state.
    ///
    /// # Errors
    /// [`RestoreError::Value`] when these are not the ports that were saved; no port has changed then.
    pub(super) fn apply(self, ports: &mut [Port]) -> Result<(), RestoreError> {
        let Self { ports: saved } = self;
        let value = |value: String, reason| RestoreError::Value {
            field: "ports",
            value,
            reason,
        };
        if saved.len() != ports.len() {
            let count = format!("{} ports", saved.len());
            return Err(value(count, "the console has another number of ports"));
        }
        if let Some((saved, _)) = saved
            .iter()
            .zip(&*ports)
            .find(|(saved, port)| saved.name != port.name.as_str())
        {
            let name = saved.name.chars().take(64).collect();
            return Err(value(name, "the port in this place has another name"));
        }
        for (saved, port) in saved.into_iter().zip(ports) {
            saved.apply(port);
        }
        Ok(())
    }
}

impl PortV1 {
    fn new(port: &Port) -> Self {
        let Dialogue {
            ready,
            guest_open,
            told_open,
            owes_add,
            owes_console,
            owes_name,
        } = port.dialogue;
        Self {
            name: port.name.as_str().to_owned(),
            ready,
            guest_open,
            told_open,
            owes_add,
            owes_console,
            owes_name,
            partly_sent: port.transmit_offset_bytes > 0,
        }
    }

    fn apply(self, port: &mut Port) {
        let Self {
            name: _,
            ready,
            guest_open,
            told_open,
            owes_add,
            owes_console,
            owes_name,
            partly_sent,
        } = self;
        port.dialogue = Dialogue {
            ready,
            guest_open,
            told_open,
            owes_add,
            owes_console,
            owes_name,
        };
        port.transmit_offset_bytes = u32::from(partly_sent);
        port.abandon_chain();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::testing::same_bytes;

    #[test]
    fn schema_1_reads_and_writes_these_bytes() {
        let text = concat!(
            r#"{"ports":[{"name":"agent","ready":true,"guest_open":true,"told_open":true,"owes_add":false,"#,
            r#""owes_console":false,"owes_name":true,"partly_sent":true}]}"#
        );
        same_bytes::<ConsoleV1>(text);
    }
}
