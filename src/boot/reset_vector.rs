//! What a kernel finds when it jumps to the BIOS to be reset: a few instructions that reset the machine.
//!
//! There is no firmware, but a Linux that sees hardware-reduced ACPI and no EFI leaves its reset to the BIOS: it goes back
//! to real mode and jumps to FFFF:0000. Without this it would run through zeros for ever.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::memory::layout::{I8042_COMMAND_PORT, RESET_VECTOR};

/// `mov al, 0xfe; out PORT, al; hlt; jmp` back to the `hlt`.
const CODE: [u8; 7] = [0xB0, 0xFE, 0xE6, I8042_COMMAND_PORT as u8, 0xF4, 0xEB, 0xFD];

/// Puts the instructions in their place.
///
/// # Errors
/// [`GuestMemoryError`] when there is no RAM there.
pub fn write(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    memory.write_slice(&CODE, GuestAddress(RESET_VECTOR))
}
