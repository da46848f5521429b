//! One port: bytes from the guest's transmit queue to the host's stream and from the stream to the receive queue.
//!
//! Called by `device` on the event loop. A call moves a bounded amount and never waits: without room or data it
//! notes what it waits for, and [`Port::interest`] tells what the device has to watch. A port whose host end is not
//! connected swallows what the guest sends. So does a console whose host end is full: Linux waits for a console's
//! output with interrupts off (hvc), so slowing it down would stop the guest.

use std::os::unix::net::UnixStream;

use serde_json::{Value, json};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, ReadVolatile, VolatileMemoryError,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::control::Dialogue;
use crate::ids::PortName;
use crate::virtio::device::DeviceFault;
use crate::virtio::queue_set::{DeviceQueue, descriptors};

/// One call returns at most this many chains of a queue.
pub(super) const CALL_CHAINS_MAX: usize = 64;
/// One call sends at most about this many bytes.
const CALL_BYTES_MAX: usize = 64 << 10;
/// Bytes are copied out of guest memory in pieces of this size.
const CHUNK_BYTES: usize = 4096;

/// No chain is longer (virtio 1.2 §2.7.5.2), so nothing follows this offset.
const ABANDONED: u32 = u32::MAX;

/// A port with its host end.
pub(super) struct Port {
    pub(super) name: PortName,
    pub(super) console: bool,
    pub(super) dialogue: Dialogue,
    pub(super) host: Option<UnixStream>,
    /// The host end is of no more use; the device lets go of it.
    pub(super) host_gone: bool,
    /// The peer closed its end; what it sent before may still be unread.
    pub(super) host_hung_up: bool,
    /// What the device watches the host end for.
    pub(super) watched: Option<EventSet>,
    /// The bytes of the next chain to transmit that the host end has taken already; [`ABANDONED`] when the rest is not
    /// wanted any more.
    pub(super) transmit_offset_bytes: u32,
    /// The host end takes no more for now.
    pub(super) transmit_blocked: bool,
    /// The driver has no buffers for what the host end sends.
    pub(super) receive_starved: bool,
    to_host_bytes: u64,
    to_guest_bytes: u64,
    lost_bytes: u64,
}

/// What became of some bytes for the host end.
enum Write {
    Taken(usize),
    Blocked,
    Gone,
}

impl Port {
    pub(super) fn new(name: PortName, console: bool) -> Self {
        Self {
            name,
            console,
            dialogue: Dialogue::default(),
            host: None,
            host_gone: false,
            host_hung_up: false,
            watched: None,
            transmit_offset_bytes: 0,
            transmit_blocked: false,
            receive_starved: false,
            to_host_bytes: 0,
            to_guest_bytes: 0,
            lost_bytes: 0,
        }
    }

    /// The driver is gone: forgets it and keeps the host end.
    pub(super) fn reset(&mut self) {
        self.dialogue = Dialogue::default();
        self.transmit_offset_bytes = 0;
        self.transmit_blocked = false;
        self.receive_starved = false;
        // Watched again, a peer that is gone says so again.
        self.host_hung_up = false;
    }

    /// The host end that took a part of a chain is gone. The next one must not begin in the middle of it.
    pub(super) fn abandon_chain(&mut self) {
        if self.transmit_offset_bytes > 0 {
            self.transmit_offset_bytes = ABANDONED;
        }
    }

    /// Whether the guest is to be given what the host end sends: a program has the port open, and the driver knows
    /// of this host end. A driver without `VIRTIO_CONSOLE_F_MULTIPORT` cannot be told and always reads.
    fn is_read(&self, multiport: bool) -> bool {
        !multiport || (self.dialogue.guest_open && self.dialogue.told_open)
    }

    /// What the host end is to be watched for now; `None` for nothing, not even its closing.
    pub(super) fn interest(&self, multiport: bool) -> Option<EventSet> {
        self.host.as_ref()?;
        let mut events = EventSet::empty();
        events.set(EventSet::IN, self.is_read(multiport) && !self.receive_starved);
        events.set(EventSet::OUT, self.transmit_blocked);
        events.set(EventSet::READ_HANG_UP, !self.host_hung_up);
        (!events.is_empty()).then_some(events)
    }

