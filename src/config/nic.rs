//! A network card on paper.

use super::builder::ConfigError;
use crate::ids::{Bdf, MacAddr, NicName, UnitName};

/// The most queue pairs that a card can have.
pub const QUEUE_PAIRS_MAX: u16 = 16;
/// The longest name of a host interface (Linux IFNAMSIZ, less the final zero).
pub const TAP_NAME_MAX_BYTES: usize = 15;

/// A network card of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicConfig {
    /// The card's name, unique in its VM.
    pub name: NicName,
    /// The host's tap interface, 1–[`TAP_NAME_MAX_BYTES`] bytes.
    pub tap: String,
    /// The number of pairs of a receive and a transmit queue, from 1 to [`QUEUE_PAIRS_MAX`].
    pub queue_pairs: u16,
    /// The card's Ethernet address, unique in its VM.
    pub mac: MacAddr,
    /// The card's PCI address.
    pub bdf: Bdf,
    /// Whether the cable is plugged in.
    pub link_up: bool,
}

impl NicConfig {
    /// The name of the card's unit.
    pub fn unit_name(&self) -> UnitName {
        UnitName::new(format!("nic-{}", self.name))
            .expect("a card's name is short and has no control characters")
    }
}

/// What is said about a network card when it is added. Unless said otherwise it has one queue pair, a link, the first
/// free PCI slot, and a MAC address derived from the VM's identity and the card's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicSpec {
    pub(super) name: String,
    pub(super) tap: String,
    pub(super) queue_pairs: u16,
    pub(super) mac: Option<MacAddr>,
    pub(super) bdf: Option<Bdf>,
    pub(super) link_up: bool,
}

impl NicSpec {
    /// A card called `name` (see [`NicName`]) on the host's tap interface `tap`.
    pub fn new(name: impl Into<String>, tap: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            tap: tap.into(),
            queue_pairs: 1,
            mac: None,
            bdf: None,
            link_up: true,
        }
    }

    /// The number of pairs of a receive and a transmit queue, from 1 to [`QUEUE_PAIRS_MAX`].
    pub fn queue_pairs(mut self, count: u16) -> Self {
        self.queue_pairs = count;
        self
    }

    /// Gives the card an Ethernet address.
    pub fn mac(mut self, mac: MacAddr) -> Self {
        self.mac = Some(mac);
        self
    }

    /// Puts the card at a PCI address.
    pub fn bdf(mut self, bdf: Bdf) -> Self {
        self.bdf = Some(bdf);
        self
    }

    /// Whether the cable is plugged in.
    pub fn link_up(mut self, link_up: bool) -> Self {
        self.link_up = link_up;
        self
    }
}

/// Checks the name of a host interface by the kernel's own rules (Linux `dev_valid_name`); `%` would be a pattern.
pub(super) fn check_tap(nic: &NicName, tap: &str) -> Result<(), ConfigError> {
    let refuse = |reason| ConfigError::TapName {
        nic: nic.clone(),
        tap: tap.to_owned(),
        reason,
    };
    if tap.is_empty() {
        return Err(refuse("it is empty"));
    }
    if tap.len() > TAP_NAME_MAX_BYTES {
        return Err(refuse("it is longer than 15 bytes"));
    }
    if tap == "." || tap == ".." {
        return Err(refuse("it is a directory"));
    }
    let is_bad = |c: char| c.is_whitespace() || c.is_control() || "/:%".contains(c);
    if tap.contains(is_bad) {
        return Err(refuse(
            "it holds whitespace, a control character, '/', ':' or '%'",
        ));
    }
    Ok(())
}
