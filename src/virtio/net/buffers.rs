//! A guest's descriptor chains as slices of its memory, for the backend to read or fill.
//!
//! Asked by `rx` and `tx` for every chain. The driver may have written anything into the descriptors; what leaves
//! here lies in guest memory, goes in one direction and is bounded in number.

use std::sync::Arc;

use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use crate::net::BUFFER_COUNT_MAX;
use crate::virtio::device::DeviceFault;
use crate::virtio::queue_set::{DeviceQueue, descriptors};

/// Which side writes a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// The device reads what the driver wrote.
    FromDriver,
    /// The device writes.
    ToDriver,
}

/// Appends the buffers of `chain`, popped from `queue`, to `slices` and returns their size in bytes. All of them
/// must go in `direction`; the chain must not be longer than the largest queue (virtio 1.2 §2.7.5.3.1).
///
/// # Errors
/// [`DeviceFault::Queue`] when the chain is malformed or outside `memory`.
pub(super) fn gather<'m>(
    queue: &DeviceQueue,
    memory: &'m GuestMemoryMmap,
    chain: DescriptorChain<Arc<GuestMemoryMmap>>,
    direction: Direction,
    slices: &mut Vec<VolatileSlice<'m>>,
) -> Result<usize, DeviceFault> {
    let descriptors = descriptors(chain, queue.index())?;
    let length_max = usize::from(queue.queue().max_size());
    if descriptors.len() > length_max {
        return Err(queue.fault(&format_args!(
            "a chain of {} descriptors is longer than the queue, {length_max}",
            descriptors.len()
        )));
    }
    let mut bytes = 0;
    for descriptor in descriptors {
        if descriptor.is_write_only() != (direction == Direction::ToDriver) {
            return Err(queue.fault(&"a descriptor has the wrong direction"));
        }
        for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
            let slice = slice.map_err(|error| queue.fault(&error))?;
            bytes += slice.len();
            slices.push(slice);
        }
    }
    if slices.len() >= BUFFER_COUNT_MAX {
        return Err(queue.fault(&format_args!(
            "buffers in {} pieces, the limit is {BUFFER_COUNT_MAX}",
            slices.len()
        )));
    }
    Ok(bytes)
}
