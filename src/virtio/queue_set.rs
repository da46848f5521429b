//! A queue in the hands of a device: strict popping, completion and interrupt suppression in one place.
//!
//! `virtio-queue` stops silently at most malformed rings; a device must not. [`DeviceQueue::pop`] turns an impossible
//! available index and an entry that cannot be read into a fault, and [`DeviceQueue::complete`] does the same for a used
//! ring that cannot be written. A ring was in memory when it was set up, but a guest can give that memory back.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::desc::split::Descriptor as SplitDescriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use super::device::{DeviceFault, VirtioInterrupt};

/// No chain has more descriptors, so that a call that takes a bounded number of chains does a bounded amount of work. The
/// specification allows no more than the queue's size (virtio 1.2 §2.7.5.3.1); Linux goes beyond it with indirect
/// tables where a pipe is spliced into a console's port, by up to 256.
const CHAIN_LENGTH_MAX: usize = 1024;

/// One active queue of a device.
pub struct DeviceQueue {
    index: u16,
    queue: Queue,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    interrupt: Arc<dyn VirtioInterrupt>,
    /// The used index up to which the driver was told or needed not to be told.
    signalled: Wrapping<u16>,
}

impl DeviceQueue {
    /// Hands a validated, ready `queue` to a device.
    pub fn new(
        index: u16,
        queue: Queue,
        memory: impl Into<GuestMemoryAtomic<GuestMemoryMmap>>,
        interrupt: Arc<dyn VirtioInterrupt>,
    ) -> Self {
        Self {
            index,
            signalled: Wrapping(queue.next_used()),
            queue,
            memory: memory.into(),
            interrupt,
        }
    }

    /// The queue's index in its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The ring's state, for saving and inspection.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Guest memory as it is now. Memory that the guest gives back later stays mapped for as long as this is held, so a
    /// request in flight keeps it and a device does not keep it longer.
    pub fn memory(&self) -> Arc<GuestMemoryMmap> {
        self.memory.memory().into_inner()
    }

    /// Takes the next available chain; `None` when the driver offers none.
    ///
    /// # Errors
    /// [`DeviceFault::Queue`] when a part of the available ring is outside memory or its index jumped.
    pub fn pop(&mut self) -> Result<Option<DescriptorChain<Arc<GuestMemoryMmap>>>, DeviceFault> {
        let memory = self.memory();
        let next = self.queue.next_avail();
        if self.available_u16(&memory, 2)? == next {
            return Ok(None);
        }
        // Read here too, because `virtio-queue` takes an entry that it cannot read for an empty ring, and logs it.
        self.available_u16(&memory, 4 + 2 * u64::from(next % self.queue.size().max(1)))?;
        let queue_index = self.index;
        let available = self.queue.iter(memory);
        let mut available = available.map_err(|error| DeviceFault::Queue {
            queue_index,
            reason: error.to_string(),
        })?;
        Ok(available.next())
    }

    /// Puts the last popped chain back, because there is no room or data for it now.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns chain `head_index` to the driver with `length_bytes` written into it. Does not interrupt.
    ///
    /// # Errors
    /// [`DeviceFault::Queue`] when the head is out of range or the used ring is outside memory.
    pub fn complete(&mut self, head_index: u16, length_bytes: u32) -> Result<(), DeviceFault> {
        // Checked here too, because `virtio-queue` logs each such head and a guest could fill the host's log with them.
        self.check_head(head_index)?;
        self.queue
            .add_used(&*self.memory.memory(), head_index, length_bytes)
            .map_err(|error| self.fault(&error))
    }

    /// Returns several `(head_index, length_bytes)` to the driver at once: it sees all of them or none, as a packet
    /// spread over several buffers needs (virtio 1.2 §5.1.6.4). Does not interrupt.
    ///
    /// # Errors
    /// [`DeviceFault::Queue`] when a head is out of range or the used ring is outside memory.
    pub fn complete_together(&mut self, chains: &[(u16, u32)]) -> Result<(), DeviceFault> {
        let Some((&(last_head, last_length), earlier)) = chains.split_last() else {
            return Ok(());
        };
        // Entries ahead of the index are the device's until the last completion publishes the index.
        let mut next_used = self.queue.next_used();
        for &(head_index, length_bytes) in earlier {
            self.check_head(head_index)?;
            // virtio 1.2 §2.7.8: flags and index (4 bytes), then entries of le32 id and le32 length.
            let offset = 4 + 8 * u64::from(next_used % self.queue.size());
            let entry = (u64::from(length_bytes) << 32 | u64::from(head_index)).to_le();
            let address = GuestAddress(self.queue.used_ring().wrapping_add(offset));
            self.memory
                .memory()
                .write_obj(entry, address)
                .map_err(|error| self.fault(&error))?;
            next_used = next_used.wrapping_add(1);
        }
        self.queue.set_next_used(next_used);
        self.complete(last_head, last_length)
    }

