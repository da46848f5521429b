//! What the guest finds at its first instruction: kernel, initrd, command line, memory map, registers.

use std::path::Path;

use crate::machine::vcpu::boot_regs::BootEntry;
use crate::memory::region::GuestRam;

/// SKELETON: the files and the command line a VM is started from.
pub struct BootSource;
/// SKELETON
#[derive(Debug, thiserror::Error)]
pub enum BootError {}

impl BootSource {
    /// Opens the files and checks everything that can be checked without guest memory.
    pub fn open(_kernel: &Path, _initrd: Option<&Path>, _cmdline: &str) -> Result<Self, BootError> {
        unimplemented!()
    }

    /// Writes everything into `ram`; again at each reset. `rsdp` is the address of the ACPI RSDP.
    pub fn load(&mut self, _ram: &GuestRam, _rsdp: u64) -> Result<BootEntry, BootError> {
        unimplemented!()
    }
}
