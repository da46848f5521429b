//! Changes of a VM's network cards: each gives a new configuration, checked as a whole, and leaves the old one alone.
//!
//! The supervisor persists the new configuration when the change has reached the machine.

use std::collections::BTreeSet;

use super::VmConfig;
use super::builder::ConfigError;
use super::nic::{NicConfig, NicSpec, add_nic, device_name};
use super::slots::Slots;
use crate::ids::NicName;

impl VmConfig {
    /// The network card called `name`.
    pub fn nic(&self, name: &NicName) -> Option<&NicConfig> {
        self.nics.iter().find(|nic| nic.name == *name)
    }

    /// This configuration with one more network card, the last of [`VmConfig::nics`]. What `nic` leaves open is
    /// decided as in [`super::VmConfigBuilder::build`]: the first free PCI slot, the lowest free ACPI index, a derived
    /// MAC address.
    ///
    /// # Errors
    /// [`ConfigError`] for the first thing that is wrong, such as a name, tap, MAC address, slot or ACPI index that
    /// another card has, or a card more than [`super::NICS_MAX`].
    pub fn with_nic(&self, nic: NicSpec) -> Result<Self, ConfigError> {
        let mut slots = Slots::default();
        for disk in &self.disks {
            slots.take(disk.bdf, format!("disk {}", disk.name))?;
        }
        for other in &self.nics {
            slots.take(other.bdf, device_name(&other.name))?;
        }
        if let Some(bdf) = nic.bdf {
            slots.take(bdf, device_name(&nic.name))?;
        }
        let mut changed = self.clone();
        add_nic(&mut changed, &mut slots, &BTreeSet::new(), nic)?;
        Ok(changed)
    }

    /// This configuration without the network card called `name`.
    ///
    /// # Errors
    /// [`ConfigError::NoNic`].
    pub fn without_nic(&self, name: &NicName) -> Result<Self, ConfigError> {
        let mut changed = self.clone();
        let index = self.nic_index(name)?;
        changed.nics.remove(index);
        Ok(changed)
    }

    /// This configuration with the network card `old` called `new`; it keeps its addresses.
    ///
    /// # Errors
    /// [`ConfigError::NoNic`], and [`ConfigError::DuplicateNic`] when another card is called `new`.
    pub fn renamed_nic(&self, old: &NicName, new: &NicName) -> Result<Self, ConfigError> {
        let mut changed = self.clone();
        let index = self.nic_index(old)?;
        if old != new && self.nic(new).is_some() {
            return Err(ConfigError::DuplicateNic { name: new.clone() });
        }
        changed.nics[index].name = new.clone();
        Ok(changed)
    }

    /// This configuration with the cable of the network card called `name` plugged in or pulled out.
    ///
    /// # Errors
    /// [`ConfigError::NoNic`].
    pub fn with_nic_link(&self, name: &NicName, link_up: bool) -> Result<Self, ConfigError> {
        let mut changed = self.clone();
        let index = self.nic_index(name)?;
        changed.nics[index].link_up = link_up;
        Ok(changed)
    }

    fn nic_index(&self, name: &NicName) -> Result<usize, ConfigError> {
        let index = self.nics.iter().position(|nic| nic.name == *name);
        index.ok_or_else(|| ConfigError::NoNic { name: name.clone() })
    }
}
