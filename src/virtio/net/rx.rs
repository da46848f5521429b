//! Packets to the guest (virtio 1.2 §5.1.6.3 and §5.1.6.4).
//!
//! A packet is taken from the backend only when the posted buffers can hold any packet that may come; until then it
//! waits in the host. Buffers that were looked at but not filled go back before the turn ends, so that between turns
//! the ring holds everything there is to save.

use std::collections::VecDeque;
use std::io;

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestMemoryMmap, VolatileSlice};

use super::buffers::{Direction, gather};
use super::turns::{Counters, PACKETS_PER_TURN, Port};
use crate::net::{NetBackend, PACKET_MAX_BYTES, VIRTIO_NET_HDR_BYTES};
use crate::virtio::device::DeviceFault;
use crate::virtio::queue_set::DeviceQueue;

/// The offset of `num_buffers` in `struct virtio_net_hdr` (virtio 1.2 §5.1.6).
const NUM_BUFFERS_OFFSET: usize = 10;
/// The smallest buffer of a driver that takes no segmentation over (virtio 1.2 §5.1.6.3.1).
const UNSEGMENTED_PACKET_BYTES: usize = 1526;
/// How many pieces of memory are offered to the backend at once. A chain adds at most twice the queue's size to
/// fewer than these, which stays below `BUFFER_COUNT_MAX` for the sizes this device has.
const PIECES_ENOUGH: usize = 256;

/// How the driver wants its packets.
#[derive(Debug, Clone, Copy)]
pub(super) struct Framing {
    /// A packet may be spread over several chains (`VIRTIO_NET_F_MRG_RXBUF`).
    pub mergeable: bool,
    /// Packets may come unsegmented.
    pub segmentation: bool,
}

/// What the queue waits for after a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// Packets from the backend.
    WaitForPackets,
    /// Buffers from the driver.
    WaitForBuffers,
}

/// Moves packets until none is left, the buffers run out or it is the others' turn.
///
/// # Errors
/// [`DeviceFault`] when a chain or the ring is malformed.
pub(super) fn receive(port: Port<'_>, framing: Framing) -> Result<Received, DeviceFault> {
    let memory = port.queue.memory();
    // One byte behind the buffers shows whether a packet was longer than they are.
    let mut excess = [0];
    let excess = VolatileSlice::from(&mut excess[..]);
    let mut posted = Posted::default();
    let mut outcome = Received::WaitForPackets;
    port.queue.disable_kicks()?;
    for _ in 0..PACKETS_PER_TURN {
        if !posted.fill(port.queue, &memory, framing)? {
            if port.queue.enable_kicks()? {
                continue;
            }
            outcome = Received::WaitForBuffers;
            break;
        }
        posted.slices.push(excess);
        let received = port.backend.receive(port.pair_index, &posted.slices);
        posted.slices.pop();
        match received {
            Ok(length) if length > posted.bytes => port.counters.rx_dropped += 1,
            Ok(length) if length < VIRTIO_NET_HDR_BYTES => port.counters.rx_errors += 1,
            Ok(length) => {
                posted.deliver(port.queue, length)?;
                port.counters.rx_packets += 1;
                port.counters.rx_bytes += (length - VIRTIO_NET_HDR_BYTES) as u64;
            }
            Err(error) if is_transient(&error) => break,
            Err(error) => {
                port.counters.rx_errors += 1;
                port.log.warn(format_args!("cannot receive a packet: {error}"));
            }
        }
    }
    posted.give_back(port.queue);
    port.queue.signal()?;
    Ok(outcome)
}

/// Throws waiting packets away, because the link is down.
pub(super) fn discard(backend: &mut dyn NetBackend, pair_index: u16, counters: &mut Counters) {
    let mut scratch = [0; 64];
    let scratch = [VolatileSlice::from(&mut scratch[..])];
    for _ in 0..PACKETS_PER_TURN {
        match backend.receive(pair_index, &scratch) {
            Ok(_) => counters.rx_dropped += 1,
            Err(error) if is_transient(&error) => break,
            Err(_) => counters.rx_errors += 1,
        }
    }
}

