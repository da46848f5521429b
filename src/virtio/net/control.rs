//! The control queue (virtio 1.2 §5.1.6.5), which knows one command: the number of queue pairs in use.
//!
//! Here commands are read and answered; `turns` carries them out. Unknown and impossible ones are answered with
//! `VIRTIO_NET_ERR`, malformed ones are a fault.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vm_memory::{Bytes, GuestAddress};

use crate::virtio::device::DeviceFault;
use crate::virtio::queue_set::{DeviceQueue, descriptors};

/// The bytes of a command that are looked at: class, command, and the two of a number of pairs, and one more to
/// tell that there are too many.
const COMMAND_BYTES: usize = 5;

/// A command from the driver and where its answer belongs.
#[derive(Debug)]
pub(super) struct Command {
    head_index: u16,
    ack: GuestAddress,
    /// The number of queue pairs asked for; `None` for a command that is not known here.
    pub pair_count: Option<u16>,
}

/// Takes the next command from `queue`.
///
/// # Errors
/// [`DeviceFault::Queue`] when it is malformed: its class and command must be readable, and one byte behind must be
/// writable for the answer.
pub(super) fn next_command(queue: &mut DeviceQueue) -> Result<Option<Command>, DeviceFault> {
    let Some(chain) = queue.pop()? else {
        return Ok(None);
    };
    let head_index = chain.head_index();
    let mut bytes = Vec::with_capacity(COMMAND_BYTES);
    let mut ack = None;
    for descriptor in descriptors(chain, queue.index())? {
        if descriptor.is_write_only() {
            if ack.is_none() && descriptor.len() > 0 {
                ack = Some(descriptor.addr());
            }
            continue;
        }
        if ack.is_some() {
            return Err(queue.fault(&"a command continues behind the place for its answer"));
        }
        let start = bytes.len();
        bytes.resize(COMMAND_BYTES.min(start + descriptor.len() as usize), 0);
        queue
            .memory()
            .read_slice(&mut bytes[start..], descriptor.addr())
            .map_err(|error| queue.fault(&error))?;
    }
    let (Some(ack), [class, command, data @ ..]) = (ack, &bytes[..]) else {
        return Err(queue.fault(&"a command lacks its header or the place for its answer"));
    };
    let pair_count = match (u32::from(*class), u32::from(*command), data) {
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, [low, high]) => {
            Some(u16::from_le_bytes([*low, *high]))
        }
        _ => None,
    };
    Ok(Some(Command {
        head_index,
        ack,
        pair_count,
    }))
}

/// Answers `command` with whether it was carried out.
///
/// # Errors
/// [`DeviceFault::Queue`] when the answer's place is outside memory.
pub(super) fn answer(queue: &mut DeviceQueue, command: Command, done: bool) -> Result<(), DeviceFault> {
    let ack = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR } as u8;
    queue
        .memory()
        .write_obj(ack, command.ack)
        .map_err(|error| queue.fault(&error))?;
    queue.complete(command.head_index, 1)
}
