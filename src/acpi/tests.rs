//! Tests of the ACPI tables, the register page and the panic port, from the guest's side.

use std::io;
use std::sync::{Arc, Mutex};

use kvm_bindings::{kvm_irq_routing_entry, kvm_userspace_memory_region};
use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::device::{ACPI_DEVICE_BYTES, AcpiDevice};
use super::pvpanic::Pvpanic;
use super::tables::AcpiTables;
use crate::bus::BusDevice;
use crate::machine::HostVm;
use crate::machine::gsi::GsiTable;
use crate::memory::layout;
use crate::unit::{PauseTicket, PowerListener, PowerRequest, Section, Unit};

/// A host VM with one pin, which the GED's line must lead to.
#[derive(Default)]
struct LineVm {
    pin: Mutex<Pin>,
}

#[derive(Default)]
struct Pin {
    active: bool,
    /// How often it became active since it was last looked at.
    rise_count: u64,
}

impl HostVm for LineVm {
    fn set_memslot(&self, _region: kvm_userspace_memory_region) -> io::Result<()> {
        Ok(())
    }

    fn register_irqfd(&self, _fd: &EventFd, _gsi: u32) -> io::Result<()> {
        Ok(())
    }

    fn set_line(&self, gsi: u32, active: bool) -> io::Result<()> {
        assert_eq!(gsi, layout::GED_GSI);
        let mut pin = self.pin.lock().unwrap();
        pin.rise_count += u64::from(active && !pin.active);
        pin.active = active;
        Ok(())
    }

    fn unregister_irqfd(&self, _fd: &EventFd, _gsi: u32) -> io::Result<()> {
        Ok(())
    }

    fn set_gsi_routing(&self, _entries: &[kvm_irq_routing_entry]) -> io::Result<()> {
        Ok(())
    }

    fn register_ioevent(&self, _fd: &EventFd, _address: u64) -> io::Result<()> {
        Ok(())
    }

    fn unregister_ioevent(&self, _fd: &EventFd, _address: u64) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Default)]
struct Requests(Mutex<Vec<PowerRequest>>);

impl PowerListener for Requests {
    fn power_request(&self, request: PowerRequest) {
        self.0.lock().unwrap().push(request);
    }
}

impl Requests {
    fn take(&self) -> Vec<PowerRequest> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

struct Page {
    device: AcpiDevice,
    vm: Arc<LineVm>,
    requests: Arc<Requests>,
}

impl Page {
    fn new() -> Self {
        let vm = Arc::new(LineVm::default());
        let line = GsiTable::new(vm.clone()).line(layout::GED_GSI).unwrap();
        let requests = Arc::new(Requests::default());
        let device = AcpiDevice::new(line, requests.clone());
        Self { device, vm, requests }
    }

    /// How often the line became active since the last call.
    fn trigger_count(&self) -> u64 {
        std::mem::take(&mut self.vm.pin.lock().unwrap().rise_count)
    }

    fn is_active(&self) -> bool {
        self.vm.pin.lock().unwrap().active
    }

