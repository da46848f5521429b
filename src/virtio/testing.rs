//! The driver's side for tests of devices: rings in guest memory, chains of any shape, interrupts counted.
//!
//! ```text
//! n × 0x4000   ring n: descriptors, available ring (+0x1000), used ring (+0x2000)
//! HEAP         what the test places
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::device::{Activation, DeviceFault, VirtioDevice, VirtioInterrupt};
use super::queue_set::DeviceQueue;
use crate::storage::testing::guest_memory;

/// Guest memory of a test, from address 0.
pub(crate) const MEMORY_BYTES: u64 = 2 << 20;
const HEAP: u64 = 1 << 20;
const RING_BYTES: u64 = 0x4000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const QUEUE_SIZE: u16 = 64;

/// A part of a chain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    pub(crate) address: u64,
    pub(crate) length: u32,
    pub(crate) writable: bool,
}

/// Counts interrupts.
#[derive(Default)]
pub(crate) struct Interrupts(Mutex<(BTreeMap<u16, u32>, u32)>);

impl Interrupts {
    /// Those for queue `queue_index` since the last call.
    pub(crate) fn take_queue(&self, queue_index: u16) -> u32 {
        let mut counts = self.0.lock().expect("no panic while locked");
        counts.0.remove(&queue_index).unwrap_or(0)
    }

    /// Those for the configuration since the last call.
    pub(crate) fn take_config(&self) -> u32 {
        std::mem::take(&mut self.0.lock().expect("no panic while locked").1)
    }
}

impl VirtioInterrupt for Interrupts {
    fn signal_queue(&self, queue_index: u16) {
        let mut counts = self.0.lock().expect("no panic while locked");
        *counts.0.entry(queue_index).or_default() += 1;
    }

    fn signal_config(&self) {
        self.0.lock().expect("no panic while locked").1 += 1;
    }
}

#[derive(Default, Clone, Copy)]
struct Ring {
    next_descriptor: u16,
    available: u16,
    seen_used: u16,
}

/// A device and its driver.
pub(crate) struct Driver<D> {
    pub(crate) device: D,
    pub(crate) interrupts: Arc<Interrupts>,
    memory: Arc<GuestMemoryMmap>,
    rings: BTreeMap<u16, Ring>,
    heap: u64,
}

impl<D: VirtioDevice> Driver<D> {
    /// A driver that accepts `driver_features` and enables `queues`.
    pub(crate) fn start(device: D, driver_features: u64, queues: &[u16]) -> Self {
        let mut driver = Self {
            device,
            interrupts: Arc::default(),
            memory: guest_memory(MEMORY_BYTES as usize),
            rings: BTreeMap::new(),
            heap: HEAP,
        };
        driver.activate(driver_features, queues);
        driver
    }

    /// Resets the device and starts afresh.
    pub(crate) fn restart(&mut self, driver_features: u64, queues: &[u16]) {
        self.device.reset();
        self.activate(driver_features, queues);
    }

    fn activate(&mut self, driver_features: u64, indices: &[u16]) {
        for index in indices {
            self.scribble(u64::from(*index) * RING_BYTES, &[0; RING_BYTES as usize]);
        }
        self.rings = indices.iter().map(|index| (*index, Ring::default())).collect();
        let queues = indices.iter().map(|index| self.ring(*index, 0)).collect();
        self.hand_over(driver_features, queues);
    }

    fn hand_over(&mut self, driver_features: u64, queues: Vec<DeviceQueue>) {
        let activation = Activation {
            driver_features,
            queues,
            interrupt: self.interrupts.clone(),
        };
        self.device
            .activate(activation)
            .expect("the device accepts any driver");
    }

    /// Replaces the device by `device`, with the rings as they are, as a restore does.
    pub(crate) fn move_to(mut self, device: D, driver_features: u64) -> Self {
        let positions: Vec<_> = self
            .device
            .queues()
            .iter()
            .map(|queue| {
                assert_eq!(
                    queue.queue().next_avail(),
                    queue.queue().next_used(),
                    "a chain is held"
                );
                (queue.index(), queue.queue().next_avail())
            })
            .collect();
        self.device = device;
        let queues = positions.into_iter().map(|(index, next)| self.ring(index, next));
        let queues = queues.collect();
        self.hand_over(driver_features, queues);
        self
    }

    fn ring(&self, index: u16, next: u16) -> DeviceQueue {
        let base = u64::from(index) * RING_BYTES;
        let mut queue = Queue::new(QUEUE_SIZE).expect("a power of two");
        queue.set_desc_table_address(Some(base as u32), Some(0));
        queue.set_avail_ring_address(Some((base + AVAILABLE) as u32), Some(0));
        queue.set_used_ring_address(Some((base + USED) as u32), Some(0));
        queue.set_next_avail(next);
        queue.set_next_used(next);
        queue.set_ready(true);
        DeviceQueue::new(index, queue, self.memory.clone(), self.interrupts.clone())
    }

