//! The registers with which the first vCPU enters a kernel.
//!
//! Two protocols: PVH starts in 32-bit protected mode without paging (Xen `docs/misc/pvh.pandoc`), the Linux 64-bit
//! boot protocol starts in long mode with the first 4 GiB mapped to themselves (Linux
//! `Documentation/arch/x86/boot.rst` §1.15). The descriptors and page tables that these registers name are guest
//! memory's content and written by the boot loader from [`boot_gdt`] and [`boot_page_tables`].

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use crate::memory::layout::{BOOT_GDT_BASE, BOOT_PAGE_TABLES_BASE, BOOT_PARAMS_BASE, BOOT_STACK};

/// How the first vCPU enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootProtocol {
    /// PVH: 32-bit protected mode, EBX holds the address of the start info.
    Pvh,
    /// Linux: long mode, RSI holds the address of the zero page.
    Linux64,
}

/// Where the first vCPU begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootEntry {
    /// The protocol.
    pub protocol: BootProtocol,
    /// The address of the first instruction.
    pub address: u64,
}

/// The selector of the code segment (Linux `__BOOT_CS`).
const CODE_SELECTOR: u16 = 0x10;
/// The selector of the data segments (Linux `__BOOT_DS`).
const DATA_SELECTOR: u16 = 0x18;
/// The selector of the task state segment, which must exist but is never used.
const TASK_SELECTOR: u16 = 0x20;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set (Intel SDM 1 §3.4.3); interrupts are off.
const RFLAGS: u64 = 1 << 1;

const PAGE_PRESENT: u64 = 1;
const PAGE_WRITABLE: u64 = 1 << 1;
const PAGE_HUGE: u64 = 1 << 7;
/// The number of entries of a page table of any level.
const TABLE_ENTRIES: u64 = 512;
/// What the page directories map to itself, in GiB.
const MAPPED_GIB: u64 = 4;

/// The general registers for `entry`.
pub(super) fn general(entry: BootEntry) -> kvm_regs {
    let mut regs = kvm_regs {
        rip: entry.address,
        rflags: RFLAGS,
        ..Default::default()
    };
    match entry.protocol {
        BootProtocol::Pvh => regs.rbx = BOOT_PARAMS_BASE,
        BootProtocol::Linux64 => {
            regs.rsi = BOOT_PARAMS_BASE;
            regs.rsp = BOOT_STACK;
        }
    }
    regs
}

/// Changes the power-on system registers into those for `protocol`.
pub(super) fn system(sregs: &mut kvm_sregs, protocol: BootProtocol) {
    let long = protocol == BootProtocol::Linux64;
    sregs.cs = code_segment(long);
    let data = data_segment();
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.tr = task_segment();
    sregs.gdt = kvm_dtable {
        base: BOOT_GDT_BASE,
        limit: size_of::<[u64; GDT_ENTRIES]>() as u16 - 1,
        ..Default::default()
    };
    sregs.idt = kvm_dtable::default();
    sregs.cr0 = CR0_PE | CR0_ET;
    if long {
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = BOOT_PAGE_TABLES_BASE;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
    }
}

const GDT_ENTRIES: usize = 5;

/// The descriptors behind the selectors, for [`BOOT_GDT_BASE`] (Intel SDM 3A §3.4.5).
pub fn boot_gdt(protocol: BootProtocol) -> [u64; GDT_ENTRIES] {
    let long = protocol == BootProtocol::Linux64;
    [
        0,
        0,
        descriptor(&code_segment(long)),
        descriptor(&data_segment()),
        descriptor(&task_segment()),
    ]
}

/// The page tables for [`BOOT_PAGE_TABLES_BASE`]: PML4, PDPT and four page directories of 2 MiB pages.
pub fn boot_page_tables() -> Vec<u64> {
    let table = |number: u64| (BOOT_PAGE_TABLES_BASE + number * 0x1000) | PAGE_PRESENT | PAGE_WRITABLE;
    let mut entries = vec![0; TABLE_ENTRIES as usize];
    entries[0] = table(1);
    let directories = (0..TABLE_ENTRIES).map(|gib| if gib < MAPPED_GIB { table(2 + gib) } else { 0 });
    entries.extend(directories);
    let pages = 0..MAPPED_GIB * TABLE_ENTRIES;
    entries.extend(pages.map(|page| (page << 21) | PAGE_HUGE | PAGE_PRESENT | PAGE_WRITABLE));
    entries
}