    fn read_select(&self) -> u32 {
        let mut data = [0; 4];
        self.device.read(layout::GED_SELECT_OFFSET, &mut data);
        u32::from_le_bytes(data)
    }
}

fn ticket() -> PauseTicket {
    PauseTicket::new(|| ())
}

#[test]
fn a_pressed_button_interrupts_and_is_told_once() {
    let page = Page::new();
    assert_eq!(page.trigger_count(), 0);
    page.device.press_power_button();
    assert_eq!(page.trigger_count(), 1, "the press interrupts");
    assert!(page.is_active(), "until the guest reads, whenever it listens");
    assert_eq!(page.read_select(), 1, "bit 0 is the power button");
    assert!(!page.is_active(), "nothing is pending");
    assert_eq!(page.read_select(), 0, "reading clears");
}

#[test]
fn a_button_pressed_while_paused_waits_for_the_resume() {
    let page = Page::new();
    page.device.pause(ticket());
    page.device.press_power_button();
    assert_eq!(
        page.trigger_count(),
        0,
        "nothing is injected into a paused machine"
    );
    page.device.resume();
    assert_eq!(page.trigger_count(), 1);
    assert_eq!(page.read_select(), 1);
}

#[test]
fn pending_events_survive_save_and_restore_but_not_reset() {
    let page = Page::new();
    page.device.press_power_button();
    page.device.pause(ticket());
    let section = page.device.save().unwrap();

    let restored = Page::new();
    restored.device.pause(ticket());
    restored.device.restore(&section).unwrap();
    restored.device.resume();
    assert_eq!(restored.trigger_count(), 1, "the event is announced again");
    assert_eq!(restored.read_select(), 1);

    page.device.reset();
    assert_eq!(page.read_select(), 0, "reset forgets pending events");
}

#[test]
fn impossible_saved_states_are_refused_by_name() {
    let page = Page::new();
    let event = Section {
        schema: 1,
        body: serde_json::json!({ "ged_pending": 0x8000_0001u32 }),
    };
    assert_eq!(
        page.device.restore(&event).unwrap_err().to_string(),
        "saved ged_pending is 0x80000001: it names events that this machine does not have"
    );
    for body in [
        serde_json::json!({}),
        serde_json::json!({ "ged_pending": 0, "more": 1 }),
        serde_json::json!({ "ged_pending": -1 }),
        serde_json::json!([]),
    ] {
        let section = Section { schema: 1, body };
        let error = page.device.restore(&section).unwrap_err();
        assert_eq!(error.to_string(), "the saved state is malformed", "{section:?}");
    }
    assert_eq!(page.read_select(), 0, "a refused state changes nothing");
}

#[test]
fn sleep_and_reset_registers_reach_the_listener() {
    let page = Page::new();
    page.device.write(layout::SLEEP_CONTROL_OFFSET, &[0x34]);
    assert_eq!(page.requests.take(), [PowerRequest::PowerOff]);
    page.device.write(layout::RESET_OFFSET, &[layout::RESET_VALUE]);
    assert_eq!(page.requests.take(), [PowerRequest::Reset]);
    // Linux clears the wake status and may write the control register as a word; neither asks for anything.
    page.device.write(layout::SLEEP_STATUS_OFFSET, &[0x80]);
    page.device.write(layout::SLEEP_CONTROL_OFFSET, &[0x34, 0]);
    assert_eq!(page.requests.take(), []);
    let mut status = [0xFF];
    page.device.read(layout::SLEEP_STATUS_OFFSET, &mut status);
    assert_eq!(status, [0], "no wake status");
}

#[test]
fn the_panic_port_tells_panics_apart_from_crash_kernels() {
    let requests = Arc::new(Requests::default());
    let port = Pvpanic::new(requests.clone());
    let mut features = [0xFF];
    port.read(0, &mut features);
    assert_eq!(features, [0x3]);
    port.write(0, &[0x2]);
    port.write(0, &[0x80]);
    port.write(0, &[0x1, 0x1]);
    assert_eq!(
        requests.take(),
        [],
        "a crash kernel goes on, and the rest is noise"
    );
    port.write(0, &[0x1]);
    assert_eq!(requests.take(), [PowerRequest::Panicked]);
    let section = port.save().unwrap();
    assert!(port.restore(&section).is_ok());
}

proptest! {
    #[test]
    fn hostile_accesses_get_ones_and_change_nothing(
        offset in prop_oneof![0..0x110u64, 0..ACPI_DEVICE_BYTES, any::<u64>()],
        data in prop::collection::vec(any::<u8>(), 0..=8),
    ) {
        let page = Page::new();
        page.device.press_power_button();
        let is_byte_register = (0x100..=0x102).contains(&offset) && data.len() == 1;
        page.device.write(offset, &data);
        let requests = page.requests.take();
        if !is_byte_register {
            prop_assert!(requests.is_empty(), "{requests:?}");
        }
        let mut read = vec![0xA5; data.len()];
        page.device.read(offset, &mut read);
        if offset == 0 && data.len() == 4 {
            prop_assert_eq!(read, [1, 0, 0, 0]);
        } else {
            let expected = if is_byte_register { 0 } else { 0xFF };
            prop_assert!(read.iter().all(|byte| *byte == expected), "{read:x?}");
            prop_assert_eq!(page.read_select(), 1, "only the select register's own read clears it");
        }
        let mut byte = data;
        page.device.read(offset, &mut byte);
        let port = Pvpanic::new(page.requests.clone());
        port.read(offset, &mut byte);
        port.write(offset, &byte);
    }
}

/// The tables as a guest walks them: by address from the RSDP.
struct Walk {
    tables: AcpiTables,
}

impl Walk {
    fn new(cpu_count: u8) -> Self {
        Self {
            tables: AcpiTables::new(cpu_count),
        }
    }

