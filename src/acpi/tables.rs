//! The static ACPI tables and where they lie in guest memory.
//!
//! ```text
//! RSDP → XSDT → FADT → DSDT
//!             → MADT          CPUs and the I/O APIC
//!             → MCFG          one ECAM per PCI segment
//! ```
//!
//! The boot loader copies [`AcpiTables::bytes`] to `layout::ACPI_TABLES_BASE` before the first instruction; the guest
//! may overwrite them afterwards, which nobody here notices. Sources: ACPI 6.5 §5.2, PCI Firmware 3.3 §4.1.2.

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::dsdt;
use crate::memory::layout;

const OEM_ID: [u8; 6] = *b"VMLIFE";
const OEM_TABLE_ID: [u8; 8] = *b"VMLIFECY";
const OEM_REVISION: u32 = 1;
/// The length of a table header (ACPI 6.5 table 5.4).
const HEADER_BYTES: u32 = 36;
/// The revision of the DSDT; 2 and above mean 64-bit integers (ACPI 6.5 table 5.4).
const DSDT_REVISION: u8 = 2;
/// The revision of the MADT (ACPI 6.5 table 5.19).
const MADT_REVISION: u8 = 6;
/// MADT flag: there is a pair of 8259s, which a guest masks when it uses APICs. KVM's irqchip has them.
const PCAT_COMPAT: u32 = 1 << 0;
/// `IAPC_BOOT_ARCH` bit 2: do not probe for VGA (ACPI 6.5 table 5.11). Not set: bit 1, there is no keyboard controller
/// to drive; bit 5, the CMOS clock is there.
const VGA_NOT_PRESENT: u16 = 1 << 2;
/// Tables begin at multiples of this.
const ALIGNMENT_BYTES: usize = 16;

/// The tables of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiTables {
    /// The bytes to put at `layout::ACPI_TABLES_BASE`, at most `layout::ACPI_TABLES_MAX_BYTES`.
    pub bytes: Vec<u8>,
    /// The guest-physical address of the RSDP, for the boot protocol.
    pub rsdp_address: u64,
}

impl AcpiTables {
    /// Builds the tables of a VM with `cpu_count` vCPUs, whose APIC ids count from 0.
    pub fn new(cpu_count: u8) -> Self {
        let mut image = Image::default();
        // The RSDP comes first, where a guest that searches finds it; it is filled in when the XSDT has an address.
        image.append(&vec![0; Rsdp::len()]);
        let dsdt = image.append(&sdt(b"DSDT", DSDT_REVISION, &dsdt::body()));
        let tables = [
            image.append(&encoded(&fadt(dsdt))),
            image.append(&madt(cpu_count)),
            image.append(&encoded(&mcfg())),
        ];
        let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        for address in tables {
            xsdt.add_entry(address);
        }
        let xsdt = image.append(&encoded(&xsdt));
        let rsdp = encoded(&Rsdp::new(OEM_ID, xsdt));
        image.bytes[..rsdp.len()].copy_from_slice(&rsdp);
        Self {
            bytes: image.bytes,
            rsdp_address: layout::ACPI_TABLES_BASE,
        }
    }
}

/// The tables as they grow, each at an aligned address.
#[derive(Default)]
struct Image {
    bytes: Vec<u8>,
}

impl Image {
    /// Adds `table` and tells its guest-physical address.
    fn append(&mut self, table: &[u8]) -> u64 {
        let offset = self.bytes.len().next_multiple_of(ALIGNMENT_BYTES);
        self.bytes.resize(offset, 0);
        self.bytes.extend_from_slice(table);
        layout::ACPI_TABLES_BASE + offset as u64
    }
}

fn encoded(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// A table with the standard header around `body`. (One append: each recomputes the whole checksum.)
fn sdt(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = Sdt::new(
        *signature,
        HEADER_BYTES,
        revision,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(body);
    table.as_slice().to_vec()
}

/// The FADT of a hardware-reduced platform: registers for sleep and reset, and none else (ACPI 6.5 §5.2.9).
fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // The fixed power and sleep buttons and the fixed RTC wake event do not exist.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = VGA_NOT_PRESENT.into();
    fadt.reset_reg = byte_register(layout::RESET_OFFSET);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = byte_register(layout::SLEEP_CONTROL_OFFSET);
    fadt.sleep_status_reg = byte_register(layout::SLEEP_STATUS_OFFSET);
    fadt.finalize()
}

/// A register of one byte in the ACPI register page.
fn byte_register(offset: u64) -> GAS {
    let address = layout::ACPI_REGISTERS_BASE + offset;
    GAS::new(AddressSpace::SystemMemory, 8, 0, AccessSize::ByteAccess, address)
}

/// The MADT: one local APIC per vCPU and the I/O APIC. ISA interrupts need no overrides: the ones in use (serial port,
/// GED) are described in the DSDT, and a hardware-reduced guest uses no ISA timer (ACPI 6.5 §5.2.12).
fn madt(cpu_count: u8) -> Vec<u8> {
    let mut body = Vec::with_capacity(8 + 8 * usize::from(cpu_count) + 12);
    body.extend_from_slice(&(layout::LAPIC_BASE as u32).to_le_bytes());
    body.extend_from_slice(&PCAT_COMPAT.to_le_bytes());
    for id in 0..cpu_count {
        ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut body);
    }
    IoApic::new(0, layout::IOAPIC_BASE as u32, 0).to_aml_bytes(&mut body);
    sdt(b"APIC", MADT_REVISION, &body)
}

/// The MCFG: every segment has one bus, number 0.
fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for segment in 0..layout::SEGMENT_COUNT {
        let base = layout::ECAM_BASE + u64::from(segment) * layout::ECAM_SEGMENT_BYTES;
        mcfg.add_ecam(base, segment, 0, 0);
    }
    mcfg
}
