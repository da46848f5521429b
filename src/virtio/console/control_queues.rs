//! The two control queues: reading what the driver says, and telling it what it is owed.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestMemoryMmap};

use super::control::{DriverMessage, MESSAGE_BYTES};
use super::device::{CONTROL_RECEIVE_QUEUE, CONTROL_TRANSMIT_QUEUE, Console, find};
use super::port::{CALL_CHAINS_MAX, gather};
use crate::virtio::device::DeviceFault;
use crate::virtio::queue_set::descriptors;

impl Console {
    /// Reads what the driver says on the control queue.
    pub(super) fn read_control(&mut self) -> Result<(), DeviceFault> {
        let mut chain_count = 0;
        while chain_count < CALL_CHAINS_MAX {
            let Some(queue) = find(&mut self.queues, CONTROL_TRANSMIT_QUEUE) else {
                return Ok(());
            };
            let chain = match queue.pop()? {
                None if queue.enable_kicks()? => queue.pop()?,
                chain => chain,
            };
            let Some(chain) = chain else { break };
            let head_index = chain.head_index();
            let buffers = descriptors(chain, CONTROL_TRANSMIT_QUEUE)?;
            if buffers.iter().any(|buffer| buffer.is_write_only()) {
                return Err(queue.fault(&"a control message is writable"));
            }
            let mut message = [0; MESSAGE_BYTES];
            let gathered = gather(&queue.memory(), &buffers, 0, &mut message);
            let length_bytes = gathered.map_err(|reason| queue.fault(&reason))?;
            queue.complete(head_index, 0)?;
            chain_count += 1;
            if length_bytes == MESSAGE_BYTES {
                self.take_message(DriverMessage::parse(message));
            } else {
                let log = &self.log;
                log.warn(format_args!(
                    "a control message has {length_bytes} of {MESSAGE_BYTES} bytes"
                ));
            }
        }
        if chain_count == CALL_CHAINS_MAX {
            self.call_again(CONTROL_TRANSMIT_QUEUE);
        }
        match find(&mut self.queues, CONTROL_TRANSMIT_QUEUE) {
            Some(queue) if chain_count > 0 => queue.signal(),
            _ => Ok(()),
        }
    }

    fn take_message(&mut self, message: DriverMessage) {
        match message {
            DriverMessage::DeviceReady { ok: true } => {
                self.ports
                    .iter_mut()
                    .for_each(|port| port.dialogue.owes_add = true);
            }
            DriverMessage::DeviceReady { ok: false } => {
                self.log
                    .warn(format_args!("the driver failed to set up the device"));
            }
            DriverMessage::PortReady { id, ok } => match self.ports.get_mut(id as usize) {
                Some(port) if ok => port.dialogue.port_ready(port.console),
                Some(port) => {
                    let name = &port.name;
                    self.log
                        .warn(format_args!("the driver failed to add port {name}"));
                }
                None => self
                    .log
                    .warn(format_args!("the driver added port {id}, which does not exist")),
            },
            DriverMessage::PortOpen { id, open } => match self.ports.get_mut(id as usize) {
                Some(port) => {
                    port.dialogue.guest_open = open;
                    if port.host_hung_up {
                        port.hang_up(self.multiport);
                    }
                }
                None => self
                    .log
                    .warn(format_args!("the driver opened port {id}, which does not exist")),
            },
            DriverMessage::Unknown { event } => {
                self.log
                    .warn(format_args!("the driver sent the unknown control event {event}"));
            }
        }
    }

    /// Tells the driver what it is owed, as far as it offers buffers for it.
    pub(super) fn send_control(&mut self) -> Result<(), DeviceFault> {
        let Some(queue) = find(&mut self.queues, CONTROL_RECEIVE_QUEUE).filter(|_| self.multiport) else {
            return Ok(());
        };
        let mut told = false;
        'ports: for (id, port) in (0..).zip(&mut self.ports) {
            while let Some(message) = port.dialogue.next(port.host.is_some()) {
                let chain = match queue.pop()? {
                    None if queue.enable_kicks()? => queue.pop()?,
                    chain => chain,
                };
                let Some(chain) = chain else { break 'ports };
                let head_index = chain.head_index();
                let buffers = descriptors(chain, CONTROL_RECEIVE_QUEUE)?;
                let bytes = message.to_bytes(id, port.name.as_str());
                scatter(&queue.memory(), &buffers, &bytes).map_err(|reason| queue.fault(&reason))?;
                queue.complete(head_index, bytes.len() as u32)?;
                port.dialogue.told(message);
                told = true;
            }
        }
        if told { queue.signal() } else { Ok(()) }
    }
}

/// Writes `bytes` into the driver's `buffers`.
fn scatter(memory: &GuestMemoryMmap, buffers: &[Descriptor], bytes: &[u8]) -> Result<(), String> {
    let mut rest = bytes;
    for buffer in buffers {
        if !buffer.is_write_only() {
            return Err("a buffer for a control message is not writable".to_owned());
        }
        let (here, later) = rest.split_at(rest.len().min(buffer.len() as usize));
        let written = memory.write_slice(here, buffer.addr());
        written.map_err(|error| error.to_string())?;
        rest = later;
    }
    match rest.len() {
        0 => Ok(()),
        missing_bytes => Err(format!("a control message lacks {missing_bytes} bytes of room")),
    }
}
