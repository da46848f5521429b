//! The guest-physical address map: an ABI, the same for every VM of a configuration version.
//!
//! `docs/memory-map.md` is the prose of this file. Nothing here is derived from the order in which devices were
//! added: a slot's BAR, a segment's ECAM and a line's GSI follow from the slot, the segment and the line alone.

use crate::ids::Bdf;

/// Guest RAM begins here; RAM above the hole begins at [`HIGH_RAM_START`].
pub const LOW_RAM_END: u64 = 0xC000_0000;
/// The first address above the 32-bit hole.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// Memory that comes and goes at run time is a region that begins at a multiple of this, behind the RAM: a memory block
/// of Linux, the least that it adds or removes.
pub const RUNTIME_MEMORY_ALIGN_BYTES: u64 = 0x0800_0000;
/// The same where the RAM is so large, from [`RUNTIME_MEMORY_LARGE_RAM_BYTES`] on, that Linux uses larger blocks.
pub const RUNTIME_MEMORY_LARGE_ALIGN_BYTES: u64 = 0x8000_0000;
/// From this much RAM on the region is aligned to [`RUNTIME_MEMORY_LARGE_ALIGN_BYTES`].
pub const RUNTIME_MEMORY_LARGE_RAM_BYTES: u64 = 0x10_0000_0000;

/// PCI segments of a VM: each has one bus with 31 usable slots, so that 64 NICs and as many disks find room.
pub const SEGMENT_COUNT: u16 = 4;
/// The 32-bit memory window of segment `n` begins at `MMIO_BASE + n * MMIO_SEGMENT_BYTES`.
pub const MMIO_BASE: u64 = 0xC000_0000;
/// The memory window of one segment.
pub const MMIO_SEGMENT_BYTES: u64 = 0x0100_0000;
/// The part of its segment's window that belongs to one slot.
pub const MMIO_SLOT_BYTES: u64 = MMIO_SEGMENT_BYTES / Bdf::SLOT_COUNT as u64;
/// The ECAM of segment `n` begins at `ECAM_BASE + n * ECAM_SEGMENT_BYTES` (PCI Firmware 3.3 §4.1.2).
pub const ECAM_BASE: u64 = 0xE000_0000;
/// One bus of 256 functions with 4 KiB of configuration space each.
pub const ECAM_SEGMENT_BYTES: u64 = 0x0010_0000;

/// The page of ACPI registers: Generic Event Device, sleep and reset registers, PCI hot-plug.
pub const ACPI_REGISTERS_BASE: u64 = 0xFEA0_0000;
/// Size of the ACPI register page.
pub const ACPI_REGISTERS_BYTES: u64 = 0x2000;
/// Offset of the GED's event-select register (32 bits; reading tells and clears the pending events).
pub const GED_SELECT_OFFSET: u64 = 0x000;
/// Offset of the sleep control register (ACPI 6.5 §4.8.3.7).
pub const SLEEP_CONTROL_OFFSET: u64 = 0x100;
/// Offset of the sleep status register (ACPI 6.5 §4.8.3.7).
pub const SLEEP_STATUS_OFFSET: u64 = 0x101;
/// Offset of the reset register (ACPI 6.5 §4.8.3.6).
pub const RESET_OFFSET: u64 = 0x102;
/// The value that resets the machine when written to the reset register.
pub const RESET_VALUE: u8 = 0x42;
/// Offset of the PCI hot-plug registers; first come those that tell what changed, segment by segment.
pub const HOTPLUG_OFFSET: u64 = 0x1000;
/// Offset, among the hot-plug registers, of those that tell what is present, segment by segment.
pub const HOTPLUG_PRESENT_OFFSET: u64 = 0x20;
/// Offset, among the hot-plug registers, of the one that ejects a slot.
pub const HOTPLUG_EJECT_OFFSET: u64 = 0x40;
/// Offset, among the hot-plug registers, of the one that selects a slot for the two that follow.
pub const HOTPLUG_SELECT_OFFSET: u64 = 0x44;
/// Offset, among the hot-plug registers, of the selected slot's ACPI index.
pub const HOTPLUG_INDEX_OFFSET: u64 = 0x48;
/// Offset, among the hot-plug registers, of the selected slot's label in UTF-16.
pub const HOTPLUG_LABEL_OFFSET: u64 = 0x50;
/// The room for a label: 64 units and a final zero, in whole 8-byte words.
pub const HOTPLUG_LABEL_BYTES: usize = 136;

/// The I/O APIC's registers (Intel 82093AA).
pub const IOAPIC_BASE: u64 = 0xFEC0_0000;
/// The local APIC's registers (Intel SDM 3A §11.4.1).
pub const LAPIC_BASE: u64 = 0xFEE0_0000;
/// Three pages KVM needs for its own use on Intel hosts (KVM API 4.13 KVM_SET_TSS_ADDR).
pub const KVM_TSS_BASE: u64 = 0xFFFB_D000;
/// One page KVM needs for its own use on Intel hosts (KVM API 4.41 KVM_SET_IDENTITY_MAP_ADDR).
pub const KVM_IDENTITY_MAP_BASE: u64 = 0xFFFB_C000;