    /// The peer closed its end. Nobody waits for what it sent when no program in the guest has the port open.
    pub(super) fn hang_up(&mut self, multiport: bool) {
        self.host_hung_up = true;
        self.host_gone |= multiport && !self.dialogue.guest_open;
    }

    /// Sends what the driver offers to the host end. Returns whether work is left that needs no event to go on.
    ///
    /// # Errors
    /// [`DeviceFault`] when the driver broke the rules.
    pub(super) fn transmit(&mut self, queue: &mut DeviceQueue) -> Result<bool, DeviceFault> {
        let mut left_bytes = CALL_BYTES_MAX;
        let mut chain_count = 0;
        while !self.transmit_blocked && left_bytes > 0 && chain_count < CALL_CHAINS_MAX {
            let chain = match queue.pop()? {
                None if queue.enable_kicks()? => queue.pop()?,
                chain => chain,
            };
            let Some(chain) = chain else { break };
            let head_index = chain.head_index();
            let buffers = descriptors(chain, queue.index())?;
            if self.send(queue, &buffers, &mut left_bytes)? {
                queue.complete(head_index, 0)?;
                self.transmit_offset_bytes = 0;
                chain_count += 1;
            } else {
                queue.unpop();
            }
        }
        if chain_count > 0 {
            queue.signal()?;
        }
        Ok(left_bytes == 0 || chain_count == CALL_CHAINS_MAX)
    }

