//! From `DRIVER_OK` to reset: activation, kicks, faults, draining, pausing.
//!
//! ```text
//!            DRIVER_OK           fault                  reset, work in flight
//! set-up ───────────────► active ─────► needs reset ──┬───────────────────────► draining ──► set-up
//!    ▲                      │                         │ reset, nothing in flight               ▲
//!    └──────────────────────┴─────────────────────────┘                 last completion ───────┘
//! ```
//! The event loop watches the kicks and the device's own descriptors only while something can come of it: while the
//! device is active, neither broken nor paused, and a bus master, or still has work in flight. A device that is left alone costs no CPU.
//!
//! Watching and un-watching are messages to the loop, so an event of a former watch may arrive late. Every watch has
//! a generation, and a handler of another generation touches nothing, not even the descriptor that woke it: whatever
//! it saw is seen again by the present watch.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};

use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::common_config::CommonConfig;
use super::gone::Gone;
use super::queue_setup::RingPosition;
use super::shared::{Driver, Shared, raise};
use crate::event_loop::{EventHandler, Registration, Source};
use crate::unit::PauseTicket;
use crate::virtio::device::{Activation, DeviceEvent, DeviceFault, VirtioDevice, VirtioInterrupt};
use crate::virtio::features;
use crate::virtio::queue_set::DeviceQueue;
use crate::virtio::spec::VIRTIO_F_EVENT_IDX;
use crate::virtio::status::{self, DEVICE_NEEDS_RESET, DRIVER_OK, FEATURES_OK, StatusChange};

/// Kicks have the tokens from here on, by queue; the device's own are below.
const KICK_TOKEN_BASE: u32 = 0x8000;

/// What the data path works on: the registers and the device, under one lock.
pub struct Core {
    /// Dropped before the device, which may close the descriptors that are watched.
    watch: Option<Watch>,
    pub device: Box<dyn VirtioDevice>,
    pub config: CommonConfig,
    /// The device holds its queues.
    pub active: bool,
    /// The driver reset the device while work was in flight; `device_status` is not 0 before that has ended.
    draining: bool,
    pub paused: bool,
    /// The device was taken away; no driver can make it ready again.
    gone: bool,
    /// The device has no owner who wants to hear of it.
    orphaned: bool,
    /// The guest lets the device access memory; follows the configuration space.
    bus_master: bool,
    /// Kept until nothing is in flight.
    tickets: Vec<PauseTicket>,
    generation: u64,
}

/// The loop watches the device's descriptors.
struct Watch {
    _registration: Registration,
    generation: u64,
}

/// What the loop calls. It keeps the kicks open for as long as the loop watches them.
struct Handler {
    shared: Weak<Shared>,
    generation: u64,
    _kicks: Arc<[Arc<EventFd>]>,
}

impl EventHandler for Handler {
    fn readable(&self, token: u32) {
        if let Some(shared) = self.shared.upgrade() {
            shared.on_event(self.generation, token);
        }
    }
}

impl Core {
    /// The state after power-on.
    pub fn new(device: Box<dyn VirtioDevice>, config: CommonConfig) -> Self {
        Self {
            watch: None,
            device,
            config,
            active: false,
            draining: false,
            paused: false,
            gone: false,
            orphaned: false,
            bus_master: false,
            tickets: Vec::new(),
            generation: 0,
        }
    }

    /// Whether the device may start work.
    fn may_work(&self) -> bool {
        self.active && self.config.is_ready() && !self.paused && self.bus_master
    }

    /// The indices of the queues that the driver enabled.
    fn enabled_queues(&self) -> Vec<u16> {
        let queues = (0..).zip(&self.config.queues);
        queues
            .filter(|(_, queue)| queue.enabled)
            .map(|(index, _)| index)
            .collect()
    }

    /// How far each queue has been worked through; zero where the device does not hold it.
    pub fn ring_positions(&self) -> Vec<RingPosition> {
        let mut positions = vec![RingPosition::default(); self.config.queues.len()];
        for queue in self.device.queues() {
            if let Some(position) = positions.get_mut(usize::from(queue.index())) {
                *position = RingPosition {
                    next_avail: queue.queue().next_avail(),
                    next_used: queue.queue().next_used(),
                };
            }
        }
        positions
    }
}

