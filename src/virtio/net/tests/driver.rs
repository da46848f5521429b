//! The driver's side: split rings laid out by hand, and a card with the sockets at its far end.
//!
//! Ring `n` lies at `n` × 0x4000: descriptors, available ring (+0x1000), used ring (+0x2000). Buffers start at 1 MiB.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::super::Net;
use crate::ids::MacAddr;
use crate::net::NetBackend;
use crate::net::fake::FakeNet;
use crate::virtio::device::{Activation, DeviceFault, VirtioDevice, VirtioInterrupt};
use crate::virtio::queue_set::DeviceQueue;

pub const MEMORY_BYTES: usize = 16 << 20;
pub const BUFFERS: u64 = 1 << 20;
/// CSUM GUEST_CSUM MAC MRG_RXBUF STATUS CTRL_VQ MQ, no segmentation.
pub const FEATURES: u64 = 0x43_8023;
pub const MRG_RXBUF: u64 = 1 << 15;
pub const GUEST_TSO4: u64 = 1 << 7;
pub const MQ: u64 = 1 << 22;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// One buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    pub address: u64,
    pub length: u32,
    pub writable: bool,
}

pub fn readable(address: u64, length: u32) -> Part {
    Part {
        address,
        length,
        writable: false,
    }
}

pub fn writable(address: u64, length: u32) -> Part {
    Part {
        address,
        length,
        writable: true,
    }
}

/// One ring, the driver's side.
pub struct Ring {
    memory: Arc<GuestMemoryMmap>,
    base: u64,
    pub size: u16,
    next_descriptor: u16,
    available: u16,
    seen: u16,
}

impl Ring {
    fn new(memory: Arc<GuestMemoryMmap>, index: u16, size: u16) -> Self {
        Self {
            memory,
            base: u64::from(index) * 0x4000,
            size,
            next_descriptor: 0,
            available: 0,
            seen: 0,
        }
    }

    pub fn write_u16(&self, offset: u64, value: u16) {
        self.memory
            .write_obj(value, GuestAddress(self.base + offset))
            .expect("rings are in memory");
    }

    pub fn write_descriptor(&self, index: u16, part: Part, flags: u16, next: u16) {
        let at = u64::from(index) * 16;
        let write = if part.writable { WRITE } else { 0 };
        self.memory
            .write_obj(part.address, GuestAddress(self.base + at))
            .expect("rings are in memory");
        self.memory
            .write_obj(part.length, GuestAddress(self.base + at + 8))
            .expect("rings are in memory");
        self.write_u16(at + 12, flags | write);
        self.write_u16(at + 14, next);
    }

    /// Offers a chain of `parts` and returns its head.
    pub fn post(&mut self, parts: &[Part]) -> u16 {
        let head = self.next_descriptor;
        for (count, part) in parts.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let flags = if count + 1 < parts.len() { NEXT } else { 0 };
            self.write_descriptor(index, *part, flags, self.next_descriptor);
        }
        self.offer(head);
        head
    }

    /// Puts `head` on the available ring.
    pub fn offer(&mut self, head: u16) {
        self.write_u16(0x1004 + 2 * u64::from(self.available % self.size), head);
        self.available = self.available.wrapping_add(1);
        self.write_u16(0x1002, self.available);
    }

    /// Asks for an interrupt once the used index passes `value` (`VIRTIO_F_EVENT_IDX`).
    pub fn set_used_event(&self, value: u16) {
        self.write_u16(0x1004 + 2 * u64::from(self.size), value);
    }

    /// Head and length of what the device returned since the last call.
    pub fn used(&mut self) -> Vec<(u16, u32)> {
        let read = |offset| -> u32 {
            self.memory
                .read_obj(GuestAddress(self.base + 0x2000 + offset))
                .expect("rings are in memory")
        };
        let index = (read(0) >> 16) as u16;
        let mut used = Vec::new();
        while self.seen != index {
            let at = 4 + 8 * u64::from(self.seen % self.size);
            used.push((read(at) as u16, read(at + 4)));
            self.seen = self.seen.wrapping_add(1);
        }
        used
    }

    fn queue(&self, event_idx: bool) -> Queue {
        let mut queue = Queue::new(256).expect("256 is a power of two");
        queue.set_size(self.size);
        queue.set_desc_table_address(Some(self.base as u32), None);
        queue.set_avail_ring_address(Some(self.base as u32 + 0x1000), None);
        queue.set_used_ring_address(Some(self.base as u32 + 0x2000), None);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue
    }
}

/// Counts interrupts.
#[derive(Default)]
pub struct Interrupts {
    queues: Mutex<Vec<u16>>,
    config_count: AtomicUsize,
}

impl Interrupts {
    /// The queues that interrupted since the last call.
    pub fn take_queues(&self) -> Vec<u16> {
        std::mem::take(&mut self.queues.lock().expect("nobody panics while it is locked"))
    }

    pub fn config_count(&self) -> usize {
        self.config_count.load(Ordering::SeqCst)
    }
}