fn code_segment(long: bool) -> kvm_segment {
    kvm_segment {
        type_: 0xB, // execute, read, accessed
        l: u8::from(long),
        db: u8::from(!long),
        ..flat(CODE_SELECTOR)
    }
}

fn data_segment() -> kvm_segment {
    kvm_segment {
        type_: 0x3, // read, write, accessed
        db: 1,
        ..flat(DATA_SELECTOR)
    }
}

fn flat(selector: u16) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

fn task_segment() -> kvm_segment {
    kvm_segment {
        limit: 0x67,
        selector: TASK_SELECTOR,
        type_: 0xB, // busy task state segment
        present: 1,
        ..Default::default()
    }
}

/// Packs a segment as a descriptor.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let bit = |value: u8, position: u32| u64::from(value) << position;
    (limit & 0xFFFF)
        | ((segment.base & 0xFF_FFFF) << 16)
        | bit(segment.type_, 40)
        | bit(segment.s, 44)
        | bit(segment.dpl, 45)
        | bit(segment.present, 47)
        | ((limit >> 16) << 48)
        | bit(segment.avl, 52)
        | bit(segment.l, 53)
        | bit(segment.db, 54)
        | bit(segment.g, 55)
        | ((segment.base >> 24) << 56)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_packed_as_the_manual_says() {
        let gdt = boot_gdt(BootProtocol::Linux64);
        assert_eq!(
            gdt,
            [
                0,
                0,
                0x00AF_9B00_0000_FFFF,
                0x00CF_9300_0000_FFFF,
                0x0000_8B00_0000_0067
            ]
        );
        let gdt = boot_gdt(BootProtocol::Pvh);
        assert_eq!(gdt[2], 0x00CF_9B00_0000_FFFF);
    }

    #[test]
    fn four_gibibytes_map_to_themselves() {
        let tables = boot_page_tables();
        assert_eq!(tables.len(), 6 * 512);
        let follow = |entry: u64| ((entry & !0xFFF) - BOOT_PAGE_TABLES_BASE) as usize / 8;
        for address in [0u64, 0x20_0000, 0x4012_3456, 0xFFFF_FFFF] {
            let pdpt = follow(tables[(address >> 39) as usize]);
            let directory = follow(tables[pdpt + (address >> 30) as usize]);
            let page = tables[directory + ((address >> 21) & 511) as usize];
            assert_eq!(page & !0x1F_FFFF, address & !0x1F_FFFF);
            assert_eq!(page & 0x83, 0x83, "present, writable, 2 MiB");
        }
        assert_eq!(tables[512 + 4], 0, "nothing above 4 GiB");
    }

    #[test]
    fn each_protocol_passes_its_parameters_its_way() {
        let pvh = general(BootEntry {
            protocol: BootProtocol::Pvh,
            address: 0x10_0000,
        });
        assert_eq!((pvh.rip, pvh.rbx, pvh.rsi), (0x10_0000, BOOT_PARAMS_BASE, 0));
        let mut sregs = kvm_sregs::default();
        system(&mut sregs, BootProtocol::Pvh);
        assert_eq!(
            (sregs.cr0 & CR0_PG, sregs.efer, sregs.cs.db, sregs.cs.l),
            (0, 0, 1, 0)
        );
        let linux = general(BootEntry {
            protocol: BootProtocol::Linux64,
            address: 0x10_0200,
        });
        assert_eq!(
            (linux.rip, linux.rbx, linux.rsi),
            (0x10_0200, 0, BOOT_PARAMS_BASE)
        );
        system(&mut sregs, BootProtocol::Linux64);
        assert_eq!(
            (sregs.cr3, sregs.efer),
            (BOOT_PAGE_TABLES_BASE, EFER_LME | EFER_LMA)
        );
    }
}