impl Shared {
    /// The driver writes `device_status`.
    pub fn write_status(&self, core: &mut Core, written: u8) {
        if core.gone {
            return;
        }
        if core.draining && written != 0 {
            self.log
                .warn(format_args!("ignored device status {written:#x} during a reset"));
            return;
        }
        match status::next(core.config.status, written) {
            StatusChange::Reset => self.reset_device(core),
            StatusChange::Refused(reason) => {
                let status = core.config.status;
                let log = &self.log;
                log.warn(format_args!(
                    "ignored device status {written:#x} after {status:#x}: {reason}"
                ));
            }
            StatusChange::Set {
                mut status,
                check_features,
                mut activate,
            } => {
                if check_features
                    && let Err(error) =
                        features::check(core.config.offered_features, core.config.driver_features)
                {
                    self.log.warn(format_args!("{error}"));
                    status &= !(FEATURES_OK | DRIVER_OK);
                    activate = false;
                }
                core.config.status = status;
                if activate {
                    let positions = vec![RingPosition::default(); core.config.queues.len()];
                    self.activate_or_fault(core, &positions);
                }
            }
        }
    }

    fn activate_or_fault(&self, core: &mut Core, positions: &[RingPosition]) {
        match self.activate(core, positions) {
            Ok(()) => {
                self.driver.set(Driver::Ready);
                self.tell_ready(core, true);
            }
            Err(fault) => self.needs_reset(core, &fault),
        }
    }

    /// Builds the rings, hands them to the device and lets kicks come.
    ///
    /// # Errors
    /// [`DeviceFault`] when the driver's set-up cannot work; the device then holds nothing.
    pub fn activate(&self, core: &mut Core, positions: &[RingPosition]) -> Result<(), DeviceFault> {
        let driver_features = core.config.driver_features;
        let event_idx = driver_features & VIRTIO_F_EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(core.config.queues.len());
        for ((queue_index, setup), position) in (0..).zip(&core.config.queues).zip(positions) {
            if setup.enabled {
                let ring = setup.build(*position, event_idx, &self.memory.memory());
                let ring = ring.map_err(|error| DeviceFault::Queue {
                    queue_index,
                    reason: error.to_string(),
                })?;
                let interrupt = self.interrupts.clone();
                queues.push(DeviceQueue::new(
                    queue_index,
                    ring,
                    self.memory.clone(),
                    interrupt,
                ));
            }
        }
        let activation = Activation {
            driver_features,
            queues,
            interrupt: self.interrupts.clone(),
        };
        if let Err(fault) = core.device.activate(activation) {
            core.device.reset();
            return Err(fault);
        }
        core.active = true;
        if let Err(fault) = self.watch(core) {
            core.active = false;
            core.device.reset();
            return Err(fault);
        }
        self.function().arm(core.enabled_queues(), &self.log);
        Ok(())
    }

    /// Lets the loop watch the device, if work may be started and it does not watch yet.
    ///
    /// # Errors
    /// [`DeviceFault::Driver`] when drivers came and went faster than the loop could follow, or it has ended.
    fn watch(&self, core: &mut Core) -> Result<(), DeviceFault> {
        if core.watch.is_some() || !core.may_work() {
            return Ok(());
        }
        core.generation += 1;
        let kicks = core.enabled_queues().into_iter().filter_map(|index| {
            let kick = self.kicks.get(usize::from(index))?;
            Some(Source {
                fd: kick.as_raw_fd(),
                token: KICK_TOKEN_BASE + u32::from(index),
            })
        });
        let own = core.device.event_sources().into_iter();
        let own = own.map(|DeviceEvent { fd, token }| Source { fd, token });
        let handler = Handler {
            shared: self.me.clone(),
            generation: core.generation,
            _kicks: self.kicks.clone(),
        };
        let sources = kicks.chain(own).collect();
        let registration = self.event_loop.register(sources, Arc::new(handler));
        core.watch = Some(Watch {
            _registration: registration.map_err(|error| DeviceFault::Driver(error.to_string()))?,
            generation: core.generation,
        });
        Ok(())
    }

    /// A descriptor is readable, on the loop's thread.
    fn on_event(&self, generation: u64, token: u32) {
        let mut core = self.core();
        if core
            .watch
            .as_ref()
            .is_none_or(|watch| watch.generation != generation)
        {
            return;
        }
        let may_work = core.may_work();
        let outcome = match token.checked_sub(KICK_TOKEN_BASE) {
            Some(queue_index) => {
                let queue_index = queue_index as u16;
                // A kick that may not be followed now is made up for by `resume_work`, which kicks every queue but
                // those of an orphan.
                let kick = self.kicks.get(usize::from(queue_index));
                if let Some(kick) = kick.filter(|_| may_work || !core.orphaned) {
                    // An empty counter is a spurious call.
                    let _ = kick.read();
                }
                if may_work {
                    core.device.process_queue(queue_index)
                } else {
                    Ok(())
                }
            }
            None => core.device.process_event(token, !may_work),
        };
        if let Err(fault) = outcome
            && core.active
        {
            self.needs_reset(&mut core, &fault);
        }
        self.settle(&mut core);
    }

