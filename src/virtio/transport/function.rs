//! The PCI side of a device: its configuration space, its BAR on the bus and the ioeventfds inside it.
//!
//! The three are kept in step here: whatever the guest writes, the BAR answers where the registers say, and while
//! the driver is ready the notification addresses in it are the kernel's.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::interrupts::Interrupts;
use super::layout::{BAR_BYTES, CapabilityOffsets, notify_address};
use crate::bus::BusDevice;
use crate::guest_log::GuestLog;
use crate::machine::ioevents::{IoEvent, IoEvents};
use crate::pci::bar::MemoryBar;
use crate::pci::capability::{MSIX_CONTROL_ENABLE, MSIX_CONTROL_FUNCTION_MASK, MSIX_CONTROL_OFFSET};
use crate::pci::config_space::ConfigSpace;
use crate::pci::saved::SavedConfigSpaceV1;
use crate::unit::RestoreError;

/// Offset of `bar` in the configuration access capability (virtio 1.2 §4.1.4).
const PCI_CFG_BAR: u16 = 4;
/// Offset of `offset` in it.
const PCI_CFG_OFFSET: u16 = 8;
/// Offset of `length` in it.
const PCI_CFG_LENGTH: u16 = 12;
/// Offset of `pci_cfg_data` in it (virtio 1.2 §4.1.4.9).
const PCI_CFG_DATA: u16 = 16;

/// The PCI side of one device.
pub struct Function {
    config: ConfigSpace,
    capabilities: CapabilityOffsets,
    bar: MemoryBar,
    window: Arc<dyn BusDevice>,
    host: IoEvents,
    kicks: Arc<[Arc<EventFd>]>,
    armed: Vec<u16>,
    ioevents: Vec<IoEvent>,
    /// It was taken away, and whatever the guest writes late moves nothing.
    detached: bool,
}

/// An access to BAR 0 that the guest makes through configuration space (virtio 1.2 §4.1.4.9).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndirectAccess {
    /// Where in the BAR.
    pub offset: u64,
    /// 1, 2 or 4.
    pub length_bytes: usize,
    /// `pci_cfg_data`.
    pub data: [u8; 4],
}

impl Function {
    /// Makes the function with its BAR nowhere and no ioeventfd; accesses to the BAR go to `window`.
    pub fn new(
        (config, capabilities): (ConfigSpace, CapabilityOffsets),
        bar: MemoryBar,
        window: Arc<dyn BusDevice>,
        host: IoEvents,
        kicks: Arc<[Arc<EventFd>]>,
    ) -> Self {
        Self {
            config,
            capabilities,
            bar,
            window,
            host,
            kicks,
            armed: Vec::new(),
            ioevents: Vec::new(),
            detached: false,
        }
    }

    /// The guest reads configuration space.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    /// The guest writes configuration space; BAR, ioeventfds and MSI-X follow.
    pub fn write(&mut self, offset: u16, data: &[u8], interrupts: &Interrupts, log: &GuestLog) {
        self.config.write(offset, data);
        self.follow(interrupts, log);
    }

    /// The access to BAR 0 that an access to configuration space at `offset` stands for, if it is one.
    pub fn indirect_access(&self, offset: u16, length_bytes: usize) -> Option<IndirectAccess> {
        let capability = self.capabilities.pci_cfg;
        let window = capability + PCI_CFG_DATA..capability + PCI_CFG_DATA + 4;
        let end = usize::from(offset) + length_bytes;
        if offset >= window.end || end <= usize::from(window.start) {
            return None;
        }
        let bar = self.config.word(capability + PCI_CFG_BAR) as u8;
        let offset = self.config.dword(capability + PCI_CFG_OFFSET);
        let length_bytes = self.config.dword(capability + PCI_CFG_LENGTH);
        let aligned = matches!(length_bytes, 1 | 2 | 4) && offset.is_multiple_of(length_bytes);
        let inside = bar == 0 && offset < BAR_BYTES;
        (aligned && inside).then(|| IndirectAccess {
            offset: u64::from(offset),
            length_bytes: length_bytes as usize,
            data: self.config.dword(window.start).to_le_bytes(),
        })
    }

