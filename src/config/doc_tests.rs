//! Tests that the pages under `docs/` say what the code does.

use std::collections::BTreeMap;

use super::{SEGMENT_COUNT, read, write};
use crate::acpi::pvpanic::PVPANIC_PORT;
use crate::memory::layout;

const MEMORY_MAP: &str = include_str!("../../docs/memory-map.md");
const LAYOUT_SOURCE: &str = include_str!("../memory/layout.rs");
const CONFIG_FORMAT: &str = include_str!("../../docs/formats/config.md");

/// The rows ``| `NAME` | number | …`` of the page.
fn documented() -> BTreeMap<&'static str, u64> {
    let row = |line: &'static str| {
        let mut cells = line.split('|').map(str::trim).skip(1);
        let name = cells.next()?.strip_prefix('`')?.strip_suffix('`')?;
        let value = cells.next()?;
        let number = match value.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => value.parse(),
        };
        Some((name, number.ok()?))
    };
    MEMORY_MAP.lines().filter_map(row).collect()
}

/// Pairs each name with the value of that constant.
macro_rules! constants {
    ($($name:ident)*) => { [$((stringify!($name), layout::$name as u64)),*] };
}

#[test]
fn the_memory_map_lists_every_constant_of_the_layout() {
    let mut expected = BTreeMap::from(constants! {
        LOW_RAM_END HIGH_RAM_START RUNTIME_MEMORY_ALIGN_BYTES RUNTIME_MEMORY_LARGE_ALIGN_BYTES
        RUNTIME_MEMORY_LARGE_RAM_BYTES SEGMENT_COUNT MMIO_BASE MMIO_SEGMENT_BYTES MMIO_SLOT_BYTES ECAM_BASE
        ECAM_SEGMENT_BYTES ACPI_REGISTERS_BASE ACPI_REGISTERS_BYTES GED_SELECT_OFFSET SLEEP_CONTROL_OFFSET
        SLEEP_STATUS_OFFSET RESET_OFFSET RESET_VALUE HOTPLUG_OFFSET HOTPLUG_PRESENT_OFFSET HOTPLUG_EJECT_OFFSET
        HOTPLUG_SELECT_OFFSET HOTPLUG_INDEX_OFFSET HOTPLUG_LABEL_OFFSET HOTPLUG_LABEL_BYTES IOAPIC_BASE LAPIC_BASE KVM_TSS_BASE
        KVM_IDENTITY_MAP_BASE IOAPIC_PIN_COUNT SERIAL_GSI GED_GSI RTC_GSI SERIAL_PORT SERIAL_PORT_COUNT
        I8042_COMMAND_PORT RESET_CONTROL_PORT RTC_PORT BOOT_PARAMS_BASE PVH_MEMMAP_BASE BOOT_GDT_BASE
        BOOT_PAGE_TABLES_BASE BOOT_STACK CMDLINE_BASE CMDLINE_MAX_BYTES EBDA_START ACPI_TABLES_BASE
        ACPI_TABLES_MAX_BYTES RESET_VECTOR HIGH_MEMORY_START
    });
    let names: Vec<_> = LAYOUT_SOURCE
        .lines()
        .filter_map(|line| line.strip_prefix("pub const ")?.split_once(':'))
        .map(|(name, _)| name)
        .filter(|name| !name.starts_with("fn "))
        .collect();
    for name in &names {
        assert!(
            expected.contains_key(name),
            "{name} is new in the layout: add it here and to the page"
        );
    }
    assert_eq!(names.len(), expected.len(), "the layout holds each constant once");
    expected.insert("PVPANIC_PORT", u64::from(PVPANIC_PORT));
    assert_eq!(documented(), expected);
}

#[test]
fn the_memory_map_shows_the_platform_slots() {
    for (bdf, what) in [
        (super::RNG_BDF, "entropy device"),
        (super::CONSOLE_BDF, "console"),
    ] {
        let row = format!("| `{bdf}` | {what} |");
        assert!(MEMORY_MAP.contains(&row), "{row}");
    }
    let last = format!(
        "– `{:04x}:00:1f.0` | disks and network cards |",
        SEGMENT_COUNT - 1
    );
    assert!(MEMORY_MAP.contains(&last), "{last}");
    let first = format!("`0000:00:{:02x}.0` –", super::PLATFORM_SLOT_COUNT);
    assert!(MEMORY_MAP.contains(&first), "{first}");
}

#[test]
fn the_documents_on_the_page_are_real() {
    let examples: Vec<_> = CONFIG_FORMAT
        .split("```json\n")
        .skip(1)
        .filter_map(|rest| Some(rest.split_once("```")?.0))
        .collect();
    assert_eq!(examples.len(), 2);
    for example in examples {
        let config = read(example.as_bytes()).expect("the page's document is valid");
        assert_eq!(String::from_utf8_lossy(&write(&config)), example);
    }
}
