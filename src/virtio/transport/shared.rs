//! What a device's owner, the bus and the event loop share: the three locks, and the guest's accesses to BAR 0.
//!
//! Lock order: `core`, then `function`, then the interrupts' own. The configuration space and the MSI-X table do not
//! wait for the data path, but for a change of Bus Master Enable; the registers and the device configuration do, because
//! the device is asked.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::common_config::WriteEffect;
use super::function::Function;
use super::interrupts::Interrupts;
use super::layout::{self, NOTIFY_OFF_MULTIPLIER, Part};
use super::runtime::Core;
use crate::bus::BusDevice;
use crate::event_loop::LoopHandle;
use crate::guest_log::GuestLog;
use crate::ids::UnitName;
use crate::machine::gsi::MsiPromise;
use crate::unit::UnitListener;

/// The shared part of one device.
pub struct Shared {
    pub name: UnitName,
    pub core: Mutex<Core>,
    pub function: Mutex<Function>,
    pub interrupts: Arc<Interrupts>,
    pub _vectors: MsiPromise,
    pub kicks: Arc<[Arc<EventFd>]>,
    /// For those who must not wait for `core`; written under it.
    pub driver: DriverCell,
    pub memory: GuestMemoryAtomic<GuestMemoryMmap>,
    pub event_loop: LoopHandle,
    pub listener: Arc<dyn UnitListener>,
    pub log: GuestLog,
    /// For the handlers that the event loop is given.
    pub me: Weak<Self>,
}

impl Shared {
    /// The guest reads BAR 0. What is no register reads as zero.
    pub fn bar_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match layout::part(offset, data.len()) {
            Some((Part::Common, offset)) => {
                let mut core = self.core();
                self.settle(&mut core);
                core.config.read(offset, data, &self.interrupts);
            }
            Some((Part::Isr, 0)) => {
                if let Some(byte) = data.first_mut() {
                    *byte = self.interrupts.take_isr();
                }
            }
            Some((Part::Device, offset)) => self.core().device.config_read(offset, data),
            Some((Part::MsixTable, offset)) => self.interrupts.table_read(offset, data),
            Some((Part::MsixPba, offset)) => self.interrupts.pba_read(offset, data),
            Some((Part::Isr | Part::Notify, _)) | None => {}
        }
    }

    /// The guest writes BAR 0.
    pub fn bar_write(&self, offset: u64, data: &[u8]) {
        match layout::part(offset, data.len()) {
            Some((Part::Common, offset)) => {
                let mut core = self.core();
                match core.config.write(offset, data, &self.interrupts) {
                    WriteEffect::None => {}
                    WriteEffect::Status(written) => self.write_status(&mut core, written),
                    WriteEffect::Ignored(what) => self.log.warn(format_args!("ignored {what}")),
                }
            }
            Some((Part::Device, offset)) => self.core().device.config_write(offset, data),
            Some((Part::Notify, offset)) => self.kick(offset / u64::from(NOTIFY_OFF_MULTIPLIER)),
            Some((Part::MsixTable, offset)) => self.interrupts.table_write(offset, data),
            Some((Part::Isr | Part::MsixPba, _)) | None => {}
        }
    }

    /// The slow way of a kick, for a guest that kicks before it is ready and a host without ioeventfds.
    fn kick(&self, queue_index: u64) {
        let kick = usize::try_from(queue_index).ok();
        let kick = kick.and_then(|index| self.kicks.get(index));
        let Some(kick) = kick else {
            self.log
                .warn(format_args!("kick of queue {queue_index}, which does not exist"));
            return;
        };
        raise(kick);
    }

    pub fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn function(&self) -> MutexGuard<'_, Function> {
        self.function.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a device has a driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// None that is ready.
    Absent,
    /// One that set `DRIVER_OK`.
    Ready,
    /// One that broke the rules; the device does nothing until it is reset.
    Broken,
}

/// A [`Driver`] that can be read at any time.
#[derive(Default)]
pub struct DriverCell(AtomicU8);

impl DriverCell {
    pub fn get(&self) -> Driver {
        match self.0.load(Ordering::Acquire) {
            0 => Driver::Absent,
            1 => Driver::Ready,
            _ => Driver::Broken,
        }
    }

    pub fn set(&self, driver: Driver) {
        let value = match driver {
            Driver::Absent => 0,
            Driver::Ready => 1,
            Driver::Broken => 2,
        };
        self.0.store(value, Ordering::Release);
    }
}

/// The device on the bus. The bus keeps the window, the window does not keep the device.
pub struct BarWindow {
    pub shared: Weak<Shared>,
}

impl BusDevice for BarWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(shared) = self.shared.upgrade() {
            shared.bar_read(offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(shared) = self.shared.upgrade() {
            shared.bar_write(offset, data);
        }
    }
}

/// Makes a kick's eventfd readable. A full counter means that it is readable already.
pub fn raise(kick: &EventFd) {
    if let Err(error) = kick.write(1)
        && error.kind() != io::ErrorKind::WouldBlock
    {
        log::warn!("cannot kick a queue: {error}");
    }
}
