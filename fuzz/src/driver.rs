//! A driver with rings of its own, for a virtio device without a transport.
//!
//! ```text
//! n × 0x4000   ring n: descriptors, available ring (+0x1000), used ring (+0x2000)
//! HEAP         headers and indirect tables, one after the other; buffers lie anywhere
//! ```
//! What must hold whatever the driver does: the device comes to rest, and it has then returned every chain that it
//! took, or it has reported a fault.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use arbitrary::Arbitrary;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_lifecycle::virtio::device::{Activation, DeviceFault, VirtioDevice, VirtioInterrupt};
use vm_lifecycle::virtio::features::offered;
use vm_lifecycle::virtio::queue_set::DeviceQueue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Guest memory, from address 0.
pub const MEMORY_BYTES: u64 = 0x4_0000;
const HEAP: u64 = 0x2_0000;
const RING_BYTES: u64 = 0x4000;
const QUEUE_SIZE_MAX: u16 = 256;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Calls without any effect that a device may ask for before it counts as spinning.
const IDLE_CALLS_MAX: u32 = 8;
/// More than any honest ring needs; a device may read from a disk what keeps its ring full for ever.
const CALLS_MAX: u32 = 2000;

/// What the driver does.
#[derive(Debug, Arbitrary)]
pub enum Step {
    /// Offers a chain, with a header as the device's requests have it.
    Chain {
        queue: u8,
        header: Option<[u8; 4]>,
        parts: Vec<Part>,
        in_order: bool,
        indirect: bool,
    },
    /// Offers whatever descriptor `head` says.
    Head {
        queue: u8,
        head: u16,
    },
    /// Writes over anything.
    Scribble {
        address: u32,
        bytes: Vec<u8>,
    },
    Kick {
        queue: u8,
    },
    Settle,
    /// Resets the device in the middle of everything and starts afresh.
    Restart,
}

/// One buffer of a chain.
#[derive(Debug, Arbitrary)]
pub struct Part {
    address: Place,
    length: Length,
    writable: bool,
}

#[derive(Debug, Arbitrary)]
enum Place {
    Inside(u32),
    NearEnd(i8),
    Anywhere(u64),
}

#[derive(Debug, Arbitrary)]
enum Length {
    Short(u8),
    Sectors(u8),
    Long(u16),
    Any(u32),
}

impl Part {
    fn descriptor(&self) -> (u64, u32, u16) {
        let address = match self.address {
            Place::Inside(address) => u64::from(address) % MEMORY_BYTES,
            Place::NearEnd(distance) => MEMORY_BYTES.wrapping_add_signed(distance.into()),
            Place::Anywhere(address) => address,
        };
        let length = match self.length {
            Length::Short(length) => length.into(),
            Length::Sectors(count) => u32::from(count) * 512,
            Length::Long(length) => length.into(),
            Length::Any(length) => length,
        };
        (address, length, if self.writable { WRITE } else { 0 })
    }
}

/// Counts interrupts.
#[derive(Default)]
pub struct Interrupts(AtomicU32);