    /// Sends one chain from where the last attempt ended. Returns whether the driver can have it back.
    fn send(
        &mut self,
        queue: &DeviceQueue,
        buffers: &[Descriptor],
        left_bytes: &mut usize,
    ) -> Result<bool, DeviceFault> {
        if buffers.iter().any(|buffer| buffer.is_write_only()) {
            return Err(queue.fault(&"a buffer to transmit is writable"));
        }
        let mut chunk = [0; CHUNK_BYTES];
        while *left_bytes > 0 {
            let gathered = gather(&queue.memory(), buffers, self.transmit_offset_bytes, &mut chunk);
            let length_bytes = gathered.map_err(|reason| queue.fault(&reason))?;
            if length_bytes == 0 {
                return Ok(true);
            }
            match self.write(&chunk[..length_bytes]) {
                Write::Taken(taken_bytes) => {
                    self.transmit_offset_bytes += taken_bytes as u32;
                    self.to_host_bytes += taken_bytes as u64;
                    *left_bytes = left_bytes.saturating_sub(taken_bytes);
                }
                Write::Blocked if !self.console => {
                    self.transmit_blocked = true;
                    return Ok(false);
                }
                Write::Blocked | Write::Gone => {
                    let total_bytes: u64 = buffers.iter().map(|buffer| u64::from(buffer.len())).sum();
                    self.lost_bytes += total_bytes - u64::from(self.transmit_offset_bytes);
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    fn write(&mut self, bytes: &[u8]) -> Write {
        let Some(host) = self.host.as_ref().filter(|_| !self.host_gone) else {
            return Write::Gone;
        };
        // Sent as a message without descriptors, because that never raises SIGPIPE in the embedder's process.
        match host.send_with_fds(&[bytes], &[]) {
            Ok(taken_bytes) if taken_bytes > 0 => Write::Taken(taken_bytes),
            Ok(_) => Write::Blocked,
            Err(error) if matches!(error.errno(), libc::EAGAIN | libc::EINTR) => Write::Blocked,
            Err(_) => {
                self.host_gone = true;
                Write::Gone
            }
        }
    }

    /// Gives the driver what the host end sends.
    ///
    /// # Errors
    /// [`DeviceFault`] when the driver broke the rules.
    pub(super) fn receive(&mut self, queue: &mut DeviceQueue, multiport: bool) -> Result<(), DeviceFault> {
        let mut chain_count = 0;
        while chain_count < CALL_CHAINS_MAX && self.is_read(multiport) && !self.host_gone {
            let Some(host) = &self.host else { break };
            let chain = match queue.pop()? {
                None if queue.enable_kicks()? => queue.pop()?,
                chain => chain,
            };
            let Some(chain) = chain else {
                self.receive_starved = true;
                break;
            };
            let head_index = chain.head_index();
            let buffers = descriptors(chain, queue.index())?;
            match read(host, queue, &buffers)? {
                Ok(length_bytes) if length_bytes > 0 => {
                    queue.complete(head_index, length_bytes as u32)?;
                    self.to_guest_bytes += length_bytes as u64;
                    chain_count += 1;
                }
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {
                    queue.unpop();
                    break;
                }
                // The end of the stream, or a peer that went without reading what it was sent.
                Ok(_) | Err(_) => {
                    queue.unpop();
                    self.host_gone = true;
                }
            }
        }
        if chain_count > 0 {
            queue.signal()?;
        }
        Ok(())
    }

    pub(super) fn inspect(&self) -> Value {
        json!({
            "name": self.name.as_str(),
            "console": self.console,
            "host_connected": self.host.is_some(),
            "guest_open": self.dialogue.guest_open,
            "to_host_bytes": self.to_host_bytes,
            "to_guest_bytes": self.to_guest_bytes,
            "lost_bytes": self.lost_bytes,
        })
    }
}

/// Reads once from `host` into the first of the driver's `buffers` that has room: what there is, as in a stream.
///
/// # Errors
/// The outer one when the driver broke the rules, the inner one is the host's.
fn read(
    host: &UnixStream,
    queue: &DeviceQueue,
    buffers: &[Descriptor],
) -> Result<std::io::Result<usize>, DeviceFault> {
    let mut host = host;
    if buffers.iter().any(|buffer| !buffer.is_write_only()) {
        return Err(queue.fault(&"a buffer to receive into is not writable"));
    }
    let buffer = buffers.iter().find(|buffer| buffer.len() > 0);
    let buffer = buffer.ok_or_else(|| queue.fault(&"a chain to receive into is empty"))?;
    let memory = queue.memory();
    let slices = memory.get_slices(buffer.addr(), buffer.len() as usize, Permissions::Write);
    let first = slices.map_err(|error| queue.fault(&error))?.next();
    let slice = first.ok_or_else(|| queue.fault(&"a chain to receive into is empty"))?;
    let mut slice = slice.map_err(|error| queue.fault(&error))?;
    match host.read_volatile(&mut slice) {
        Ok(length_bytes) => Ok(Ok(length_bytes)),
        Err(VolatileMemoryError::IOError(error)) => Ok(Err(error)),
        Err(error) => Err(queue.fault(&error)),
    }
}

/// Copies what follows `offset_bytes` in the driver's `buffers` into `bytes`; returns how much that is.
pub(super) fn gather(
    memory: &GuestMemoryMmap,
    buffers: &[Descriptor],
    offset_bytes: u32,
    bytes: &mut [u8],
) -> Result<usize, String> {
    let mut skip_bytes = offset_bytes;
    let mut rest = bytes;
    let mut copied_bytes = 0;
    for buffer in buffers {
        if skip_bytes >= buffer.len() {
            skip_bytes -= buffer.len();
            continue;
        }
        let length_bytes = rest.len().min((buffer.len() - skip_bytes) as usize);
        let address = buffer.addr().0.checked_add(u64::from(skip_bytes));
        let address = address.ok_or("a buffer passes the end of the address space")?;
        let (here, later) = rest.split_at_mut(length_bytes);
        let read = memory.read_slice(here, GuestAddress(address));
        read.map_err(|error| error.to_string())?;
        (rest, skip_bytes) = (later, 0);
        copied_bytes += length_bytes;
    }
    Ok(copied_bytes)
}
