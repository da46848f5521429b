//! A type 0 configuration space (PCI 3.0 §6.1): values, what the guest may write, and what a reset restores.
//!
//! Only the first 256 bytes exist; the rest of the 4 KiB reads as all ones, from which a guest learns that there are
//! no extended capabilities without looking for each. Every byte
//! has a mask of the bits that the guest can write, and BAR sizing follows from that alone: the address bits below
//! the BAR's size are not writable and read as zero. The owner looks at the registers after each write.

use std::collections::BTreeMap;

use super::capability::{Capability, CapabilityError};
use crate::unit::RestoreError;

/// Vendor ID (PCI 3.0 §6.2.1).
const PCI_VENDOR_ID: usize = 0x00;
/// Device ID (PCI 3.0 §6.2.1).
const PCI_DEVICE_ID: usize = 0x02;
/// Command register (PCI 3.0 §6.2.2).
const PCI_COMMAND: usize = 0x04;
/// Status register (PCI 3.0 §6.2.3).
const PCI_STATUS: usize = 0x06;
/// Revision ID; the three bytes of the class code follow it (PCI 3.0 §6.2.1).
const PCI_REVISION_ID: usize = 0x08;
/// Cache line size: the guest's to use (PCI 3.0 §6.2.4).
const PCI_CACHE_LINE_SIZE: usize = 0x0C;
/// The first base address register (PCI 3.0 §6.2.5).
const PCI_BASE_ADDRESS_0: usize = 0x10;
/// Subsystem vendor ID (PCI 3.0 §6.2.4).
const PCI_SUBSYSTEM_VENDOR_ID: usize = 0x2C;
/// Subsystem ID (PCI 3.0 §6.2.4).
const PCI_SUBSYSTEM_ID: usize = 0x2E;
/// Capabilities pointer (PCI 3.0 §6.7).
const PCI_CAPABILITY_LIST: usize = 0x34;
/// Interrupt line: the guest's to use (PCI 3.0 §6.2.4).
const PCI_INTERRUPT_LINE: usize = 0x3C;
/// The first byte behind the type 0 header.
const HEADER_END: usize = 0x40;

/// Command: answer memory accesses (PCI 3.0 §6.2.2).
pub const PCI_COMMAND_MEMORY: u16 = 1 << 1;
/// Command: may act as a bus master (PCI 3.0 §6.2.2).
pub const PCI_COMMAND_MASTER: u16 = 1 << 2;
/// Command: must not assert INTx (PCI 3.0 §6.2.2).
pub const PCI_COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Status: the capabilities pointer is valid (PCI 3.0 §6.2.3).
const PCI_STATUS_CAP_LIST: u16 = 1 << 4;

/// The bytes that are stored.
const STORED_BYTES: usize = 256;

/// What a function says that it is (PCI 3.0 §6.2.1, §6.2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor_id: u16,
    /// Device ID.
    pub device_id: u16,
    /// Revision ID.
    pub revision_id: u8,
    /// Base class, sub-class and programming interface, in the low 24 bits.
    pub class_code: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor_id: u16,
    /// Subsystem ID.
    pub subsystem_id: u16,
}

/// The configuration space of one function.
pub struct ConfigSpace {
    registers: Box<[Register; STORED_BYTES]>,
    last_link: usize,
    end: usize,
}

/// One byte of the space.
#[derive(Debug, Clone, Copy, Default)]
struct Register {
    value: u8,
    initial: u8,
    writable: u8,
}

impl ConfigSpace {
    /// Makes the space of a function without BARs and capabilities, with everything disabled.
    pub fn new(identity: Identity) -> Self {
        let Identity {
            vendor_id,
            device_id,
            revision_id,
            class_code,
            subsystem_vendor_id,
            subsystem_id,
        } = identity;
        let mut space = Self {
            registers: Box::new([Register::default(); STORED_BYTES]),
            last_link: PCI_CAPABILITY_LIST,
            end: HEADER_END,
        };
        let [interface, sub_class, base_class, _] = class_code.to_le_bytes();
        space.define(PCI_VENDOR_ID, &vendor_id.to_le_bytes(), &[]);
        space.define(PCI_DEVICE_ID, &device_id.to_le_bytes(), &[]);
        let command = PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_INTX_DISABLE;
        space.define(PCI_COMMAND, &[0, 0], &command.to_le_bytes());
        space.define(
            PCI_REVISION_ID,
            &[revision_id, interface, sub_class, base_class],
            &[],
        );
        space.define(PCI_CACHE_LINE_SIZE, &[0], &[0xFF]);
        space.define(PCI_SUBSYSTEM_VENDOR_ID, &subsystem_vendor_id.to_le_bytes(), &[]);
        space.define(PCI_SUBSYSTEM_ID, &subsystem_id.to_le_bytes(), &[]);
        space.define(PCI_INTERRUPT_LINE, &[0], &[0xFF]);
        space
    }