    /// The table at `address`, after checking its length, its checksum and its signature.
    fn table(&self, address: u64, signature: &str) -> &[u8] {
        assert_eq!(address % 16, 0, "{signature} is aligned");
        let start = usize::try_from(address - layout::ACPI_TABLES_BASE).unwrap();
        let length = number(&self.tables.bytes, start + 4, 4) as usize;
        let table = &self.tables.bytes[start..start + length];
        assert_eq!(&table[..4], signature.as_bytes());
        assert_eq!(sum(table), 0, "checksum of {signature}");
        table
    }

    fn xsdt_entries(&self) -> Vec<u64> {
        let rsdp = &self.tables.bytes[..36];
        let xsdt = self.table(number(rsdp, 24, 8), "XSDT");
        xsdt[36..].chunks(8).map(|entry| number(entry, 0, 8)).collect()
    }

    fn fadt(&self) -> &[u8] {
        self.table(self.xsdt_entries()[0], "FACP")
    }
}

fn number(bytes: &[u8], offset: usize, width: usize) -> u64 {
    bytes[offset..offset + width]
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

#[test]
fn a_guest_finds_every_table_from_the_rsdp() {
    let walk = Walk::new(2);
    assert_eq!(walk.tables.rsdp_address, layout::ACPI_TABLES_BASE);
    let rsdp = &walk.tables.bytes[..36];
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0), "both checksums");
    assert_eq!(rsdp[15], 2, "revision");
    let entries = walk.xsdt_entries();
    assert_eq!(entries.len(), 3);
    for (address, signature) in entries.iter().zip(["FACP", "APIC", "MCFG"]) {
        walk.table(*address, signature);
    }
    let dsdt = walk.table(number(walk.fadt(), 140, 8), "DSDT");
    assert!(dsdt[8] >= 2, "64-bit integers");
}

#[test]
fn the_fadt_describes_a_hardware_reduced_machine() {
    let walk = Walk::new(1);
    let fadt = walk.fadt();
    assert_eq!(
        (fadt.len(), fadt[8], fadt[131]),
        (276, 6, 5),
        "length and ACPI version"
    );
    let flags = number(fadt, 112, 4);
    assert_ne!(flags & 1 << 20, 0, "HW_REDUCED_ACPI");
    assert_ne!(flags & 1 << 10, 0, "RESET_REG_SUP");
    // No keyboard controller (bit 1) and no VGA (bit 2), but a CMOS clock (bit 5).
    assert_eq!(number(fadt, 109, 2), 0b100, "IAPC_BOOT_ARCH");
    let byte_register = |offset: u64| {
        [
            &[0, 8, 0, 1],
            &(layout::ACPI_REGISTERS_BASE + offset).to_le_bytes()[..],
        ]
        .concat()
    };
    assert_eq!(fadt[116..128], byte_register(layout::RESET_OFFSET));
    assert_eq!(fadt[128], layout::RESET_VALUE);
    assert_eq!(fadt[244..256], byte_register(layout::SLEEP_CONTROL_OFFSET));
    assert_eq!(fadt[256..268], byte_register(layout::SLEEP_STATUS_OFFSET));
}