impl VirtioInterrupt for Interrupts {
    fn signal_queue(&self, _queue_index: u16) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn signal_config(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A device in the hands of a driver.
pub struct Driven<D> {
    pub device: D,
    memory: Arc<GuestMemoryMmap>,
    epoll: Epoll,
    features: u64,
    queue_sizes: Vec<u16>,
    next_descriptor: Vec<u16>,
    heap: u64,
    /// What a chain's header becomes in memory.
    header: fn([u8; 4]) -> Vec<u8>,
}

impl<D: VirtioDevice> Driven<D> {
    /// Sets `device` up with rings of at most 2^`size_log2` entries and the features among `features` that it offers.
    pub fn start(device: D, features: u64, size_log2: u8, header: fn([u8; 4]) -> Vec<u8>) -> Option<Self> {
        let size = QUEUE_SIZE_MAX >> (size_log2 % 8);
        let queue_sizes: Vec<_> = device
            .queue_sizes_max()
            .iter()
            .map(|max| size.min(*max))
            .collect();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES as usize)]);
        let mut driven = Self {
            memory: Arc::new(memory.expect("memory is free")),
            epoll: Epoll::new().expect("descriptors are free"),
            features: features & offered(device.device_features()),
            next_descriptor: Vec::new(),
            queue_sizes,
            heap: HEAP,
            header,
            device,
        };
        // The driver's choice of features may be impossible.
        driven.activate().ok()?;
        Some(driven)
    }

    fn activate(&mut self) -> Result<(), DeviceFault> {
        self.scribble(0, &vec![0; HEAP as usize]);
        self.next_descriptor = vec![0; self.queue_sizes.len()];
        let interrupt = Arc::new(Interrupts::default());
        let mut queues = Vec::new();
        for (index, size) in (0..).zip(&self.queue_sizes) {
            let base = u32::from(index) * RING_BYTES as u32;
            let mut queue = Queue::new(QUEUE_SIZE_MAX).expect("a power of two");
            queue.set_size(*size);
            queue.set_desc_table_address(Some(base), None);
            queue.set_avail_ring_address(Some(base + 0x1000), None);
            queue.set_used_ring_address(Some(base + 0x2000), None);
            queue.set_event_idx(self.features & 1 << 29 != 0);
            queue.set_ready(true);
            queues.push(DeviceQueue::new(
                index,
                queue,
                self.memory.clone(),
                interrupt.clone(),
            ));
        }
        self.device.activate(Activation {
            driver_features: self.features,
            queues,
            interrupt,
        })?;
        for source in self.device.event_sources() {
            let event = EpollEvent::new(EventSet::IN, source.token.into());
            // After a restart the device may still have the descriptor that is watched.
            let _ = self.epoll.ctl(ControlOperation::Add, source.fd, event);
        }
        Ok(())
    }

    /// Does one step.
    ///
    /// # Errors
    /// [`DeviceFault`] when the device does not go on; [`Driven::finish`] is all that may follow.
    pub fn play(&mut self, step: &Step) -> Result<(), DeviceFault> {
        match step {
            Step::Chain {
                queue,
                header,
                parts,
                in_order,
                indirect,
            } => {
                let mut chain: Vec<_> = parts.iter().map(Part::descriptor).collect();
                if *in_order {
                    chain.sort_by_key(|(_, _, flags)| *flags);
                }
                if let Some(header) = header {
                    let header = (self.header)(*header);
                    let address = self.place(&header);
                    chain.insert(0, (address, header.len() as u32, 0));
                }
                let queue = self.queue(*queue);
                if *indirect {
                    chain = vec![self.indirect(&chain)];
                }
                self.offer(queue, &chain);
            }
            Step::Head { queue, head } => self.offer_head(self.queue(*queue), *head),
            Step::Scribble { address, bytes } => self.scribble(u64::from(*address) % MEMORY_BYTES, bytes),
            Step::Kick { queue } => self.device.process_queue(self.queue(*queue))?,
            Step::Settle => self.settle()?,
            Step::Restart => {
                self.end();
                self.activate()?;
            }
        }
        Ok(())
    }

    /// Sends a whole request: its header, and room for a response of `response_bytes`.
    ///
    /// # Errors
    /// As [`Driven::play`].
    pub fn ask(&mut self, queue: u8, header: [u8; 4], response_bytes: u32) -> Result<(), DeviceFault> {
        let header = (self.header)(header);
        let request = (self.place(&header), header.len() as u32, 0);
        let room = (
            self.place(&vec![0; response_bytes as usize]),
            response_bytes,
            WRITE,
        );
        let queue = self.queue(queue);
        self.offer(queue, &[request, room]);
        self.device.process_queue(queue)
    }

    /// Serves every queue until the device rests, checks that nothing is lost, and resets it.
    pub fn finish(mut self, outcome: Result<(), DeviceFault>) {
        if outcome.and_then(|()| self.serve_all()).is_ok() {
            self.check_rings();
        }
        self.end();
        assert!(self.device.queues().is_empty(), "a reset device holds queues");
    }

    fn serve_all(&mut self) -> Result<(), DeviceFault> {
        for queue_index in 0..self.queue_sizes.len() {
            self.device.process_queue(queue_index as u16)?;
        }
        self.settle()
    }

    fn check_rings(&self) {
        if self.device.in_flight_count() != 0 {
            return;
        }
        for queue in self.device.queues() {
            let ring = queue.queue();
            assert_eq!(
                ring.next_avail(),
                ring.next_used(),
                "queue {} kept a chain without a fault",
                queue.index()
            );
        }
    }

    /// Serves the device's descriptors until none is readable.
    pub fn settle(&mut self) -> Result<(), DeviceFault> {
        let mut idle_calls = 0;
        for _ in 0..CALLS_MAX {
            let before = self.progress();
            if !self.serve_events(false)? {
                return Ok(());
            }
            idle_calls = if self.progress() == before {
                idle_calls + 1
            } else {
                0
            };
            assert!(
                idle_calls < IDLE_CALLS_MAX,
                "the device spins: {}",
                self.device.inspect()
            );
        }
        Ok(())
    }

    fn progress(&self) -> (Vec<(u16, u16)>, usize, serde_json::Value) {
        let rings = self.device.queues().iter().map(DeviceQueue::queue);
        let rings = rings.map(|ring| (ring.next_avail(), ring.next_used()));
        (
            rings.collect(),
            self.device.in_flight_count(),
            self.device.inspect(),
        )
    }

    fn serve_events(&mut self, paused: bool) -> Result<bool, DeviceFault> {
        let mut events = [EpollEvent::default(); 4];
        let count = self.epoll.wait(0, &mut events).expect("epoll works");
        for event in &events[..count] {
            self.device.process_event(event.data() as u32, paused)?;
        }
        Ok(count != 0)
    }

    /// Resets the device and waits for what is in flight.
    fn end(&mut self) {
        self.device.reset();
        for _ in 0..CALLS_MAX {
            if self.device.in_flight_count() == 0 {
                return;
            }
            self.serve_events(true).expect("a reset device reports no fault");
        }
        panic!("{} requests survive a reset", self.device.in_flight_count());
    }

    fn queue(&self, queue: u8) -> u16 {
        u16::from(queue) % self.queue_sizes.len() as u16
    }

    fn place(&mut self, bytes: &[u8]) -> u64 {
        if self.heap + bytes.len() as u64 > MEMORY_BYTES {
            self.heap = HEAP;
        }
        let address = self.heap;
        self.heap += (bytes.len() as u64).next_multiple_of(16);
        self.scribble(address, bytes);
        address
    }

    fn indirect(&mut self, chain: &[(u64, u32, u16)]) -> (u64, u32, u16) {
        let mut table = Vec::new();
        for (index, (address, length, flags)) in (1..).zip(chain) {
            let more = if usize::from(index) < chain.len() { NEXT } else { 0 };
            table.extend(address.to_le_bytes());
            table.extend(length.to_le_bytes());
            table.extend((flags | more).to_le_bytes());
            table.extend(u16::to_le_bytes(index));
        }
        (self.place(&table), table.len() as u32, INDIRECT)
    }

    fn offer(&mut self, queue: u16, chain: &[(u64, u32, u16)]) {
        let size = self.queue_sizes[usize::from(queue)];
        let head = self.next_descriptor[usize::from(queue)];
        let mut index = head;
        for (number, (address, length, flags)) in chain.iter().enumerate() {
            let next = (index + 1) % size;
            let more = if number + 1 < chain.len() { NEXT } else { 0 };
            let descriptor = Descriptor::new(*address, *length, flags | more, next);
            let at = u64::from(queue) * RING_BYTES + u64::from(index) * 16;
            self.memory
                .write_obj(descriptor, GuestAddress(at))
                .expect("rings are in memory");
            index = next;
        }
        self.next_descriptor[usize::from(queue)] = index;
        self.offer_head(queue, head);
    }

    fn offer_head(&self, queue: u16, head: u16) {
        let available = u64::from(queue) * RING_BYTES + 0x1000;
        let size = self.queue_sizes[usize::from(queue)];
        let index: u16 = self
            .memory
            .read_obj(GuestAddress(available + 2))
            .expect("in memory");
        self.scribble(available + 4 + u64::from(index % size) * 2, &head.to_le_bytes());
        self.scribble(available + 2, &index.wrapping_add(1).to_le_bytes());
    }

    /// Writes as much of `bytes` as memory has room for.
    fn scribble(&self, address: u64, bytes: &[u8]) {
        let room = (MEMORY_BYTES - address) as usize;
        let bytes = &bytes[..bytes.len().min(room)];
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .expect("in memory");
    }
}
