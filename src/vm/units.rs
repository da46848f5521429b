//! A machine on KVM: everything of a VM that exists only while its guest does.
//!
//! Fields are dropped in order: vCPUs first, so that nothing touches a device that is going away; the event loop next,
//! which lets go of every handler; guest memory last.

use std::sync::Arc;

use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress};

use crate::acpi::device::AcpiDevice;
use crate::acpi::pci_hotplug::registers::SlotListener;
use crate::acpi::tables::AcpiTables;
use crate::boot::BootSource;
use crate::bus::BusClaim;
use crate::config::NicConfig;
use crate::event_loop::EventLoop;
use crate::ids::{Bdf, NicName, UnitName};
use crate::legacy::serial::Serial;
use crate::machine::memslots::Memslot;
use crate::machine::vcpu::Vcpu;
use crate::memory::layout::ACPI_TABLES_BASE;
use crate::memory::region::GuestRam;
use crate::pci::root::PciRoot;
use crate::unit::{PauseTicket, Unit};
use crate::virtio::net::Net;
use crate::virtio::transport::{TransportResources, VirtioPciDevice};
use crate::vm::device_set::DeviceSet;
use crate::vm::host::HostDevices;
use crate::vm::mailbox::Mailbox;
use crate::vm::memory::machine::MachineMemory;
use crate::vm::memory_units::MemoryUnits;
use crate::vm::platform::{BuildError, DeviceStatus, Machine};

/// A machine on KVM, as `builder.rs` makes it.
#[allow(dead_code)] // some parts are only held, and undo themselves when they are dropped
pub(super) struct KvmMachine {
    pub vcpus: Vec<Vcpu>,
    pub event_loop: EventLoop,
    pub devices: DeviceSet,
    pub resources: TransportResources,
    pub host: Arc<dyn HostDevices>,
    pub serial: Arc<Serial>,
    /// Everything but vCPUs and virtio devices.
    pub units: Vec<Arc<dyn Unit>>,
    pub claims: Vec<BusClaim>,
    pub pci: Arc<PciRoot>,
    pub acpi: Arc<AcpiDevice>,
    pub tables: AcpiTables,
    pub boot: BootSource,
    pub memory: MemoryUnits,
    pub ram: Arc<GuestRam>,
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

    /// Does `act` with every unit, of which none comes or goes meanwhile: the platform's, the devices in the order in
    /// which they were added, vCPUs. `pausing` says whether the machine stands from now on, or runs.
    pub(super) fn with_units<R>(&self, pausing: Option<bool>, act: impl FnOnce(&[&dyn Unit]) -> R) -> R {
        let mut devices = self.devices.lock();
        if let Some(is_paused) = pausing {
            devices.set_paused(is_paused);
        }
        let vcpus = self.vcpus.iter().map(|vcpu| vcpu as &dyn Unit);
        let platform = self.units.iter().map(|unit| &**unit);
        let devices = devices.devices().iter().map(|device| &**device as &dyn Unit);
        act(&platform.chain(devices).chain(vcpus).collect::<Vec<_>>())
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
        self.with_units(Some(true), |units| {
            units.iter().for_each(|unit| unit.pause(ticket.clone()));
        });
    }

    fn resume_units(&self) {
        self.with_units(Some(false), |units| units.iter().for_each(|unit| unit.resume()));
    }

    fn reset(&self) -> Result<(), BuildError> {
        self.with_units(None, |units| units.iter().for_each(|unit| unit.reset()));
        self.memory.reset().map_err(|source| BuildError::Host {
            what: "to clear the guest's memory",
            source,
        })?;
        self.load()
    }

    fn press_power_button(&self) {
        self.acpi.press_power_button();
    }

    fn serial_input(&self, bytes: &[u8]) -> usize {
        self.serial.input(bytes)
    }

    fn tear_down(&self) {
        self.vcpus.iter().for_each(Vcpu::stop);
    }

    fn memory(&self) -> &dyn MachineMemory {
        &self.memory
    }

    fn add_nic(&self, nic: &NicConfig) -> Result<(), BuildError> {
        let slot = self.pci.reserve(nic.bdf)?;
        let device = build_nic(&*self.host, &self.resources, nic)?;
        self.devices.add_nic(slot, device, nic);
        Ok(())
    }

    fn announce(&self, unit: &UnitName) {
        self.devices.announce(unit);
    }

    fn request_eject(&self, unit: &UnitName) -> bool {
        self.devices.request_eject(unit)
    }

    fn offer(&self, unit: &UnitName) -> bool {
        self.devices.offer(unit)
    }

    fn remove_device(&self, unit: &UnitName) -> bool {
        self.devices.remove(unit)
    }

    fn rename_nic(&self, unit: &UnitName, name: &NicName) {
        self.devices.rename(unit, name);
    }

    fn set_link(&self, unit: &UnitName, up: bool) {
        self.devices.set_link(unit, up);
    }

    fn devices(&self) -> Vec<DeviceStatus> {
        let status = |device: &Arc<VirtioPciDevice>| DeviceStatus {
            unit: device.name(),
            driver_ready: device.driver_ready(),
        };
        self.devices.lock().devices().iter().map(status).collect()
    }

    fn inspect(&self) -> Value {
        let inspect = |unit: &&dyn Unit| (unit.name().to_string(), unit.inspect());
        let units: serde_json::Map<_, _> = self.with_units(None, |units| units.iter().map(inspect).collect());
        json!({
            "units": units,
            "runtime": self.memory.inspect(),
            "ram": { "size_bytes": self.ram.size_bytes(), "resident_bytes": self.ram.resident_bytes().ok() },
            "memslot_count": self.memslots.len(),
            "msi_count": self.resources.gsi.msi_count(),
            "ioevent_count": self.resources.ioevents.count(),
            "mmio_range_count": self.resources.mmio.range_count(),
        })
    }
}

/// Opens the backend of `nic` and puts its device behind PCI; nothing is visible yet.
///
/// # Errors
/// [`BuildError`] names what the host refuses.
pub(super) fn build_nic(
    host: &dyn HostDevices,
    resources: &TransportResources,
    nic: &NicConfig,
) -> Result<Arc<VirtioPciDevice>, BuildError> {
    let backend = host.nic(nic).map_err(|source| BuildError::Nic {
        name: nic.name.clone(),
        source,
    })?;
    let mut net = Net::new(nic.mac, backend)?;
    net.set_link(nic.link_up);
    let (name, resources) = (nic.unit_name(), resources.clone());
    Ok(VirtioPciDevice::new(Box::new(net), name, nic.bdf, resources)?)
}

impl SlotListener for Mailbox {
    fn ejected(&self, bdf: Bdf, asked: bool) {
        Mailbox::ejected(self, bdf, asked);
    }
}
