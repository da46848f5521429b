//! A machine on KVM: everything of a VM that exists only while its guest does.
//!
//! Fields are dropped in order: vCPUs first, so that nothing touches a device that is going away; the event loop next,
//! which lets go of every handler; guest memory last.

use std::sync::Arc;

use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress};

use crate::acpi::device::AcpiDevice;
use crate::acpi::tables::AcpiTables;
use crate::boot::BootSource;
use crate::bus::BusClaim;
use crate::event_loop::EventLoop;
use crate::machine::memslots::Memslot;
use crate::machine::vcpu::Vcpu;
use crate::memory::layout::ACPI_TABLES_BASE;
use crate::memory::region::GuestRam;
use crate::pci::root::PciRoot;
use crate::pci::slots::OccupiedSlot;
use crate::unit::{PauseTicket, Unit};
use crate::virtio::transport::VirtioPciDevice;
use crate::vm::platform::{BuildError, DeviceStatus, Machine};

/// A machine on KVM, as `builder.rs` makes it.
#[allow(dead_code)] // some parts are only held, and undo themselves when they are dropped
pub(super) struct KvmMachine {
    pub vcpus: Vec<Vcpu>,
    pub event_loop: EventLoop,
    pub slots: Vec<OccupiedSlot>,
    pub devices: Vec<Arc<VirtioPciDevice>>,
    pub units: Vec<Arc<dyn Unit>>,
    pub claims: Vec<BusClaim>,
    pub pci: Arc<PciRoot>,
    pub acpi: Arc<AcpiDevice>,
    pub tables: AcpiTables,
    pub boot: BootSource,
    pub ram: GuestRam,
    pub memslots: Vec<Memslot>,
}

impl KvmMachine {
    /// Puts ACPI tables and kernel into guest memory and vCPU 0 at the kernel's entry.
    ///
    /// # Errors
    /// [`BuildError`] when the kernel cannot be loaded.
    pub fn load(&self) -> Result<(), BuildError> {
        let tables = &self.tables;
        let written = self
            .ram
            .memory()
            .write_slice(&tables.bytes, GuestAddress(ACPI_TABLES_BASE));
        written.map_err(|error| BuildError::Host {
            what: "a place for the acpi tables",
            source: std::io::Error::other(error),
        })?;
        let entry = self.boot.load(&self.ram, tables.rsdp_address)?;
        if let Some(first) = self.vcpus.first() {
            first.enter_at(entry)?;
        }
        Ok(())
    }

    fn vcpu_units(&self) -> impl Iterator<Item = &dyn Unit> {
        self.vcpus.iter().map(|vcpu| vcpu as &dyn Unit)
    }

    pub(super) fn all_units(&self) -> impl Iterator<Item = &dyn Unit> {
        self.units.iter().map(|unit| &**unit).chain(self.vcpu_units())
    }
}

impl Machine for KvmMachine {
    fn vcpu_count(&self) -> u32 {
        self.vcpus.len() as u32
    }

    fn run_vcpus(&self) {
        self.vcpus.iter().for_each(Vcpu::run);
    }

    fn park_vcpus(&self) {
        self.vcpus.iter().for_each(Vcpu::park);
    }

    fn pause_units(&self, ticket: PauseTicket) {
        // In any order: the vCPUs stand, and what a device still completes is in no unit's time but the host's.
        self.all_units().for_each(|unit| unit.pause(ticket.clone()));
    }

    fn resume_units(&self) {
        self.all_units().for_each(Unit::resume);
    }

    fn reset(&self) -> Result<(), BuildError> {
        self.all_units().for_each(Unit::reset);
        self.ram.clear().map_err(|source| BuildError::Host {
            what: "to clear the guest's memory",
            source,
        })?;
        self.load()
    }

    fn press_power_button(&self) {
        self.acpi.press_power_button();
    }

    fn tear_down(&self) {
        self.vcpus.iter().for_each(Vcpu::stop);
    }

    fn devices(&self) -> Vec<DeviceStatus> {
        let status = |device: &Arc<VirtioPciDevice>| DeviceStatus {
            unit: device.name(),
            driver_ready: device.driver_ready(),
        };
        self.devices.iter().map(status).collect()
    }

    fn inspect(&self) -> Value {
        let units: serde_json::Map<_, _> = self
            .all_units()
            .map(|unit| (unit.name().to_string(), unit.inspect()))
            .collect();
        json!({
            "units": units,
            "ram": { "size_bytes": self.ram.size_bytes(), "resident_bytes": self.ram.resident_bytes().ok() },
            "memslot_count": self.memslots.len(),
        })
    }
}