    /// The driver broke the rules: nothing but a reset helps (virtio 1.2 §2.1.2).
    fn needs_reset(&self, core: &mut Core, fault: &DeviceFault) {
        if core.config.status & DEVICE_NEEDS_RESET != 0 {
            return;
        }
        core.config.status |= DEVICE_NEEDS_RESET;
        self.driver.set(Driver::Broken);
        self.log.warn(format_args!("the device needs a reset: {fault}"));
        self.interrupts.signal_config();
        if !core.orphaned {
            self.listener.needs_reset(&self.name, &fault.to_string());
        }
    }

    /// The driver resets the device, or the VM is reset.
    pub fn reset_device(&self, core: &mut Core) {
        if !core.draining {
            let was_active = std::mem::replace(&mut core.active, false);
            self.driver.set(Driver::Absent);
            self.function().disarm();
            if core.device.in_flight_count() == 0 {
                // The device may close its descriptors now; the loop hears of the end of the watch first.
                core.watch = None;
            }
            core.device.reset();
            core.draining = true;
            if was_active {
                self.tell_ready(core, false);
            }
        }
        self.settle(core);
    }

    /// Does what was waiting for the last completion, if there is nothing in flight: ends a reset, ends the watch of a
    /// device that may not work, and tells that a pause is complete.
    pub fn settle(&self, core: &mut Core) {
        if core.may_work() || core.device.in_flight_count() != 0 {
            return;
        }
        core.watch = None;
        if core.draining {
            core.draining = false;
            core.config.reset();
            self.interrupts.reset_device();
        }
        core.tickets.clear();
    }

    fn tell_ready(&self, core: &Core, ready: bool) {
        if !core.orphaned {
            self.listener.driver_ready(&self.name, ready);
        }
    }

    /// Nobody hears of the device any more.
    pub fn orphan(&self) {
        self.core().orphaned = true;
    }

    /// The device has no owner any more: it lets go of everything that the guest or the loop could reach it by, and is
    /// dropped before this returns, though others may be in the middle of an access.
    pub fn detach(&self) {
        let mut core = self.core();
        core.watch = None;
        core.gone = true;
        core.active = false;
        core.config.reset();
        core.tickets.clear();
        self.function().detach();
        self.interrupts.reset();
        let gone = Box::new(Gone(core.device.device_type()));
        let device = std::mem::replace(&mut core.device, gone);
        drop(core);
        drop(device);
    }

    /// Starts no more work; `ticket` is dropped when nothing is in flight.
    pub fn pause_work(&self, core: &mut Core, ticket: PauseTicket) {
        core.paused = true;
        core.tickets.push(ticket);
        self.settle(core);
    }

    /// Goes on: looks at every queue, since kicks may have been missed, and interrupts for every queue, since it is
    /// not known what the driver has seen.
    pub fn resume_work(&self, core: &mut Core) {
        core.paused = false;
        core.tickets.clear();
        self.go_on(core);
    }

    /// Bus Master Enable may have changed. Without it the device starts no work, as in a pause: a kernel that starts
    /// another one (kexec) clears nothing else, and the next one's memory is not the device's. What is in flight ends.
    pub fn follow_bus_master(&self, core: &mut Core) {
        let bus_master = self.function().is_bus_master();
        if std::mem::replace(&mut core.bus_master, bus_master) == bus_master {
            return;
        }
        if bus_master {
            self.go_on(core);
        } else {
            self.settle(core);
        }
    }

    fn go_on(&self, core: &mut Core) {
        if !core.may_work() {
            return;
        }
        // An orphan's driver may have ended with its kernel, and what it used may be another's now: it has to ask.
        let queues = if core.orphaned {
            Vec::new()
        } else {
            core.enabled_queues()
        };
        for queue_index in queues {
            if let Some(kick) = self.kicks.get(usize::from(queue_index)) {
                raise(kick);
            }
            self.interrupts.signal_queue(queue_index);
        }
        if let Err(fault) = self.watch(core) {
            self.needs_reset(core, &fault);
        }
    }
}
