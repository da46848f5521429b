//! What the kernel is told at its entry: the Linux zero page or the PVH start info, and the tables behind the
//! registers.
//!
//! All of it lies below 1 MiB at the addresses of `memory::layout`. Sources: Linux `Documentation/arch/x86/boot.rst`
//! and `zero-page.rst`, Xen `xen/include/public/arch-x86/hvm/start_info.h`.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::memory_map::MapRange;
use crate::machine::vcpu::boot_regs::{BootProtocol, boot_gdt, boot_page_tables};
use crate::memory::layout::{
    BOOT_GDT_BASE, BOOT_PAGE_TABLES_BASE, BOOT_PARAMS_BASE, CMDLINE_BASE, PVH_MEMMAP_BASE,
};

/// "Undefined" in the list of boot loaders (Linux `Documentation/arch/x86/boot.rst` §1.3).
const LOADER_UNDEFINED: u8 = 0xFF;
/// The PVH module list follows the start info.
const PVH_MODULES_BASE: u64 = BOOT_PARAMS_BASE + 0x40;
const _: () = assert!(size_of::<hvm_start_info>() <= 0x40);

/// What there is to tell.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    pub(super) map: &'a [MapRange],
    pub(super) cmdline_bytes: u32,
    /// Address and size.
    pub(super) initrd: Option<(u32, u32)>,
    /// The address of the ACPI RSDP.
    pub(super) rsdp: u64,
}

/// Writes everything that `protocol` needs.
pub(super) fn write(
    memory: &GuestMemoryMmap,
    protocol: BootProtocol,
    header: setup_header,
    facts: &Facts<'_>,
) -> Result<(), GuestMemoryError> {
    let gdt = boot_gdt(protocol);
    memory.write_slice(words(&gdt).as_slice(), GuestAddress(BOOT_GDT_BASE))?;
    match protocol {
        BootProtocol::Pvh => write_start_info(memory, facts),
        BootProtocol::Linux64 => {
            let tables = words(&boot_page_tables());
            memory.write_slice(&tables, GuestAddress(BOOT_PAGE_TABLES_BASE))?;
            let page = zero_page(header, facts);
            memory.write_slice(page.as_slice(), GuestAddress(BOOT_PARAMS_BASE))
        }
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The zero page (Linux `Documentation/arch/x86/zero-page.rst`).
fn zero_page(header: setup_header, facts: &Facts<'_>) -> Box<boot_params> {
    let mut page = Box::new(boot_params {
        hdr: header,
        acpi_rsdp_addr: facts.rsdp,
        ..Default::default()
    });
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.cmd_line_ptr = CMDLINE_BASE as u32;
    page.hdr.cmdline_size = facts.cmdline_bytes;
    let (image, size_bytes) = facts.initrd.unwrap_or((0, 0));
    page.hdr.ramdisk_image = image;
    page.hdr.ramdisk_size = size_bytes;
    let mut table = page.e820_table;
    for (entry, range) in table.iter_mut().zip(facts.map) {
        *entry = boot_e820_entry {
            addr: range.address,
            size: range.size_bytes,
            r#type: range.kind as u32,
        };
    }
    page.e820_table = table;
    page.e820_entries = facts.map.len() as u8; // a handful
    page
}

/// The start info, version 1 (Xen `xen/include/public/arch-x86/hvm/start_info.h`).
fn write_start_info(memory: &GuestMemoryMmap, facts: &Facts<'_>) -> Result<(), GuestMemoryError> {
    for (number, range) in (0u64..).zip(facts.map) {
        let entry = hvm_memmap_table_entry {
            addr: range.address,
            size: range.size_bytes,
            type_: range.kind as u32,
            reserved: 0,
        };
        let address = PVH_MEMMAP_BASE + number * size_of::<hvm_memmap_table_entry>() as u64;
        memory.write_slice(entry.as_slice(), GuestAddress(address))?;
    }
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        cmdline_paddr: CMDLINE_BASE,
        rsdp_paddr: facts.rsdp,
        memmap_paddr: PVH_MEMMAP_BASE,
        memmap_entries: facts.map.len() as u32, // a handful
        ..Default::default()
    };
    if let Some((image, size_bytes)) = facts.initrd {
        let module = hvm_modlist_entry {
            paddr: u64::from(image),
            size: u64::from(size_bytes),
            ..Default::default()
        };
        memory.write_slice(module.as_slice(), GuestAddress(PVH_MODULES_BASE))?;
        info.nr_modules = 1;
        info.modlist_paddr = PVH_MODULES_BASE;
    }
    memory.write_slice(info.as_slice(), GuestAddress(BOOT_PARAMS_BASE))
}