    /// Makes BAR 0 a 32-bit memory BAR of `size_bytes`, a power of two from 16, that reads `address` at power-on.
    pub fn define_bar0(&mut self, address: u32, size_bytes: u32) {
        let mask = !(size_bytes.max(16) - 1);
        self.define(
            PCI_BASE_ADDRESS_0,
            &(address & mask).to_le_bytes(),
            &mask.to_le_bytes(),
        );
    }

    /// Appends a capability to the list and tells its offset.
    ///
    /// # Errors
    /// [`CapabilityError`] when the first 256 bytes are full.
    pub fn add_capability(&mut self, capability: &Capability) -> Result<u8, CapabilityError> {
        let Capability { id, body, writable } = capability;
        let offset = self.end;
        let length_bytes = 2 + body.len();
        let free_bytes = STORED_BYTES - offset;
        if length_bytes > free_bytes {
            return Err(CapabilityError {
                id: *id,
                length_bytes,
                free_bytes,
            });
        }
        self.define(offset, &[*id, 0], &[]);
        self.define(offset + 2, body, writable);
        let link = offset as u8;
        self.define(self.last_link, &[link], &[]);
        self.define(PCI_STATUS, &PCI_STATUS_CAP_LIST.to_le_bytes(), &[]);
        self.last_link = offset + 1;
        // Capabilities are aligned to 4 bytes (PCI 3.0 §6.7).
        self.end = (offset + length_bytes).next_multiple_of(4);
        Ok(link)
    }