    /// Puts what an indirect read gave into `pci_cfg_data`.
    pub fn set_indirect_data(&mut self, data: &[u8]) {
        self.config.set(self.capabilities.pci_cfg + PCI_CFG_DATA, data);
    }

    /// The driver is ready: kicks of these queues go to the kernel wherever the BAR is.
    pub fn arm(&mut self, queue_indices: Vec<u16>, log: &GuestLog) {
        self.armed = queue_indices;
        self.register_ioevents(log);
    }

    /// The driver is gone: no ioeventfd stays.
    pub fn disarm(&mut self) {
        self.armed.clear();
        self.ioevents.clear();
    }

    /// Returns to the state after power-on: nothing is answered.
    pub fn reset(&mut self, interrupts: &Interrupts, log: &GuestLog) {
        self.disarm();
        self.config.reset();
        self.follow(interrupts, log);
    }

    /// Leaves the bus and the kernel for good.
    pub fn detach(&mut self) {
        self.detached = true;
        self.disarm();
        self.bar.remove();
    }

    /// What the guest changed in the configuration space.
    pub fn save(&self) -> SavedConfigSpaceV1 {
        SavedConfigSpaceV1 {
            changes: self.config.changes(),
        }
    }

    /// Takes over a saved state, which is untrusted, and follows it.
    ///
    /// # Errors
    /// [`RestoreError::Value`] for a value that the guest could not have written.
    pub fn restore(
        &mut self,
        saved: &SavedConfigSpaceV1,
        interrupts: &Interrupts,
        log: &GuestLog,
    ) -> Result<(), RestoreError> {
        let SavedConfigSpaceV1 { changes } = saved;
        self.config.restore(changes)?;
        self.follow(interrupts, log);
        Ok(())
    }

    /// Where the BAR answers now.
    pub fn bar_address(&self) -> Option<u64> {
        self.bar.address()
    }

    /// Whether the guest lets the device access memory.
    pub fn is_bus_master(&self) -> bool {
        self.config.is_bus_master()
    }

    /// Brings BAR, ioeventfds and MSI-X into step with the registers. A vector is a memory access of the device, so it
    /// stays pending while the device is no bus master (PCI 3.0 §6.2.2).
    fn follow(&mut self, interrupts: &Interrupts, log: &GuestLog) {
        if self.detached {
            return;
        }
        match self.bar.place(self.config.bar0(), &self.window) {
            Ok(false) => {}
            Ok(true) => self.register_ioevents(log),
            Err(error) => {
                log.warn(format_args!("bar 0 is not answered: {error}"));
                self.ioevents.clear();
            }
        }
        let control = self
            .config
            .word(self.capabilities.msix + u16::from(MSIX_CONTROL_OFFSET));
        let enabled = control & MSIX_CONTROL_ENABLE != 0;
        let masked = control & MSIX_CONTROL_FUNCTION_MASK != 0;
        interrupts.set_msix_control(enabled, masked || !self.config.is_bus_master());
    }

    /// Without an ioeventfd a kick takes the slow way, through the bus, and arrives as well.
    fn register_ioevents(&mut self, log: &GuestLog) {
        self.ioevents.clear();
        let Some(bar_address) = self.bar.address() else {
            return;
        };
        for &queue_index in &self.armed {
            let Some(kick) = self.kicks.get(usize::from(queue_index)) else {
                continue;
            };
            let address = notify_address(bar_address, queue_index);
            match self.host.register(address, kick.clone()) {
                Ok(ioevent) => self.ioevents.push(ioevent),
                Err(error) => log.warn(format_args!(
                    "queue {queue_index} is kicked the slow way: {error}"
                )),
            }
        }
    }
}