/// The number of pins of the I/O APIC; MSI routes use GSIs above them.
pub const IOAPIC_PIN_COUNT: u32 = 24;
/// The interrupt of the serial port.
pub const SERIAL_GSI: u32 = 4;
/// The interrupt of the Generic Event Device.
pub const GED_GSI: u32 = 5;
/// The interrupt of the real-time clock.
pub const RTC_GSI: u32 = 8;

/// The ports of the first serial port (16550).
pub const SERIAL_PORT: u16 = 0x3F8;
/// The number of ports of the serial port.
pub const SERIAL_PORT_COUNT: u16 = 8;
/// The reset control register.
pub const RESET_CONTROL_PORT: u16 = 0xCF9;
/// The command port of the keyboard controller.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// The index port of the real-time clock; the data port follows it.
pub const RTC_PORT: u16 = 0x70;

/// Where the boot loader puts things below 1 MiB and the kernel command line.
/// The PVH start info or the Linux zero page.
pub const BOOT_PARAMS_BASE: u64 = 0x7000;
/// The PVH memory map.
pub const PVH_MEMMAP_BASE: u64 = 0x6000;
/// The GDT of the first vCPU.
pub const BOOT_GDT_BASE: u64 = 0x500;
/// The page tables for 64-bit entry: PML4, PDPT and four page directories.
pub const BOOT_PAGE_TABLES_BASE: u64 = 0x9000;
/// The stack pointer for 64-bit entry.
pub const BOOT_STACK: u64 = 0x8FF0;
/// The kernel command line.
pub const CMDLINE_BASE: u64 = 0x2_0000;
/// The longest command line, its final zero included (Linux COMMAND_LINE_SIZE on x86).
pub const CMDLINE_MAX_BYTES: usize = 2048;
/// Conventional memory ends here.
pub const EBDA_START: u64 = 0x9_FC00;
/// The ACPI tables: the RSDP first (ACPI 6.5 §5.2.5.1: searched between 0xE0000 and 0xFFFFF).
pub const ACPI_TABLES_BASE: u64 = 0xE_0000;
/// The room for ACPI tables.
pub const ACPI_TABLES_MAX_BYTES: u64 = RESET_VECTOR - ACPI_TABLES_BASE;
/// Where real-mode code jumps to reset a PC (FFFF:0000).
pub const RESET_VECTOR: u64 = 0xF_FFF0;
/// The kernel is loaded here or above.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;

/// The configuration-space address of `bdf` in its segment's ECAM.
pub const fn ecam_address(bdf: Bdf) -> u64 {
    ECAM_BASE + bdf.segment() as u64 * ECAM_SEGMENT_BYTES + ((bdf.slot() as u64) << 15)
}

/// Where the region of runtime memory begins in a VM with `startup_bytes` of RAM: above the 32-bit hole, so that its
/// place does not depend on how large it is.
pub const fn runtime_memory_base(startup_bytes: u64) -> u64 {
    let above_hole = startup_bytes.saturating_sub(LOW_RAM_END);
    let align_bytes = if startup_bytes < RUNTIME_MEMORY_LARGE_RAM_BYTES {
        RUNTIME_MEMORY_ALIGN_BYTES
    } else {
        RUNTIME_MEMORY_LARGE_ALIGN_BYTES
    };
    (HIGH_RAM_START + above_hole).next_multiple_of(align_bytes)
}

/// The memory window of `segment`.
pub const fn mmio_window(segment: u16) -> u64 {
    MMIO_BASE + segment as u64 * MMIO_SEGMENT_BYTES
}

/// Where the BAR of the device in this slot is placed at power-on.
pub const fn mmio_slot(bdf: Bdf) -> u64 {
    mmio_window(bdf.segment()) + bdf.slot() as u64 * MMIO_SLOT_BYTES
}

// The windows and the ECAM lie in the hole and do not meet each other or the registers behind them.
const _: () = {
    assert!(MMIO_BASE >= LOW_RAM_END);
    assert!(MMIO_BASE + SEGMENT_COUNT as u64 * MMIO_SEGMENT_BYTES <= ECAM_BASE);
    assert!(ECAM_BASE + SEGMENT_COUNT as u64 * ECAM_SEGMENT_BYTES <= ACPI_REGISTERS_BASE);
    assert!(ACPI_REGISTERS_BASE + ACPI_REGISTERS_BYTES <= IOAPIC_BASE);
    assert!(IOAPIC_BASE < LAPIC_BASE && LAPIC_BASE < KVM_IDENTITY_MAP_BASE);
};