#[test]
fn the_madt_lists_every_cpu_once_and_the_io_apic() {
    for cpu_count in [1, 2, 64, 255] {
        let walk = Walk::new(cpu_count);
        let madt = walk.table(walk.xsdt_entries()[1], "APIC");
        assert_eq!(number(madt, 36, 4), layout::LAPIC_BASE);
        let (cpus, io_apic) = madt[44..].split_at(8 * usize::from(cpu_count));
        for (id, cpu) in cpus.chunks(8).enumerate() {
            assert_eq!(cpu, [0, 8, id as u8, id as u8, 1, 0, 0, 0]);
        }
        assert_eq!(io_apic[..2], [1, 12]);
        assert_eq!(
            (number(io_apic, 4, 4), number(io_apic, 8, 4)),
            (layout::IOAPIC_BASE, 0)
        );
        assert!(walk.tables.bytes.len() as u64 <= layout::ACPI_TABLES_MAX_BYTES);
    }
}

#[test]
fn the_mcfg_has_one_bus_per_segment() {
    let walk = Walk::new(1);
    let mcfg = walk.table(walk.xsdt_entries()[2], "MCFG");
    let entries: Vec<_> = mcfg[44..].chunks(16).collect();
    assert_eq!(entries.len(), usize::from(layout::SEGMENT_COUNT));
    for (segment, entry) in (0..).zip(entries) {
        let bdf = crate::ids::Bdf::new(segment, 0).unwrap();
        assert_eq!(number(entry, 0, 8), layout::ecam_address(bdf));
        assert_eq!(
            (number(entry, 8, 2), entry[10], entry[11]),
            (u64::from(segment), 0, 0)
        );
    }
}

/// Resource descriptors are byte sequences of their own (ACPI 6.5 §6.4); the DSDT must hold these.
#[test]
fn the_dsdt_reserves_what_the_layout_says() {
    let walk = Walk::new(1);
    let dsdt = walk.table(number(walk.fadt(), 140, 8), "DSDT");
    let holds = |what: &str, bytes: &[u8]| {
        let count = dsdt
            .windows(bytes.len())
            .filter(|window| *window == bytes)
            .count();
        assert_eq!(count, 1, "{what}: {bytes:02x?}");
    };
    let word = |value: u64| (value as u32).to_le_bytes();
    let interrupt = |flags: u8, gsi: u32| [&[0x89, 6, 0, flags, 1][..], &gsi.to_le_bytes()].concat();
    let ports = |base: u16, count: u8| {
        [
            &[0x47, 1][..],
            &base.to_le_bytes(),
            &base.to_le_bytes(),
            &[1, count],
        ]
        .concat()
    };
    let fixed = |base: u64, len: u64| [&[0x86, 9, 0, 1][..], &word(base), &word(len)].concat();
    let (edge, level) = (0b011, 0b001);
    holds(
        "interrupt of the serial port",
        &interrupt(edge, layout::SERIAL_GSI),
    );
    holds("interrupt of the GED", &interrupt(level, layout::GED_GSI));
    holds("serial port", &ports(layout::SERIAL_PORT, 8));
    holds("clock", &ports(layout::RTC_PORT, 2));
    holds("panic port", &ports(0x505, 1));
    let ecam_bytes = u64::from(layout::SEGMENT_COUNT) * layout::ECAM_SEGMENT_BYTES;
    holds("ECAM", &fixed(layout::ECAM_BASE, ecam_bytes));
    holds(
        "registers",
        &fixed(layout::ACPI_REGISTERS_BASE, layout::ACPI_REGISTERS_BYTES),
    );
    for segment in 0..layout::SEGMENT_COUNT {
        let first = layout::mmio_window(segment);
        let window = [
            &[0x87, 23, 0, 0, 0b1100, 1, 0, 0, 0, 0][..],
            &word(first),
            &word(first + layout::MMIO_SEGMENT_BYTES - 1),
            &[0; 4],
            &word(layout::MMIO_SEGMENT_BYTES),
        ];
        holds("memory window", &window.concat());
    }
}
