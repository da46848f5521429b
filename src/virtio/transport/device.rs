//! A virtio device in a PCI slot, as its owner holds it.
//!
//! Whoever holds the [`Arc`]s (the slot, the list of units) decides how long a device lives: nothing that it is
//! registered with owns it. When the last of them goes, or [`VirtioPciDevice::detach`] is called, the device is gone and
//! its range, routes, ioeventfds and its watch on the event loop are free before that returns, even if a vCPU or the
//! loop is in the middle of one of its accesses.

use std::any::Any;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::common_config::CommonConfig;
use super::function::Function;
use super::interrupts::Interrupts;
use super::layout::{self, BAR_BYTES, QUEUE_COUNT_MAX};
use super::runtime::Core;
use super::shared::{BarWindow, Driver, DriverCell, Shared};
use crate::bus::Bus;
use crate::event_loop::LoopHandle;
use crate::guest_log::GuestLog;
use crate::ids::{Bdf, UnitName};
use crate::machine::gsi::{GsiError, GsiTable};
use crate::machine::ioevents::IoEvents;
use crate::memory::layout::{MMIO_SEGMENT_BYTES, SEGMENT_COUNT, mmio_slot, mmio_window};
use crate::pci::bar::MemoryBar;
use crate::pci::capability::CapabilityError;
use crate::pci::device::PciDevice;
use crate::unit::UnitListener;
use crate::virtio::device::VirtioDevice;
use crate::virtio::features;

/// What a device needs of the VM it is put into; one set serves all devices of a VM.
#[derive(Clone)]
pub struct TransportResources {
    /// The memory-mapped bus.
    pub mmio: Bus,
    /// Where MSI-X vectors come from.
    pub gsi: GsiTable,
    /// Where ioeventfds come from.
    pub ioevents: IoEvents,
    /// The loop that calls the device.
    pub event_loop: LoopHandle,
    /// Guest memory, of which parts come and go at run time.
    pub memory: GuestMemoryAtomic<GuestMemoryMmap>,
    /// Who is told when drivers come, go and fail.
    pub listener: Arc<dyn UnitListener>,
}

/// Why a device cannot be put behind PCI.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The device has more queues than MSI-X vectors fit into its BAR.
    #[error("{name} has {queue_count} queues, the limit is {QUEUE_COUNT_MAX}")]
    TooManyQueues {
        /// The device.
        name: UnitName,
        /// Its queues.
        queue_count: usize,
    },
    /// A queue's largest size is not a power of two up to 32768.
    #[error("queue {queue_index} of {name} has size {size}, which is not a power of two up to 32768")]
    QueueSize {
        /// The device.
        name: UnitName,
        /// The queue.
        queue_index: usize,
        /// Its size.
        size: u16,
    },
    /// The machine has no such segment.
    #[error("{name} is to be at {bdf}, the machine has {SEGMENT_COUNT} segments")]
    Segment {
        /// The device.
        name: UnitName,
        /// The address asked for.
        bdf: Bdf,
    },
    /// The host has no eventfd for a queue's kicks.
    #[error("the host refused an eventfd for the kicks of {name}")]
    Kick {
        /// The device.
        name: UnitName,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// The VM has too few interrupts left.
    #[error("{name} cannot have its interrupts")]
    Interrupts {
        /// The device.
        name: UnitName,
        /// How many it needs and how many there are.
        #[source]
        source: GsiError,
    },
    /// The capabilities do not fit into the configuration space.
    #[error(transparent)]
    Capability(#[from] CapabilityError),
}

/// A virtio device in a PCI slot.
///
/// Held by its slot and by the list of units; the bus and the event loop know only its shared part.
pub struct VirtioPciDevice {
    pub(super) bdf: Bdf,
    pub(super) shared: Arc<Shared>,
}

impl fmt::Debug for VirtioPciDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VirtioPciDevice({} at {})", self.shared.name, self.bdf)
    }
}