    fn check_head(&self, head_index: u16) -> Result<(), DeviceFault> {
        if head_index < self.queue.size() {
            return Ok(());
        }
        Err(self.fault(&format_args!("head {head_index} is out of range")))
    }

    /// Interrupts the driver for what was completed since the last call, unless it asked not to be
    /// (virtio 1.2 §2.7.7.2).
    ///
    /// # Errors
    /// [`DeviceFault::Queue`] when the ring is outside memory.
    pub fn signal(&mut self) -> Result<(), DeviceFault> {
        let used = Wrapping(self.queue.next_used());
        let before = std::mem::replace(&mut self.signalled, used);
        // The driver must see the used index before its wish is read, else both sides may sleep.
        fence(Ordering::SeqCst);
        let memory = self.memory.memory();
        let wanted = if self.queue.event_idx_enabled() {
            let offset = 4 + 2 * u64::from(self.queue.size());
            let used_event = Wrapping(self.available_u16(&memory, offset)?);
            used - used_event - Wrapping(1) < used - before
        } else {
            used != before && u32::from(self.available_u16(&memory, 0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt.signal_queue(self.index);
        }
        Ok(())
    }

    /// The field at byte `offset` of the available ring (virtio 1.2 §2.7.6).
    fn available_u16(&self, memory: &GuestMemoryMmap, offset: u64) -> Result<u16, DeviceFault> {
        let address = GuestAddress(self.queue.avail_ring().wrapping_add(offset));
        memory
            .load::<u16>(address, Ordering::Relaxed)
            .map(u16::from_le)
            .map_err(|error| self.fault(&error))
    }

    /// Interrupts the driver even if it asked not to be: once after restore and resume, when it is not known what
    /// it has seen.
    pub fn signal_always(&self) {
        self.interrupt.signal_queue(self.index);
    }

    /// Stops kicks while the device polls the ring.
    ///
    /// # Errors
    /// [`DeviceFault::Queue`] when the ring is outside memory.
    pub fn disable_kicks(&mut self) -> Result<(), DeviceFault> {
        self.queue
            .disable_notification(&*self.memory.memory())
            .map_err(|error| self.fault(&error))
    }

    /// Asks for kicks again. `true` means that more chains came meanwhile and the device must pop again.
    ///
    /// # Errors
    /// [`DeviceFault::Queue`] when the ring is outside memory.
    pub fn enable_kicks(&mut self) -> Result<bool, DeviceFault> {
        self.queue
            .enable_notification(&*self.memory.memory())
            .map_err(|error| self.fault(&error))
    }

    /// A fault of this queue with its reason.
    pub fn fault(&self, reason: &dyn std::fmt::Display) -> DeviceFault {
        DeviceFault::Queue {
            queue_index: self.index,
            reason: reason.to_string(),
        }
    }
}

/// The descriptors of a chain, counted against the ring's size: a chain that the ring cuts short or that loops is a
/// fault instead of a shorter chain. They have less than 2^32 bytes together (virtio 1.2 §2.7.5.2).
///
/// # Errors
/// [`DeviceFault::Queue`] when the last descriptor that could be read still announces a next one, or there are more than
/// 1024.
pub fn descriptors(
    chain: DescriptorChain<Arc<GuestMemoryMmap>>,
    queue_index: u16,
) -> Result<Vec<SplitDescriptor>, DeviceFault> {
    let descriptors: Vec<_> = chain.take(CHAIN_LENGTH_MAX + 1).collect();
    let complete = descriptors.last().is_some_and(|last| !last.has_next());
    let reason = if descriptors.len() > CHAIN_LENGTH_MAX {
        format!("descriptor chain is longer than {CHAIN_LENGTH_MAX}")
    } else if complete {
        return Ok(descriptors);
    } else {
        "descriptor chain is cut off, loops or is empty".to_owned()
    };
    Err(DeviceFault::Queue { queue_index, reason })
}

#[cfg(test)]
mod tests;