/// Whether a call of the backend can simply be repeated when its descriptor is ready.
pub(super) fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// One chain that the driver posted.
struct Chain {
    head_index: u16,
    slice_count: usize,
    bytes: usize,
}

/// The chains popped and not yet filled, oldest first.
#[derive(Default)]
struct Posted<'m> {
    chains: VecDeque<Chain>,
    slices: Vec<VolatileSlice<'m>>,
    bytes: usize,
}

impl<'m> Posted<'m> {
    /// Pops chains until any packet fits. `false` means that the driver has to post more first.
    fn fill(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &'m GuestMemoryMmap,
        framing: Framing,
    ) -> Result<bool, DeviceFault> {
        while !self.is_enough(framing) {
            let Some(chain) = queue.pop()? else { break };
            let head_index = chain.head_index();
            let before = self.slices.len();
            let bytes = gather(queue, memory, chain, Direction::ToDriver, &mut self.slices)?;
            if bytes < VIRTIO_NET_HDR_BYTES {
                return Err(queue.fault(&format_args!(
                    "a receive buffer of {bytes} bytes cannot hold the {VIRTIO_NET_HDR_BYTES}-byte header"
                )));
            }
            self.chains.push_back(Chain {
                head_index,
                slice_count: self.slices.len() - before,
                bytes,
            });
            self.bytes += bytes;
        }
        let needed_bytes = if framing.segmentation {
            PACKET_MAX_BYTES
        } else {
            UNSEGMENTED_PACKET_BYTES
        };
        // A driver whose whole queue is posted cannot add anything; a packet too big for it is dropped.
        let is_full = self.slices.len() >= usize::from(queue.queue().size()).min(PIECES_ENOUGH);
        let fits = !framing.mergeable || self.bytes >= needed_bytes || is_full;
        Ok(fits && !self.chains.is_empty())
    }

    fn is_enough(&self, framing: Framing) -> bool {
        if framing.mergeable {
            self.bytes >= PACKET_MAX_BYTES || self.slices.len() >= PIECES_ENOUGH
        } else {
            !self.chains.is_empty()
        }
    }

    /// Gives the chains that hold the packet of `length` bytes to the driver, all at once.
    fn deliver(&mut self, queue: &mut DeviceQueue, length: usize) -> Result<(), DeviceFault> {
        let mut used = Vec::new();
        let mut slice_count = 0;
        let mut rest = length;
        while rest > 0
            && let Some(chain) = self.chains.pop_front()
        {
            let part = rest.min(chain.bytes);
            used.push((chain.head_index, part as u32));
            rest -= part;
            slice_count += chain.slice_count;
            self.bytes -= chain.bytes;
        }
        self.write_num_buffers(used.len() as u16)
            .map_err(|error| queue.fault(&error))?;
        self.slices.drain(..slice_count);
        queue.complete_together(&used)
    }

    /// Writes `num_buffers` into the header, wherever the first chain's descriptors split it. It is 1 without
    /// mergeable buffers (virtio 1.2 §5.1.6.4.1).
    fn write_num_buffers(&self, count: u16) -> Result<(), vm_memory::VolatileMemoryError> {
        let mut start = 0;
        for slice in &self.slices {
            for (byte, offset) in count.to_le_bytes().iter().zip(NUM_BUFFERS_OFFSET..) {
                if (start..start + slice.len()).contains(&offset) {
                    slice.write_obj(*byte, offset - start)?;
                }
            }
            start += slice.len();
            if start >= VIRTIO_NET_HDR_BYTES {
                break;
            }
        }
        Ok(())
    }

    /// Puts the chains that were not filled back on the available ring.
    fn give_back(self, queue: &mut DeviceQueue) {
        for _ in self.chains {
            queue.unpop();
        }
    }
}