impl VirtioPciDevice {
    /// Puts `device` behind PCI, as after power-on: nothing is on the bus before the guest enables the BAR, which
    /// lies at its slot's place in the machine's map. The guest sees it when it is put into the slot `bdf`.
    ///
    /// # Errors
    /// [`TransportError`] when the device, the address or the host does not allow it.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        name: UnitName,
        bdf: Bdf,
        resources: TransportResources,
    ) -> Result<Arc<Self>, TransportError> {
        let TransportResources {
            mmio,
            gsi,
            ioevents,
            event_loop,
            memory,
            listener,
        } = resources;
        let sizes_max = device.queue_sizes_max();
        let queue_count = check(&name, bdf, &sizes_max)?;
        let kicks = (0..queue_count).map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new));
        let kicks: io::Result<Arc<[_]>> = kicks.collect();
        let kicks = kicks.map_err(|source| TransportError::Kick {
            name: name.clone(),
            source,
        })?;
        let config_space = layout::config_space(device.device_type(), queue_count, mmio_slot(bdf) as u32)?;
        let segment = mmio_window(bdf.segment());
        let bar = MemoryBar::new(mmio, u64::from(BAR_BYTES), segment..segment + MMIO_SEGMENT_BYTES);
        let config = CommonConfig::new(features::offered(device.device_features()), &sizes_max);
        let log = GuestLog::new(name.to_string());
        let vectors = gsi.promise(u32::from(queue_count) + 1);
        let vectors = vectors.map_err(|source| TransportError::Interrupts {
            name: name.clone(),
            source,
        })?;
        let interrupts = Interrupts::new(queue_count, gsi, GuestLog::new(name.to_string()));
        let shared = Arc::new_cyclic(|me| {
            let window = Arc::new(BarWindow { shared: me.clone() });
            Shared {
                core: Mutex::new(Core::new(device, config)),
                function: Mutex::new(Function::new(config_space, bar, window, ioevents, kicks.clone())),
                interrupts: Arc::new(interrupts),
                _vectors: vectors,
                kicks,
                driver: DriverCell::default(),
                memory,
                event_loop,
                listener,
                log,
                me: me.clone(),
                name,
            }
        });
        Ok(Arc::new(Self { bdf, shared }))
    }

    /// Where the device sits.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// The guest-physical addresses at which its registers answer now, if they do.
    pub fn bar_range(&self) -> Option<Range<u64>> {
        let base = self.shared.function().bar_address()?;
        Some(base..base + u64::from(BAR_BYTES))
    }

    /// Whether a driver is ready: it set `DRIVER_OK` and did not break the rules since. Never waits for the device.
    pub fn driver_ready(&self) -> bool {
        self.driver() == Driver::Ready
    }

    /// Whether there is a driver. Never waits for the device.
    pub fn driver(&self) -> Driver {
        self.shared.driver.get()
    }

    /// Takes the device away, whoever else holds this still or is in the middle of an access: what it held on the host,
    /// its range, its interrupts and its watch are free when this returns. Nothing brings it back.
    pub fn detach(&self) {
        self.shared.detach();
    }

    /// Takes the device from its owner and leaves it to its driver: it works on where the guest finds it, and its listener
    /// hears nothing of it any more, which may be about another device of the same name by then.
    pub fn orphan(&self) {
        self.shared.orphan();
    }

    /// Changes the device at run time, for example its link state, in turn with everything else that calls it.
    /// `None` when the device is not a `D`. What the driver must know, the device tells it with an interrupt.
    pub fn with_device<D: VirtioDevice, R>(&self, change: impl FnOnce(&mut D) -> R) -> Option<R> {
        let mut core = self.shared.core();
        let device: &mut dyn Any = &mut *core.device;
        let result = change(device.downcast_mut()?);
        // A driver that reads the configuration right now must notice that it changed under it.
        self.shared.interrupts.raise_config_generation();
        Some(result)
    }

    /// As [`Self::with_device`], for what changes nothing that the driver can read: it is not disturbed.
    pub fn ask_device<D: VirtioDevice, R>(&self, ask: impl FnOnce(&mut D) -> R) -> Option<R> {
        let mut core = self.shared.core();
        let device: &mut dyn Any = &mut *core.device;
        Some(ask(device.downcast_mut()?))
    }
}

impl Drop for VirtioPciDevice {
    fn drop(&mut self) {
        self.detach();
    }
}

impl PciDevice for VirtioPciDevice {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let access = self.shared.function().indirect_access(offset, data.len());
        if let Some(access) = access {
            let mut bytes = access.data;
            self.shared
                .bar_read(access.offset, &mut bytes[..access.length_bytes]);
            self.shared.function().set_indirect_data(&bytes);
        }
        self.shared.function().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut function = self.shared.function();
        let was_bus_master = function.is_bus_master();
        function.write(offset, data, &self.shared.interrupts, &self.shared.log);
        let is_bus_master = function.is_bus_master();
        let access = function.indirect_access(offset, data.len());
        drop(function);
        if is_bus_master != was_bus_master {
            self.shared.follow_bus_master(&mut self.shared.core());
        }
        if let Some(access) = access {
            self.shared
                .bar_write(access.offset, &access.data[..access.length_bytes]);
        }
    }
}

/// Checks what the device and its address promise, and tells the number of queues.
fn check(name: &UnitName, bdf: Bdf, sizes_max: &[u16]) -> Result<u16, TransportError> {
    let queue_count = u16::try_from(sizes_max.len()).unwrap_or(u16::MAX);
    if queue_count > QUEUE_COUNT_MAX {
        return Err(TransportError::TooManyQueues {
            name: name.clone(),
            queue_count: sizes_max.len(),
        });
    }
    for (queue_index, &size) in sizes_max.iter().enumerate() {
        if !size.is_power_of_two() {
            return Err(TransportError::QueueSize {
                name: name.clone(),
                queue_index,
                size,
            });
        }
    }
    if bdf.segment() >= SEGMENT_COUNT {
        return Err(TransportError::Segment {
            name: name.clone(),
            bdf,
        });
    }
    Ok(queue_count)
}
