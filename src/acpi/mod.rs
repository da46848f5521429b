//! ACPI as the guest sees it: tables, the DSDT's devices, the register page with the Generic Event Device, power.
//!
//! The platform is hardware-reduced (ACPI 6.5 §4.1): no SCI, no fixed registers, no PM timer. What the guest must be
//! told goes through one level-triggered interrupt of the Generic Event Device. AML reads registers when that
//! interrupt came, and for the names of hot-pluggable devices; otherwise booting costs no exits here.
//!
//! | file | what it is |
//! |---|---|
//! | [`tables`] | RSDP, XSDT, FADT, MADT, MCFG and where they lie |
//! | [`dsdt`] | the devices: host bridges, resources, serial port, clock, GED, power button, panic port |
//! | [`device`] | the register page on the bus, and its place among the units |
//! | [`pci_hotplug`] | hot-plug registers and their AML: slots, ejecting, names of their devices |
//! | [`ged`] | pending events and their interrupt |
//! | [`power`] | sleep and reset registers |
//! | [`pvpanic`] | the port through which a guest's kernel reports its panic |
//! | [`saved`] | the frozen saved forms |

#![forbid(unsafe_code)]

pub mod device;
pub mod dsdt;
pub mod ged;
pub mod pci_hotplug;
pub mod power;
pub mod pvpanic;
pub mod saved;
pub mod tables;

#[cfg(test)]
mod tests;
