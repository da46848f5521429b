//! Requests and responses in guest memory (virtio 1.2 §5.15.6).
//!
//! A request is 24 readable bytes, its response 10 writable ones behind them, both cut into descriptors as the driver
//! likes. A chain that has no room for the response cannot be answered and is a fault.

use virtio_queue::QueueT;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestMemoryMmap};

use super::region::{BlockState, Response};
use crate::virtio::device::DeviceFault;
use crate::virtio::queue_set::{DeviceQueue, descriptors};

/// The size of `struct virtio_mem_req`.
const REQUEST_BYTES: usize = 24;
/// The size of `struct virtio_mem_resp`.
const RESPONSE_BYTES: usize = 10;

const VIRTIO_MEM_REQ_PLUG: u16 = 0;
const VIRTIO_MEM_REQ_UNPLUG: u16 = 1;
const VIRTIO_MEM_REQ_UNPLUG_ALL: u16 = 2;
const VIRTIO_MEM_REQ_STATE: u16 = 3;

const VIRTIO_MEM_RESP_ACK: u16 = 0;
const VIRTIO_MEM_RESP_NACK: u16 = 1;
const VIRTIO_MEM_RESP_BUSY: u16 = 2;
const VIRTIO_MEM_RESP_ERROR: u16 = 3;

const VIRTIO_MEM_STATE_PLUGGED: u16 = 0;
const VIRTIO_MEM_STATE_UNPLUGGED: u16 = 1;
const VIRTIO_MEM_STATE_MIXED: u16 = 2;

/// What the driver asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Plug,
    Unplug,
    UnplugAll,
    State,
    /// A type that the specification does not have.
    Unknown(u16),
}

/// A request and where its response belongs.
pub(super) struct Request {
    pub(super) kind: Kind,
    /// `addr`; without meaning for some kinds.
    pub(super) address: u64,
    /// `nb_blocks`; without meaning for some kinds.
    pub(super) block_count: u16,
    head_index: u16,
    response: Vec<Descriptor>,
}

impl Request {
    /// Takes the next request from `queue`.
    ///
    /// # Errors
    /// [`DeviceFault::Queue`] when a chain is not a request with room for its response.
    pub(super) fn next(queue: &mut DeviceQueue) -> Result<Option<Self>, DeviceFault> {
        let chain = match queue.pop()? {
            None if queue.enable_kicks()? => queue.pop()?,
            chain => chain,
        };
        let Some(chain) = chain else { return Ok(None) };
        let head_index = chain.head_index();
        let mut request = descriptors(chain, queue.index())?;
        let limit = usize::from(queue.queue().max_size());
        if request.len() > limit {
            let count = request.len();
            return Err(queue.fault(&format_args!(
                "a request has {count} descriptors, the limit is {limit}"
            )));
        }
        let first_writable = request.iter().position(|part| part.is_write_only());
        let response = request.split_off(first_writable.unwrap_or(request.len()));
        if response.iter().any(|part| !part.is_write_only()) {
            return Err(queue.fault(&"a request continues behind the room for its response"));
        }
        let room_bytes: u64 = response.iter().map(|part| u64::from(part.len())).sum();
        if room_bytes < RESPONSE_BYTES as u64 {
            return Err(queue.fault(&format_args!(
                "the room for a response has {room_bytes} of {RESPONSE_BYTES} bytes"
            )));
        }
        let bytes = read(&queue.memory(), &request).map_err(|reason| queue.fault(&reason))?;
        let [k0, k1, _, _, _, _, _, _, address @ .., c0, c1, _, _, _, _, _, _] = bytes;
        Ok(Some(Self {
            kind: match u16::from_le_bytes([k0, k1]) {
                VIRTIO_MEM_REQ_PLUG => Kind::Plug,
                VIRTIO_MEM_REQ_UNPLUG => Kind::Unplug,
                VIRTIO_MEM_REQ_UNPLUG_ALL => Kind::UnplugAll,
                VIRTIO_MEM_REQ_STATE => Kind::State,
                unknown => Kind::Unknown(unknown),
            },
            address: u64::from_le_bytes(address),
            block_count: u16::from_le_bytes([c0, c1]),
            head_index,
            response,
        }))
    }

    /// Answers the request. Does not interrupt.
    ///
    /// # Errors
    /// [`DeviceFault::Queue`] when the response's place is outside memory.
    pub(super) fn answer(self, queue: &mut DeviceQueue, response: Response) -> Result<(), DeviceFault> {
        let bytes = to_bytes(response);
        let mut rest = &bytes[..];
        for part in &self.response {
            let (here, later) = rest.split_at(rest.len().min(part.len() as usize));
            let written = queue.memory().write_slice(here, part.addr());
            written.map_err(|error| queue.fault(&error))?;
            rest = later;
        }
        queue.complete(self.head_index, RESPONSE_BYTES as u32)
    }
}

/// Reads the bytes of a request; what is behind them does not matter.
fn read(memory: &GuestMemoryMmap, parts: &[Descriptor]) -> Result<[u8; REQUEST_BYTES], String> {
    let mut bytes = [0; REQUEST_BYTES];
    let mut filled = 0;
    for part in parts {
        let end = REQUEST_BYTES.min(filled + part.len() as usize);
        let here = &mut bytes[filled..end];
        memory
            .read_slice(here, part.addr())
            .map_err(|error| error.to_string())?;
        filled = end;
    }
    if filled < REQUEST_BYTES {
        return Err(format!("a request has {filled} of {REQUEST_BYTES} bytes"));
    }
    Ok(bytes)
}

fn to_bytes(response: Response) -> [u8; RESPONSE_BYTES] {
    let (kind, state) = match response {
        Response::Ack => (VIRTIO_MEM_RESP_ACK, 0),
        Response::State(BlockState::Plugged) => (VIRTIO_MEM_RESP_ACK, VIRTIO_MEM_STATE_PLUGGED),
        Response::State(BlockState::Unplugged) => (VIRTIO_MEM_RESP_ACK, VIRTIO_MEM_STATE_UNPLUGGED),
        Response::State(BlockState::Mixed) => (VIRTIO_MEM_RESP_ACK, VIRTIO_MEM_STATE_MIXED),
        Response::Nack => (VIRTIO_MEM_RESP_NACK, 0),
        Response::Busy => (VIRTIO_MEM_RESP_BUSY, 0),
        Response::Error => (VIRTIO_MEM_RESP_ERROR, 0),
    };
    let mut bytes = [0; RESPONSE_BYTES];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&state.to_le_bytes());
    bytes
}
