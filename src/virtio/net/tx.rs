//! Packets from the guest (virtio 1.2 §5.1.6.2).
//!
//! A packet that the backend has no room for stays on the available ring, where it is saved with the rest; one that
//! the backend refuses is dropped. The header's content is the backend's to check.

use super::buffers::{Direction, gather};
use super::rx::is_transient;
use super::turns::{PACKETS_PER_TURN, Port};
use crate::net::{PACKET_MAX_BYTES, VIRTIO_NET_HDR_BYTES};
use crate::virtio::device::DeviceFault;

/// What the queue waits for after a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transmitted {
    /// The driver's next kick.
    WaitForKick,
    /// Room in the backend.
    WaitForRoom,
    /// Its next turn: there is more to send.
    TurnOver,
}

/// Moves packets until none is left, the backend is full or it is the others' turn. With the link down
/// (`link_up`), packets are dropped.
///
/// # Errors
/// [`DeviceFault`] when a chain or the ring is malformed.
pub(super) fn transmit(port: Port<'_>, link_up: bool) -> Result<Transmitted, DeviceFault> {
    let memory = port.queue.memory();
    let mut slices = Vec::new();
    let mut outcome = Transmitted::TurnOver;
    port.queue.disable_kicks()?;
    for _ in 0..PACKETS_PER_TURN {
        let Some(chain) = port.queue.pop()? else {
            if port.queue.enable_kicks()? {
                continue;
            }
            outcome = Transmitted::WaitForKick;
            break;
        };
        let head_index = chain.head_index();
        slices.clear();
        let length = gather(port.queue, &memory, chain, Direction::FromDriver, &mut slices)?;
        if length < VIRTIO_NET_HDR_BYTES {
            return Err(port.queue.fault(&format_args!(
                "a packet of {length} bytes is shorter than the {VIRTIO_NET_HDR_BYTES}-byte header"
            )));
        }
        if !link_up || length > PACKET_MAX_BYTES {
            port.counters.tx_dropped += 1;
        } else {
            match port.backend.transmit(port.pair_index, &slices) {
                Ok(()) => {
                    port.counters.tx_packets += 1;
                    port.counters.tx_bytes += (length - VIRTIO_NET_HDR_BYTES) as u64;
                }
                Err(error) if is_transient(&error) => {
                    port.queue.unpop();
                    outcome = Transmitted::WaitForRoom;
                    break;
                }
                Err(error) => {
                    port.counters.tx_errors += 1;
                    port.log.warn(format_args!("a packet was dropped: {error}"));
                }
            }
        }
        port.queue.complete(head_index, 0)?;
    }
    port.queue.signal()?;
    Ok(outcome)
}