    /// Reads `data.len()` bytes at `offset`; what is not stored reads as all ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let register = self.registers.get(usize::from(offset) + index);
            *byte = register.map_or(u8::MAX, |register| register.value);
        }
    }

    /// The guest writes `data` at `offset`: only the writable bits change.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (index, byte) in data.iter().enumerate() {
            if let Some(register) = self.registers.get_mut(usize::from(offset) + index) {
                register.value = (register.value & !register.writable) | (byte & register.writable);
            }
        }
    }

    /// The device itself sets bytes, whether or not the guest could.
    pub fn set(&mut self, offset: u16, data: &[u8]) {
        for (index, byte) in data.iter().enumerate() {
            if let Some(register) = self.registers.get_mut(usize::from(offset) + index) {
                register.value = *byte;
            }
        }
    }

    /// The 16-bit register at `offset`.
    pub fn word(&self, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// The 32-bit register at `offset`.
    pub fn dword(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Where BAR 0 answers now; `None` while memory accesses are disabled.
    pub fn bar0(&self) -> Option<u64> {
        let enabled = self.word(PCI_COMMAND as u16) & PCI_COMMAND_MEMORY != 0;
        enabled.then(|| u64::from(self.dword(PCI_BASE_ADDRESS_0 as u16) & !0xF))
    }

    /// Whether the function may access memory and send messages by itself (Bus Master Enable, PCI 3.0 §6.2.2).
    pub fn is_bus_master(&self) -> bool {
        self.word(PCI_COMMAND as u16) & PCI_COMMAND_MASTER != 0
    }

    /// Returns every register to its value at power-on.
    pub fn reset(&mut self) {
        for register in self.registers.iter_mut() {
            register.value = register.initial;
        }
    }

    /// The bytes that differ from their value at power-on, by offset.
    pub fn changes(&self) -> BTreeMap<u16, u8> {
        let registers = self.registers.iter().enumerate();
        registers
            .filter(|(_, register)| register.value != register.initial)
            .map(|(offset, register)| (offset as u16, register.value))
            .collect()
    }

    /// Resets the space and takes over what [`ConfigSpace::changes`] told. The values are untrusted.
    ///
    /// # Errors
    /// [`RestoreError::Value`] for a byte that the guest could not have written.
    pub fn restore(&mut self, changes: &BTreeMap<u16, u8>) -> Result<(), RestoreError> {
        self.reset();
        for (&offset, &value) in changes {
            let register = self.registers.get_mut(usize::from(offset));
            let register = register.filter(|register| (value ^ register.initial) & !register.writable == 0);
            let register = register.ok_or_else(|| RestoreError::Value {
                field: "config_space",
                value: format!("{value:#04x} at {offset:#05x}"),
                reason: "the register cannot hold it",
            })?;
            register.value = value;
        }
        Ok(())
    }

    /// Sets value, value at power-on and writable bits (none where `writable` is shorter) from `offset` on.
    fn define(&mut self, offset: usize, data: &[u8], writable: &[u8]) {
        for (index, &byte) in data.iter().enumerate() {
            if let Some(register) = self.registers.get_mut(offset + index) {
                *register = Register {
                    value: byte,
                    initial: byte,
                    writable: writable.get(index).copied().unwrap_or(0),
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::capability::{MSIX_CONTROL_ENABLE, PCI_CAP_ID_MSIX, PCI_CAP_ID_VNDR};
    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor_id: 0x1AF4,
            device_id: 0x1041,
            revision_id: 1,
            class_code: 0x02_0000,
            subsystem_vendor_id: 0x1AF4,
            subsystem_id: 0x1041,
        });
        space.define_bar0(0xC000_8000, 0x8000);
        space
    }

    #[test]
    fn sizing_a_bar_tells_its_size_and_gives_the_address_back() {
        let mut space = space();
        assert_eq!(space.dword(0x10), 0xC000_8000);
        space.write(0x10, &[0xFF; 4]);
        assert_eq!(space.dword(0x10), 0xFFFF_8000);
        space.write(0x14, &[0xFF; 4]);
        assert_eq!(space.dword(0x14), 0, "there is no second bar");
        space.write(0x10, &0xC000_8000u32.to_le_bytes());
        assert_eq!(space.bar0(), None, "memory accesses are disabled");
        space.write(0x04, &PCI_COMMAND_MEMORY.to_le_bytes());
        assert_eq!(space.bar0(), Some(0xC000_8000));
    }

    #[test]
    fn identity_is_read_only_and_the_rest_of_the_space_is_empty() {
        let mut space = space();
        space.write(0x00, &[0; 4]);
        space.write(0x08, &[0xFF; 4]);
        assert_eq!((space.dword(0x00), space.dword(0x08)), (0x1041_1AF4, 0x0200_0001));
        space.write(0x100, &[0xFF; 4]);
        assert_eq!(space.dword(0x100), u32::MAX);
        let mut last = [0; 4];
        space.read(0xFFC, &mut last);
        assert_eq!(last, [0xFF; 4], "there are no extended registers");
        space.write(u16::MAX, &[1, 2]);
    }

    #[test]
    fn capabilities_are_linked_in_order_and_only_their_writable_bits_move() {
        let mut space = space();
        assert_eq!(space.word(0x06) & PCI_STATUS_CAP_LIST, 0);
        let msix = space
            .add_capability(&Capability::msix(3, 0x4000, 0x5000))
            .expect("the space is empty");
        let vendor = space
            .add_capability(&Capability::vendor_specific(&[1, 2, 3], &[0, 0xF0]))
            .expect("there is room");
        assert_ne!(space.word(0x06) & PCI_STATUS_CAP_LIST, 0);
        assert_eq!(space.word(0x34) as u8, msix);
        assert_eq!(
            space.word(u16::from(msix)),
            u16::from_le_bytes([PCI_CAP_ID_MSIX, vendor])
        );
        assert_eq!(space.word(u16::from(vendor)), u16::from(PCI_CAP_ID_VNDR));
        assert_eq!(space.word(u16::from(msix) + 2), 2, "vectors minus one");
        space.write(u16::from(msix) + 2, &[0xFF; 2]);
        assert_eq!(space.word(u16::from(msix) + 2), 0xC002);
        assert_ne!(space.word(u16::from(msix) + 2) & MSIX_CONTROL_ENABLE, 0);
        space.write(u16::from(vendor), &[0xFF; 8]);
        assert_eq!(
            space.dword(u16::from(vendor) + 2),
            u32::from_le_bytes([6, 1, 0xF2, 3])
        );
    }

    #[test]
    fn a_capability_that_does_not_fit_is_refused_with_both_numbers() {
        let mut space = space();
        let body = [0; 180];
        space
            .add_capability(&Capability::vendor_specific(&body, &[]))
            .expect("the space is empty");
        let error = space
            .add_capability(&Capability::vendor_specific(&[0; 20], &[]))
            .expect_err("there is no room");
        assert_eq!(
            error.to_string(),
            "capability 0x09 needs 23 bytes, 8 are free in the configuration space"
        );
    }

    #[test]
    fn changes_survive_and_impossible_ones_are_refused() {
        let mut space = space();
        space.write(0x04, &[0xFF, 0xFF]);
        space.write(0x3C, &[9]);
        let changes = space.changes();
        assert_eq!(changes, BTreeMap::from([(0x04, 0x06), (0x05, 0x04), (0x3C, 9)]));
        space.reset();
        assert!(space.changes().is_empty());
        space.restore(&changes).expect("it was written by the guest");
        assert_eq!(space.changes(), changes);
        for impossible in [(0x00, 0), (0x10, 1), (0x100, 1)] {
            let error = space.restore(&BTreeMap::from([impossible]));
            let error = error.expect_err("read-only").to_string();
            assert!(error.ends_with("the register cannot hold it"), "{error}");
        }
    }
}
