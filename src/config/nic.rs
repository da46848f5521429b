//! A network card on paper: what it is, what is said about a new one, and how that becomes a card.
//!
//! Whatever the guest can recognise a card by (MAC address, PCI address, ACPI index) is decided here, once.

use std::collections::BTreeSet;

use super::VmConfig;
use super::builder::ConfigError;
use super::slots::Slots;
use super::version::Feature;
use crate::ids::{Bdf, MacAddr, NicName, UnitName};

/// The most network cards of a VM (the limit of Hyper-V 2019).
pub const NICS_MAX: usize = 64;
/// The greatest ACPI index: what systemd's `eno` names can express.
pub const ACPI_INDEX_MAX: u16 = 16383;

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
    /// The number by which the guest knows the card whatever it is called, from 1 to [`ACPI_INDEX_MAX`], unique in its
    /// VM. `None` exactly when the VM's version hides the cards' names from the guest ([`Feature::NicLabel`]).
    pub acpi_index: Option<u16>,
    /// Whether the cable is plugged in.
    pub link_up: bool,
}

impl NicConfig {
    /// The name of the card's unit. It comes from the slot, because the card can be renamed while the VM runs.
    pub fn unit_name(&self) -> UnitName {
        UnitName::new(format!("nic-{}", self.bdf)).expect("an address is short")
    }
}

/// What is said about a network card when it is added. Unless said otherwise it has one queue pair, a link, the first
/// free PCI slot, the lowest free ACPI index, and a MAC address derived from the VM's identity and the card's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicSpec {
    pub(super) name: String,
    pub(super) tap: String,
    pub(super) queue_pairs: u16,
    pub(super) mac: Option<MacAddr>,
    pub(super) bdf: Option<Bdf>,
    pub(super) acpi_index: Option<u16>,
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
            acpi_index: None,
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

    /// Gives the card an ACPI index, from 1 to [`ACPI_INDEX_MAX`]; needs a version with [`Feature::NicLabel`].
    pub fn acpi_index(mut self, index: u16) -> Self {
        self.acpi_index = Some(index);
        self
    }

    /// Whether the cable is plugged in.
    pub fn link_up(mut self, link_up: bool) -> Self {
        self.link_up = link_up;
        self
    }
}

impl From<NicConfig> for NicSpec {
    /// Says everything that the card is.
    fn from(nic: NicConfig) -> Self {
        let NicConfig {
            name,
            tap,
            queue_pairs,
            mac,
            bdf,
            acpi_index,
            link_up,
        } = nic;
        Self {
            name: name.into(),
            tap,
            queue_pairs,
            mac: Some(mac),
            bdf: Some(bdf),
            acpi_index,
            link_up,
        }
    }
}

/// Makes a card of `spec` and adds it to `config`. A PCI address that `spec` gives is in `slots` already; an ACPI
/// index in `given` is kept for the card that asks for it.
///
/// # Errors
/// [`ConfigError`] for the first thing that is wrong.
pub(super) fn add_nic(
    config: &mut VmConfig,
    slots: &mut Slots,
    given: &BTreeSet<u16>,
    spec: NicSpec,
) -> Result<(), ConfigError> {
    let name = NicName::new(spec.name)?;
    if config.nics.len() >= NICS_MAX {
        return Err(ConfigError::TooManyNics { name });
    }
    check_tap(&name, &spec.tap)?;
    if !(1..=QUEUE_PAIRS_MAX).contains(&spec.queue_pairs) {
        return Err(ConfigError::QueuePairs {
            nic: name,
            count: spec.queue_pairs,
        });
    }
    let mac = spec.mac.unwrap_or_else(|| derived_mac(config, &name));
    for other in &config.nics {
        check_distinct(other, &name, mac, &spec.tap)?;
    }
    let acpi_index = choose_acpi_index(config, given, &name, spec.acpi_index)?;
    let bdf = match spec.bdf {
        Some(bdf) => bdf,
        None => slots.take_first_free(device_name(&name))?,
    };
    config.nics.push(NicConfig {
        name,
        tap: spec.tap,
        queue_pairs: spec.queue_pairs,
        mac,
        bdf,
        acpi_index,
        link_up: spec.link_up,
    });
    Ok(())
}

/// What messages call the card.
pub(super) fn device_name(name: &impl std::fmt::Display) -> String {
    format!("network card {name}")
}

/// The address that belongs to the name, or the next one when a renamed card still has it.
fn derived_mac(config: &VmConfig, name: &NicName) -> MacAddr {
    let mut mac = MacAddr::derived(config.id, name);
    while config.nics.iter().any(|nic| nic.mac == mac && nic.name != *name) {
        mac = mac.next_local();
    }
    mac
}

fn choose_acpi_index(
    config: &VmConfig,
    given: &BTreeSet<u16>,
    name: &NicName,
    asked: Option<u16>,
) -> Result<Option<u16>, ConfigError> {
    let has_labels = config.version.require(Feature::NicLabel);
    let owner = |index| config.nics.iter().find(|nic| nic.acpi_index == Some(index));
    let Some(index) = asked else {
        let is_free = |index: &u16| owner(*index).is_none() && !given.contains(index);
        return Ok((1..=ACPI_INDEX_MAX).find(is_free).filter(|_| has_labels.is_ok()));
    };
    has_labels?;
    if !(1..=ACPI_INDEX_MAX).contains(&index) {
        let nic = name.clone();
        return Err(ConfigError::AcpiIndex { nic, index });
    }
    match owner(index) {
        None => Ok(Some(index)),
        Some(other) => Err(ConfigError::DuplicateAcpiIndex {
            index,
            first: other.name.clone(),
            second: name.clone(),
        }),
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

fn check_distinct(other: &NicConfig, name: &NicName, mac: MacAddr, tap: &str) -> Result<(), ConfigError> {
    let (first, second) = (other.name.clone(), name.clone());
    if first == second {
        return Err(ConfigError::DuplicateNic { name: first });
    }
    if other.mac == mac {
        return Err(ConfigError::DuplicateMac { mac, first, second });
    }
    if other.tap == tap {
        let tap = tap.to_owned();
        return Err(ConfigError::DuplicateTap { tap, first, second });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