impl VirtioInterrupt for Interrupts {
    fn signal_queue(&self, queue_index: u16) {
        self.queues
            .lock()
            .expect("nobody panics while it is locked")
            .push(queue_index);
    }

    fn signal_config(&self) {
        self.config_count.fetch_add(1, Ordering::SeqCst);
    }
}

/// A card, its driver and its network.
pub struct Rig {
    pub net: Net,
    pub rings: Vec<Ring>,
    pub far: Vec<UnixDatagram>,
    pub memory: Arc<GuestMemoryMmap>,
    pub interrupts: Arc<Interrupts>,
    /// The card's own end of pair 0, to break it.
    pub near: UnixDatagram,
    event_loop: Epoll,
}

impl Rig {
    /// A card of `pair_count` pairs before `DRIVER_OK`, with rings of `size`.
    pub fn new(pair_count: u16, size: u16) -> Self {
        let (backend, far) = FakeNet::new(pair_count).expect("descriptors are free");
        Self::over(Box::new(backend), far, size)
    }

    /// A card over `backend`, whose far ends are `far`.
    pub fn over(backend: Box<dyn NetBackend>, far: Vec<UnixDatagram>, size: u16) -> Self {
        let near: OwnedFd = backend
            .readiness(0)
            .try_clone_to_owned()
            .expect("descriptors are free");
        let mac = "52:01:02:03:04:05".parse::<MacAddr>().expect("a unicast address");
        let net = Net::new(mac, backend).expect("descriptors are free");
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]);
        let memory = Arc::new(memory.expect("16 MiB can be mapped"));
        let queue_count = net.queue_sizes_max().len() as u16;
        let ring = |index| Ring::new(memory.clone(), index, size);
        let event_loop = Epoll::new().expect("descriptors are free");
        let watched = net.event_sources()[0].fd;
        event_loop
            .ctl(ControlOperation::Add, watched, EpollEvent::new(EventSet::IN, 0))
            .expect("the card's descriptor can be watched");
        Self {
            rings: (0..queue_count).map(ring).collect(),
            net,
            far,
            memory,
            interrupts: Arc::default(),
            near: near.into(),
            event_loop,
        }
    }

    /// A card whose driver accepted `features` and is ready.
    pub fn ready(pair_count: u16, size: u16, features: u64) -> Self {
        let mut rig = Self::new(pair_count, size);
        rig.activate(features, false)
            .expect("the driver keeps to the rules");
        rig
    }

    pub fn activate(&mut self, features: u64, event_idx: bool) -> Result<(), DeviceFault> {
        let queue = |(index, ring): (u16, &Ring)| {
            DeviceQueue::new(
                index,
                ring.queue(event_idx),
                self.memory.clone(),
                self.interrupts.clone(),
            )
        };
        let activation = Activation {
            driver_features: features & self.net.device_features(),
            queues: (0..).zip(&self.rings).map(queue).collect(),
            interrupt: self.interrupts.clone(),
        };
        self.net.activate(activation)
    }

    /// The driver resets the card and starts afresh with `features`.
    pub fn restart(&mut self, features: u64) {
        self.net.reset();
        self.write(0, &[0; 0x4_0000]);
        for (index, ring) in (0..).zip(&mut self.rings) {
            *ring = Ring::new(self.memory.clone(), index, ring.size);
        }
        self.activate(features, false)
            .expect("the driver keeps to the rules");
    }

    /// Whether the event loop would sleep.
    pub fn is_idle(&self) -> bool {
        let mut events = [EpollEvent::default()];
        self.event_loop.wait(0, &mut events).expect("epoll works") == 0
    }

    /// Runs the event loop until it would sleep.
    pub fn settle(&mut self) -> Result<(), DeviceFault> {
        for _ in 0..1000 {
            if self.is_idle() {
                return Ok(());
            }
            self.net.process_event(0, false)?;
        }
        panic!("the card does not come to rest");
    }

    /// Posts `count` receive buffers of `bytes` each on pair 0, one after the other in memory.
    pub fn post_receive(&mut self, count: u32, bytes: u32) {
        for index in 0..count {
            let address = BUFFERS + u64::from(index * bytes);
            self.rings[0].post(&[writable(address, bytes)]);
        }
    }

    pub fn counter(&self, name: &str) -> u64 {
        self.net.inspect()["counters"][name]
            .as_u64()
            .expect("the counter exists")
    }

    pub fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .expect("the range is in memory");
        bytes
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .expect("the range is in memory");
    }

    /// What the far end of pair 0 received.
    pub fn sent(&self) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        let mut buffer = vec![0; 1 << 17];
        while let Ok(length) = self.far[0].recv(&mut buffer) {
            packets.push(buffer[..length].to_vec());
        }
        packets
    }
}

/// A packet of `length` bytes with its header: a zero header, then a pattern that depends on `seed`.
pub fn packet(length: usize, seed: u8) -> Vec<u8> {
    let byte = |at: usize| {
        if at < 12 {
            0
        } else {
            (at as u8).wrapping_mul(7) ^ seed
        }
    };
    (0..length).map(byte).collect()
}