    /// Writes over anything.
    pub(crate) fn scribble(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .expect("in memory");
    }

    /// What is at `address`.
    pub(crate) fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .expect("in memory");
        bytes
    }

    /// `bytes` in fresh memory, for the device to read.
    pub(crate) fn readable(&mut self, bytes: &[u8]) -> Part {
        let address = self.heap;
        self.heap += (bytes.len() as u64).next_multiple_of(16);
        self.scribble(address, bytes);
        Part {
            address,
            length: bytes.len() as u32,
            writable: false,
        }
    }

    /// Fresh memory for the device to write.
    pub(crate) fn writable(&mut self, length: usize) -> Part {
        Part {
            writable: true,
            ..self.readable(&vec![0xEE; length])
        }
    }

    /// Offers a chain of `parts`; does not kick.
    pub(crate) fn offer(&mut self, queue_index: u16, parts: &[Part]) -> u16 {
        let base = u64::from(queue_index) * RING_BYTES;
        let mut ring = self.rings[&queue_index];
        let head_index = ring.next_descriptor;
        for (number, part) in parts.iter().enumerate() {
            let next = (ring.next_descriptor + 1) % QUEUE_SIZE;
            let more = number + 1 < parts.len();
            let flags =
                (VRING_DESC_F_NEXT * u32::from(more)) | (VRING_DESC_F_WRITE * u32::from(part.writable));
            let descriptor = Descriptor::new(part.address, part.length, flags as u16, next);
            let at = GuestAddress(base + u64::from(ring.next_descriptor) * 16);
            self.memory
                .write_obj(descriptor, at)
                .expect("rings are in memory");
            ring.next_descriptor = next;
        }
        let entry = base + AVAILABLE + 4 + u64::from(ring.available % QUEUE_SIZE) * 2;
        self.scribble(entry, &head_index.to_le_bytes());
        ring.available = ring.available.wrapping_add(1);
        self.scribble(base + AVAILABLE + 2, &ring.available.to_le_bytes());
        self.rings.insert(queue_index, ring);
        head_index
    }

    /// Offers a chain, kicks, and lets the device go on until it rests.
    pub(crate) fn run(&mut self, queue_index: u16, parts: &[Part]) -> Result<(), DeviceFault> {
        self.offer(queue_index, parts);
        self.device.process_queue(queue_index)?;
        self.settle()
    }

    /// Serves the device's descriptors until none is readable.
    pub(crate) fn settle(&mut self) -> Result<(), DeviceFault> {
        while self.event(false)? {}
        Ok(())
    }

    /// Serves one readable descriptor of the device, if there is one.
    pub(crate) fn event(&mut self, paused: bool) -> Result<bool, DeviceFault> {
        let epoll = Epoll::new().expect("the host has epoll");
        for source in self.device.event_sources() {
            let event = EpollEvent::new(EventSet::IN, source.token.into());
            let added = epoll.ctl(ControlOperation::Add, source.fd, event);
            added.expect("it can be watched");
        }
        let mut events = [EpollEvent::default()];
        if epoll.wait(0, &mut events).expect("epoll works") == 0 {
            return Ok(false);
        }
        self.device.process_event(events[0].data() as u32, paused)?;
        Ok(true)
    }

    /// The chains returned since the last call: head and length.
    pub(crate) fn used(&mut self, queue_index: u16) -> Vec<(u16, u32)> {
        let base = u64::from(queue_index) * RING_BYTES + USED;
        let end: u16 = self.memory.read_obj(GuestAddress(base + 2)).expect("in memory");
        let memory = self.memory.clone();
        let ring = self.rings.get_mut(&queue_index).expect("the queue is enabled");
        let mut chains = Vec::new();
        while ring.seen_used != end {
            let entry = base + 4 + u64::from(ring.seen_used % QUEUE_SIZE) * 8;
            let [head, length]: [u32; 2] =
                [entry, entry + 4].map(|at| memory.read_obj(GuestAddress(at)).expect("in memory"));
            chains.push((head as u16, length));
            ring.seen_used = ring.seen_used.wrapping_add(1);
        }
        chains
    }

    /// The little-endian number of up to 8 bytes in the configuration.
    pub(crate) fn config(&self, offset: u64, length: usize) -> u64 {
        let mut bytes = [0; 8];
        self.device.config_read(offset, &mut bytes[..length]);
        u64::from_le_bytes(bytes)
    }
}
