//! One PCI segment: its ECAM, its bus 0, its slots; and the host bridge in slot 0 of the first segment.
//!
//! The ECAM (PCI Express 5.0 §7.2.2) turns an address into bus, slot, function and register. Only function 0 exists.
//! Empty slots, other functions and accesses that are not 1, 2 or 4 naturally aligned bytes read as all ones.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::config_space::{ConfigSpace, Identity};
use super::device::PciDevice;
use super::saved::SavedConfigSpaceV1;
use super::slots::Slots;
use crate::bus::BusDevice;
use crate::unit::RestoreError;

/// The vendor of the bridge: Red Hat, who gave away a device id for generic host bridges.
const HOST_BRIDGE_VENDOR_ID: u16 = 0x1B36;
/// The generic PCI Express host bridge of that vendor: no driver binds to it and no quirk knows it.
const HOST_BRIDGE_DEVICE_ID: u16 = 0x0008;
/// Base class 06h (bridge), sub-class 00h (host bridge) (PCI 3.0 appendix D).
const HOST_BRIDGE_CLASS: u32 = 0x06_0000;
/// The subsystem id that generic devices of the vendor carry.
const HOST_BRIDGE_SUBSYSTEM_ID: u16 = 0x1100;
/// The vendor of that subsystem id.
const HOST_BRIDGE_SUBSYSTEM_VENDOR_ID: u16 = 0x1AF4;

/// The function in slot 0 of segment 0. It does nothing but exist.
pub struct HostBridge {
    config: Mutex<ConfigSpace>,
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl HostBridge {
    /// Makes a host bridge as after power-on.
    pub fn new() -> Self {
        let identity = Identity {
            vendor_id: HOST_BRIDGE_VENDOR_ID,
            device_id: HOST_BRIDGE_DEVICE_ID,
            revision_id: 0,
            class_code: HOST_BRIDGE_CLASS,
            subsystem_vendor_id: HOST_BRIDGE_SUBSYSTEM_VENDOR_ID,
            subsystem_id: HOST_BRIDGE_SUBSYSTEM_ID,
        };
        Self {
            config: Mutex::new(ConfigSpace::new(identity)),
        }
    }

    /// Returns to the state after power-on.
    pub fn reset(&self) {
        self.lock().reset();
    }

    /// What the guest changed.
    pub fn save(&self) -> SavedConfigSpaceV1 {
        SavedConfigSpaceV1 {
            changes: self.lock().changes(),
        }
    }

    /// Takes over a saved state, which is untrusted.
    ///
    /// # Errors
    /// [`RestoreError::Value`] for a value that the guest could not have written.
    pub fn restore(&self, saved: &SavedConfigSpaceV1) -> Result<(), RestoreError> {
        let SavedConfigSpaceV1 { changes } = saved;
        self.lock().restore(changes)
    }

    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciDevice for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.lock().write(offset, data);
    }
}

/// The ECAM of one segment.
pub struct PciSegment {
    slots: Slots,
}

impl PciSegment {
    /// Makes the ECAM in front of `slots`.
    pub fn new(slots: Slots) -> Self {
        Self { slots }
    }
}

/// What an ECAM offset selects: slot and register of function 0 on bus 0; `None` for everything else.
fn decode(offset: u64, length_bytes: usize) -> Option<(u8, u16)> {
    let aligned = matches!(length_bytes, 1 | 2 | 4) && offset.is_multiple_of(length_bytes as u64);
    let (bus, slot, function) = (offset >> 20, (offset >> 15) & 0x1F, (offset >> 12) & 0x7);
    (aligned && bus == 0 && function == 0).then_some((slot as u8, (offset & 0xFFF) as u16))
}

impl BusDevice for PciSegment {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some((slot, register)) = decode(offset, data.len())
            && let Some(device) = self.slots.device(slot)
        {
            device.config_read(register, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((slot, register)) = decode(offset, data.len())
            && let Some(device) = self.slots.device(slot)
        {
            device.config_write(register, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_function_0_of_bus_0_is_selected_and_only_by_aligned_accesses() {
        assert_eq!(decode(0, 4), Some((0, 0)));
        assert_eq!(decode((31 << 15) | 0xFFC, 4), Some((31, 0xFFC)));
        assert_eq!(decode((3 << 15) | 0xFFF, 1), Some((3, 0xFFF)));
        for (offset, length) in [
            (1 << 12, 4),
            (7 << 12, 1),
            (1 << 20, 4),
            (2, 4),
            (1, 2),
            (0, 3),
            (0, 8),
            (0, 0),
        ] {
            assert_eq!(decode(offset, length), None, "{length} bytes at {offset:#x}");
        }
    }
}
