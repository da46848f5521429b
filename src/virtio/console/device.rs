//! The console device: who is called when, and what is watched.
//!
//! Called by the transport on the device event loop. The loop watches one descriptor of the device, an epoll instance
//! of its own; what is in that depends on what can go on now ([`Port::interest`]), so that neither a full peer, nor a
//! guest without buffers, nor a closed stream ever makes the loop spin. After every call [`Console::settle`] brings
//! host ends, control messages and watches up to date.
//!
//! Queues (§5.3.2): 0 and 1 are port 0's, 2 and 3 are control, then two per port; the device receives on odd ones.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::host::{ConsolePorts, Door};
use super::port::Port;
use super::saved::ConsoleV1;
use crate::guest_log::GuestLog;
use crate::ids::PortName;
use crate::unit::{RestoreError, SaveError};
use crate::virtio::device::{Activation, DeviceEvent, DeviceFault, DeviceType, VirtioDevice};
use crate::virtio::queue_set::DeviceQueue;

/// A console has at most this many ports.
pub const PORTS_MAX: usize = 16;

/// The device has several ports and the control queues (§5.3.3).
const VIRTIO_CONSOLE_F_MULTIPORT: u32 = 1;
const QUEUE_SIZE_MAX: u16 = 64;
pub(super) const CONTROL_RECEIVE_QUEUE: u16 = 2;
pub(super) const CONTROL_TRANSMIT_QUEUE: u16 = 3;
/// The device's descriptor.
const EPOLL_TOKEN: u32 = 0;
/// What the epoll instance says of the door's bell; ports go by their numbers.
pub(super) const BELL: u64 = PORTS_MAX as u64;

/// What a port is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortConfig {
    /// The name under which the guest finds it (Linux: `/dev/virtio-ports/<name>`).
    pub name: PortName,
    /// Whether the guest makes it a console (Linux: `/dev/hvc<n>`).
    pub console: bool,
}

/// Why a console cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// There must be a port, and not too many.
    #[error("a console has 1 to {PORTS_MAX} ports, not {port_count}")]
    PortCount { port_count: usize },
    /// Two ports have the same name.
    #[error("port name {name} is used twice")]
    DuplicateName { name: PortName },
    /// The host refused epoll or an eventfd.
    #[error("cannot make the console's event descriptors")]
    Host(#[source] io::Error),
}

/// The console device.
pub struct Console {
    pub(super) ports: Vec<Port>,
    pub(super) queues: Vec<DeviceQueue>,
    pub(super) multiport: bool,
    pub(super) door: Arc<Door>,
    pub(super) epoll: Epoll,
    /// Queues with work left from a call that had done enough, one bit each.
    pub(super) unfinished: u64,
    /// The driver broke the rules: nothing happens before a reset.
    faulted: bool,
    pub(super) log: GuestLog,
}

/// What a queue is for.
#[derive(Debug, Clone, Copy)]
enum Role {
    /// To the guest.
    Receive(usize),
    /// From the guest.
    Transmit(usize),
    ControlReceive,
    ControlTransmit,
}

impl Role {
    fn of(queue_index: u16) -> Self {
        match (queue_index, usize::from(queue_index / 2)) {
            (CONTROL_RECEIVE_QUEUE, _) => Self::ControlReceive,
            (CONTROL_TRANSMIT_QUEUE, _) => Self::ControlTransmit,
            (queue_index, pair) => {
                let port_index = pair.saturating_sub(1);
                if queue_index % 2 == 0 {
                    Self::Receive(port_index)
                } else {
                    Self::Transmit(port_index)
                }
            }
        }
    }
}

/// The queue on which port `port_index` gives to the guest; the next one takes from it.
pub(super) fn receive_queue(port_index: usize) -> u16 {
    match port_index {
        0 => 0,
        _ => 2 * (port_index as u16 + 1),
    }
}

pub(super) fn find(queues: &mut [DeviceQueue], queue_index: u16) -> Option<&mut DeviceQueue> {
    queues.iter_mut().find(|queue| queue.index() == queue_index)
}

impl Console {
    /// Makes a console with these ports, and the handle that connects their host ends.
    ///
    /// # Errors
    /// [`ConsoleError`].
    pub fn new(ports: Vec<PortConfig>) -> Result<(Self, ConsolePorts), ConsoleError> {
        let port_count = ports.len();
        if !(1..=PORTS_MAX).contains(&port_count) {
            return Err(ConsoleError::PortCount { port_count });
        }
        for (index, port) in ports.iter().enumerate() {
            if ports[..index].iter().any(|other| other.name == port.name) {
                let name = port.name.clone();
                return Err(ConsoleError::DuplicateName { name });
            }
        }
        let names = ports.iter().map(|port| port.name.clone()).collect();
        let door = Arc::new(Door::new(names).map_err(ConsoleError::Host)?);
        let epoll = Epoll::new().map_err(ConsoleError::Host)?;
        let bell = EpollEvent::new(EventSet::IN, BELL);
        epoll
            .ctl(ControlOperation::Add, door.bell().as_raw_fd(), bell)
            .map_err(ConsoleError::Host)?;
        let handle = door.ports();
        let console = Self {
            ports: ports
                .into_iter()
                .map(|PortConfig { name, console }| Port::new(name, console))
                .collect(),
            queues: Vec::new(),
            multiport: false,
            door,
            epoll,
            unfinished: 0,
            faulted: false,
            log: GuestLog::new("console"),
        };
        Ok((console, handle))
    }

