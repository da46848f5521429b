//! The virtio devices of a machine, those that come and go while it runs included.
//!
//! Whoever goes through the devices holds the set's lock, so that none is dropped under him and a device that is added
//! during a pause is paused before anybody can reach it. The guest's vCPUs never take this lock.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::acpi::pci_hotplug::registers::{PciHotplug, Removed, SlotName};
use crate::config::NicConfig;
use crate::ids::{NicName, UnitName};
use crate::pci::device::Orphan;
use crate::pci::slots::{OccupiedSlot, SlotReservation};
use crate::unit::{PauseTicket, Unit};
use crate::virtio::net::Net;
use crate::virtio::transport::VirtioPciDevice;

/// The devices and their slots.
pub(super) struct DeviceSet {
    hotplug: Arc<PciHotplug>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
pub(super) struct Inner {
    is_paused: bool,
    /// Of the devices that are there for as long as the machine; the others' slots are with the hot-plug registers.
    _fixed_slots: Vec<OccupiedSlot>,
    devices: Vec<Arc<VirtioPciDevice>>,
}

impl Inner {
    /// The devices, in the order in which they were added.
    pub fn devices(&self) -> &[Arc<VirtioPciDevice>] {
        &self.devices
    }

    /// Notes whether what is added from now on is added to a machine that stands.
    pub fn set_paused(&mut self, is_paused: bool) {
        self.is_paused = is_paused;
    }

    fn add(&mut self, device: Arc<VirtioPciDevice>) {
        if self.is_paused {
            // Nothing of a new device is in flight, and nobody waits for it.
            device.pause(PauseTicket::new(|| ()));
        }
        self.devices.push(device);
    }
}

impl DeviceSet {
    /// Makes an empty set; hot-pluggable devices are shown through `hotplug`.
    pub fn new(hotplug: Arc<PciHotplug>) -> Self {
        Self {
            hotplug,
            inner: Mutex::default(),
        }
    }

    /// Adds a device that stays for as long as the machine, and makes it visible.
    pub fn add_fixed(&self, slot: SlotReservation, device: Arc<VirtioPciDevice>) {
        let mut inner = self.lock();
        inner.add(device.clone());
        inner._fixed_slots.push(slot.occupy(device));
    }

    /// Adds the device of `nic` and makes it visible. The guest is not told.
    pub fn add_nic(&self, slot: SlotReservation, device: Arc<VirtioPciDevice>, nic: &NicConfig) {
        let name = nic.acpi_index.map(|acpi_index| SlotName {
            acpi_index,
            label: (&nic.name).into(),
        });
        self.lock().add(device.clone());
        self.hotplug.insert(slot, device, name);
    }

    /// Asks the guest to look at the device `unit`, which is new.
    pub fn announce(&self, unit: &UnitName) {
        if let Some(device) = self.find(unit) {
            self.hotplug.announce(device.bdf());
        }
    }

    /// Asks the guest to let go of the device `unit`; `false` when it has none of that name that it could.
    pub fn request_eject(&self, unit: &UnitName) -> bool {
        self.find(unit)
            .is_some_and(|device| self.hotplug.request_eject(device.bdf()))
    }

    /// Withdraws a request to let go of the device `unit` and asks the guest to look at it again; `false` when it cannot.
    pub fn offer(&self, unit: &UnitName) -> bool {
        self.find(unit)
            .is_some_and(|device| self.hotplug.offer(device.bdf()))
    }

    /// Takes the hot-pluggable device `unit` out; its slot is free when everything else of it is. `false` when there
    /// is none.
    pub fn remove(&self, unit: &UnitName) -> bool {
        let Some(device) = self.find(unit) else {
            return false;
        };
        let bdf = device.bdf();
        let Some(removed) = self.hotplug.remove(bdf) else {
            return false;
        };
        // A vCPU may be in the middle of an access, and hold the device a little longer.
        let forget = || self.lock().devices.retain(|other| !Arc::ptr_eq(other, &device));
        match &removed {
            Removed::Ejected(_) => {
                forget();
                device.detach();
            }
            Removed::ByForce(_) => {
                device.orphan();
                self.hotplug.tell_taken(bdf, Box::new(Taken(device.clone())));
                // Not before: a pause that comes now must find it here or there.
                forget();
                // Closing a tap waits for the host's network, and nobody shall wait for that.
                drop(device.with_device(Net::unplug));
            }
        }
        drop(device);
        drop(removed);
        true
    }

    /// Shows the guest another name of the network card `unit`.
    pub fn rename(&self, unit: &UnitName, name: &NicName) {
        if let Some(device) = self.find(unit) {
            self.hotplug.rename(device.bdf(), &name.into());
        }
    }

    /// Plugs the cable of the network card `unit` in, or pulls it out.
    pub fn set_link(&self, unit: &UnitName, up: bool) {
        if let Some(device) = self.find(unit) {
            device.with_device::<Net, _>(|net| net.set_link(up));
        }
    }

    /// The set, which does not change while it is held.
    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, unit: &UnitName) -> Option<Arc<VirtioPciDevice>> {
        let inner = self.lock();
        inner
            .devices
            .iter()
            .find(|device| device.name() == *unit)
            .cloned()
    }
}

/// A device that was taken by force, which its driver has not let go of.
struct Taken(Arc<VirtioPciDevice>);

impl Orphan for Taken {
    fn bar_range(&self) -> Option<Range<u64>> {
        self.0.bar_range()
    }

    fn pause(&self, ticket: PauseTicket) {
        Unit::pause(&*self.0, ticket);
    }

    fn resume(&self) {
        Unit::resume(&*self.0);
    }
}