    /// Runs `work`, then settles. After a fault nothing is watched any more.
    fn run(&mut self, work: impl FnOnce(&mut Self) -> Result<(), DeviceFault>) -> Result<(), DeviceFault> {
        if self.faulted {
            return Ok(());
        }
        let result = work(self).and_then(|()| self.settle());
        if result.is_err() {
            self.faulted = true;
            self.unwatch();
        }
        result
    }

    pub(super) fn serve(&mut self, queue_index: u16) -> Result<(), DeviceFault> {
        match Role::of(queue_index) {
            Role::Receive(port_index) => {
                self.kicked_for_buffers(queue_index)?;
                if let Some(port) = self.ports.get_mut(port_index) {
                    port.receive_starved = false;
                }
                self.receive(port_index)
            }
            Role::Transmit(port_index) => self.transmit(port_index),
            // Settling sends what is owed.
            Role::ControlReceive => self.kicked_for_buffers(queue_index),
            Role::ControlTransmit => self.read_control(),
        }
    }

    /// The driver added buffers to receive into; more of them are of no interest until these are used up.
    fn kicked_for_buffers(&mut self, queue_index: u16) -> Result<(), DeviceFault> {
        find(&mut self.queues, queue_index).map_or(Ok(()), DeviceQueue::disable_kicks)
    }

    pub(super) fn receive(&mut self, port_index: usize) -> Result<(), DeviceFault> {
        let queue = find(&mut self.queues, receive_queue(port_index));
        match (self.ports.get_mut(port_index), queue) {
            (Some(port), Some(queue)) => port.receive(queue, self.multiport),
            (Some(port), None) => {
                port.receive_starved = true;
                Ok(())
            }
            (None, _) => Ok(()),
        }
    }

    pub(super) fn transmit(&mut self, port_index: usize) -> Result<(), DeviceFault> {
        let queue_index = receive_queue(port_index) + 1;
        let queue = find(&mut self.queues, queue_index);
        if let (Some(port), Some(queue)) = (self.ports.get_mut(port_index), queue)
            && port.transmit(queue)?
        {
            self.call_again(queue_index);
        }
        Ok(())
    }

    /// Has `queue_index` served again once the loop's other devices had their turn.
    pub(super) fn call_again(&mut self, queue_index: u16) {
        self.unfinished |= 1 << queue_index;
        if let Err(error) = self.door.ring() {
            self.log.warn(format_args!("cannot ring the door: {error}"));
        }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn device_features(&self) -> u64 {
        1 << VIRTIO_CONSOLE_F_MULTIPORT
    }

    fn queue_sizes_max(&self) -> Vec<u16> {
        // Two per port and two for control, even if there is only one port.
        vec![QUEUE_SIZE_MAX; 2 * self.ports.len() + 2]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_console_config (§5.3.4): cols, rows, max_nr_ports, emerg_wr.
        let mut config = [0; 12];
        config[4..8].copy_from_slice(&(self.ports.len() as u32).to_le_bytes());
        let start = usize::try_from(offset).map_or(config.len(), |offset| offset.min(config.len()));
        let known = &config[start..];
        let length = known.len().min(data.len());
        data[..length].copy_from_slice(&known[..length]);
    }

    fn config_write(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceFault> {
        self.multiport = activation.driver_features & (1 << VIRTIO_CONSOLE_F_MULTIPORT) != 0;
        self.queues = activation.queues;
        // The driver fills these queues at once; a kick per buffer would tell nothing.
        for queue in &mut self.queues {
            if matches!(Role::of(queue.index()), Role::Receive(_) | Role::ControlReceive) {
                queue.disable_kicks()?;
            }
        }
        // Host ends that came before the driver are taken up on the event loop, or when a restored VM is resumed.
        let rung = self.door.ring();
        rung.map_err(|error| DeviceFault::Driver(format!("cannot ring the door: {error}")))
    }

    fn event_sources(&self) -> Vec<DeviceEvent> {
        vec![DeviceEvent {
            fd: self.epoll.as_raw_fd(),
            token: EPOLL_TOKEN,
        }]
    }

    fn process_queue(&mut self, queue_index: u16) -> Result<(), DeviceFault> {
        self.run(|console| console.serve(queue_index))
    }

    fn process_event(&mut self, _token: u32, paused: bool) -> Result<(), DeviceFault> {
        if paused || self.faulted {
            // Watches and waiting host ends are looked at when the device is resumed and called for its queues.
            self.door.answer();
            self.unwatch();
            return Ok(());
        }
        self.run(Self::host_events)
    }

    fn queues(&self) -> &[DeviceQueue] {
        &self.queues
    }

    fn in_flight_count(&self) -> usize {
        0
    }

    fn reset(&mut self) {
        self.unwatch();
        self.queues.clear();
        self.ports.iter_mut().for_each(Port::reset);
        self.multiport = false;
        self.unfinished = 0;
        self.faulted = false;
    }

    fn save(&self) -> Result<Value, SaveError> {
        Ok(serde_json::to_value(ConsoleV1::new(&self.ports))?)
    }

    fn restore(&mut self, state: &Value) -> Result<(), RestoreError> {
        ConsoleV1::deserialize(state)?.apply(&mut self.ports)
    }

    fn inspect(&self) -> Value {
        let ports: Vec<_> = self.ports.iter().map(Port::inspect).collect();
        json!({ "ports": ports })
    }
}
