//! The driver's side for tests: rings in guest memory, requests in any framing, and a disk that answers on command.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Block;
use crate::ids::DiskName;
use crate::storage::testing::{guest_memory, wait_readable};
use crate::storage::{DiskBackend, DiskCompletion, DiskFull, DiskProperties, DiskRequest, MemoryDisk};
use crate::virtio::device::{Activation, DeviceFault, VirtioDevice, VirtioInterrupt};
use crate::virtio::queue_set::DeviceQueue;

/// Guest memory of a test.
pub(super) const MEMORY_BYTES: u64 = 8 << 20;
/// Rings lie below this address, one queue every 64 KiB.
const HEAP: u64 = 1 << 20;
const RING_BYTES: u64 = 1 << 16;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;
/// All features, or the driver makes no use of the flush command.
pub(super) const FEATURES: u64 = u64::MAX;

/// A part of a chain: address, length, whether the device writes it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part(pub(super) u64, pub(super) u32, pub(super) bool);

/// A device and its driver.
pub(super) struct Driver {
    pub(super) device: Block,
    pub(super) memory: Arc<GuestMemoryMmap>,
    pub(super) interrupts: Arc<Interrupts>,
    queue_size: u16,
    event_idx: bool,
    heap: u64,
    rings: Vec<Ring>,
}

#[derive(Default, Clone, Copy)]
struct Ring {
    next_descriptor: u16,
    seen_used: u16,
}

/// Counts interrupts.
#[derive(Default)]
pub(super) struct Interrupts(AtomicU32);

impl Interrupts {
    /// The number since the last call.
    pub(super) fn take(&self) -> u32 {
        self.0.swap(0, Ordering::SeqCst)
    }
}

impl VirtioInterrupt for Interrupts {
    fn signal_queue(&self, _queue_index: u16) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn signal_config(&self) {}
}

/// A request in the driver's hands.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sent {
    pub(super) head_index: u16,
    pub(super) status: u64,
}

impl Driver {
    /// A driver of a device with `queue_count` queues on `backend`.
    pub(super) fn new(backend: impl DiskBackend + 'static, queue_count: u16, event_idx: bool) -> Self {
        Self::with_queue_size(backend, queue_count, event_idx, 256)
    }

    pub(super) fn with_queue_size(
        backend: impl DiskBackend + 'static,
        queue_count: u16,
        event_idx: bool,
        queue_size: u16,
    ) -> Self {
        let name = DiskName::new("disk-0").expect("a good name");
        let device = Block::new(&name, Box::new(backend), queue_count).expect("the host has eventfds");
        let mut driver = Self {
            device,
            memory: guest_memory(MEMORY_BYTES as usize),
            interrupts: Arc::default(),
            queue_size,
            event_idx,
            heap: HEAP,
            rings: vec![Ring::default(); usize::from(queue_count)],
        };
        driver.activate(FEATURES);
        driver
    }

    /// Sets every queue up afresh and says `DRIVER_OK`.
    pub(super) fn activate(&mut self, driver_features: u64) {
        let mut queues = Vec::new();
        for index in 0..self.rings.len() as u16 {
            let base = base(index);
            self.memory
                .write_slice(&[0; RING_BYTES as usize], GuestAddress(base))
                .expect("rings are in memory");
            let mut queue = Queue::new(256).expect("a power of two");
            queue.set_size(self.queue_size);
            queue.set_desc_table_address(Some(base as u32), Some(0));
            queue.set_avail_ring_address(Some((base + AVAILABLE) as u32), Some(0));
            queue.set_used_ring_address(Some((base + USED) as u32), Some(0));
            queue.set_event_idx(self.event_idx);
            queue.set_ready(true);
            queues.push(DeviceQueue::new(
                index,
                queue,
                self.memory.clone(),
                self.interrupts.clone(),
            ));
        }
        self.rings.fill(Ring::default());
        let activation = Activation {
            driver_features,
            queues,
            interrupt: self.interrupts.clone(),
        };
        self.device
            .activate(activation)
            .expect("the device accepts any driver");
    }

    /// Takes fresh guest memory holding `bytes`.
    pub(super) fn place(&mut self, bytes: &[u8]) -> u64 {
        let address = self.heap;
        self.heap += (bytes.len() as u64).next_multiple_of(16);
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .expect("the heap has room");
        address
    }

    /// Writes over anything, rings included.
    pub(super) fn scribble(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .expect("in memory");
    }

    pub(super) fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .expect("in memory");
        bytes
    }

    /// Offers a chain of `parts`; does not kick.
    pub(super) fn offer(&mut self, queue_index: u16, parts: &[Part]) -> u16 {
        let ring = &mut self.rings[usize::from(queue_index)];
        let head_index = ring.next_descriptor;
        let mut index = head_index;
        for (number, Part(address, length, writable)) in parts.iter().enumerate() {
            let next = (index + 1) % self.queue_size;
            let mut flags = 0;
            if number + 1 < parts.len() {
                flags |= VRING_DESC_F_NEXT as u16;
            }
            if *writable {
                flags |= VRING_DESC_F_WRITE as u16;
            }
            let descriptor = Descriptor::new(*address, *length, flags, next);
            let at = GuestAddress(base(queue_index) + u64::from(index) * 16);
            self.memory
                .write_obj(descriptor, at)
                .expect("rings are in memory");
            index = next;
        }
        ring.next_descriptor = index;
        self.offer_head(queue_index, head_index);
        head_index
    }

    /// Offers the chain at `head_index` (again).
    pub(super) fn offer_head(&self, queue_index: u16, head_index: u16) {
        offer_head(&self.memory, queue_index, self.queue_size, head_index);
    }

    /// Offers a request with its header, data and status in descriptors of their own.
    pub(super) fn request(&mut self, queue_index: u16, kind: u32, sector: u64, data: &[Part]) -> Sent {
        let header = self.place(&header(kind, sector));
        let status = self.place(&[0xFF]);
        let mut parts = vec![Part(header, 16, false)];
        parts.extend_from_slice(data);
        parts.push(Part(status, 1, true));
        let head_index = self.offer(queue_index, &parts);
        Sent { head_index, status }
    }

    pub(super) fn status(&self, sent: Sent) -> u8 {
        self.bytes(sent.status, 1)[0]
    }

    /// The chains returned since the last call: head and length.
    pub(super) fn used(&mut self, queue_index: u16) -> Vec<(u16, u32)> {
        let used = base(queue_index) + USED;
        let end = word(&self.memory, used + 2);
        let mut chains = Vec::new();
        while self.rings[usize::from(queue_index)].seen_used != end {
            let seen = &mut self.rings[usize::from(queue_index)].seen_used;
            let element = used + 4 + u64::from(*seen % self.queue_size) * 8;
            *seen = seen.wrapping_add(1);
            let [head, length]: [u32; 2] = [element, element + 4]
                .map(|address| self.memory.read_obj(GuestAddress(address)).expect("in memory"));
            chains.push((head as u16, length));
        }
        chains
    }

    pub(super) fn used_index(&self, queue_index: u16) -> u16 {
        word(&self.memory, base(queue_index) + USED + 2)
    }

    /// Whether the device asks for kicks (without event indices).
    pub(super) fn kicks_wanted(&self, queue_index: u16) -> bool {
        word(&self.memory, base(queue_index) + USED) == 0
    }

    /// Asks for an interrupt when the device has returned more than `index` chains (`used_event`).
    pub(super) fn set_used_event(&self, queue_index: u16, index: u16) {
        let after = base(queue_index) + AVAILABLE + 4 + u64::from(self.queue_size) * 2;
        set_word(&self.memory, after, index);
    }

    /// The index after which the device wants a kick (`avail_event`).
    pub(super) fn avail_event(&self, queue_index: u16) -> u16 {
        word(
            &self.memory,
            base(queue_index) + USED + 4 + u64::from(self.queue_size) * 8,
        )
    }

    /// Kicks a queue and waits until nothing is in flight.
    pub(super) fn run(&mut self, queue_index: u16) -> Result<(), DeviceFault> {
        self.device.process_queue(queue_index)?;
        self.settle()
    }

    /// Serves completions until nothing is in flight.
    pub(super) fn settle(&mut self) -> Result<(), DeviceFault> {
        let source = self.device.event_sources()[0];
        while self.device.in_flight_count() > 0 {
            wait_readable(source.fd);
            self.device.process_event(source.token, false)?;
        }
        Ok(())
    }

    /// Sends one request on queue 0 and waits; its status and used length.
    pub(super) fn ask(&mut self, kind: u32, sector: u64, data: &[Part]) -> (u8, u32) {
        let sent = self.request(0, kind, sector, data);
        self.run(0).expect("the request is well-formed");
        let used = self.used(0);
        assert_eq!(used.len(), 1, "one chain comes back");
        assert_eq!(used[0].0, sent.head_index);
        (self.status(sent), used[0].1)
    }
}

pub(super) fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// Where the rings of a queue begin.
fn base(queue_index: u16) -> u64 {
    u64::from(queue_index) * RING_BYTES
}

fn word(memory: &GuestMemoryMmap, address: u64) -> u16 {
    memory
        .load(GuestAddress(address), Ordering::Acquire)
        .expect("in memory")
}

fn set_word(memory: &GuestMemoryMmap, address: u64, value: u16) {
    memory
        .store(value, GuestAddress(address), Ordering::Release)
        .expect("in memory");
}

/// Makes the chain at `head_index` available.
pub(super) fn offer_head(memory: &GuestMemoryMmap, queue_index: u16, queue_size: u16, head_index: u16) {
    let available = base(queue_index) + AVAILABLE;
    let index = word(memory, available + 2);
    set_word(
        memory,
        available + 4 + u64::from(index % queue_size) * 2,
        head_index,
    );
    set_word(memory, available + 2, index.wrapping_add(1));
}

/// A disk that begins requests only when told to, and has room for few.
pub(super) struct HeldDisk {
    held: Arc<Mutex<Held>>,
    fd: RawFd,
    properties: DiskProperties,
}

/// The test's hand on a [`HeldDisk`].
#[derive(Clone)]
pub(super) struct Hand(Arc<Mutex<Held>>);

struct Held {
    disk: MemoryDisk,
    waiting: VecDeque<DiskRequest>,
    failed: Vec<DiskCompletion>,
    completion: EventFd,
    room: usize,
    on_submit: Box<dyn Fn() + Send>,
}

impl HeldDisk {
    pub(super) fn new(room: usize) -> (Self, Hand) {
        let disk = MemoryDisk::new(2048).expect("the host has eventfds");
        let properties = disk.properties();
        let completion = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("the host has eventfds");
        let fd = completion.as_raw_fd();
        let held = Arc::new(Mutex::new(Held {
            disk,
            waiting: VecDeque::new(),
            failed: Vec::new(),
            completion,
            room,
            on_submit: Box::new(|| ()),
        }));
        let hand = Hand(held.clone());
        (Self { held, fd, properties }, hand)
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().expect("no panic while locked")
    }
}

impl Hand {
    /// Lets the oldest request go, to succeed or to fail with `errno`; tells what it was.
    pub(super) fn release(&self, errno: Option<i32>) -> String {
        let mut held = self.0.lock().expect("no panic while locked");
        let request = held.waiting.pop_front().expect("a request is held");
        let text = format!("{:?}", request.operation);
        match errno {
            Some(errno) => held.failed.push(DiskCompletion {
                request,
                result: Err(io::Error::from_raw_os_error(errno)),
            }),
            None => held.disk.submit(request).expect("memory takes everything"),
        }
        held.completion.write(1).expect("the counter is not full");
        text
    }

    /// Does something whenever the device submits a request.
    pub(super) fn on_submit(&self, hook: impl Fn() + Send + 'static) {
        self.0.lock().expect("no panic while locked").on_submit = Box::new(hook);
    }

    pub(super) fn held_count(&self) -> usize {
        self.0.lock().expect("no panic while locked").waiting.len()
    }
}

impl DiskBackend for HeldDisk {
    fn properties(&self) -> DiskProperties {
        self.properties
    }

    fn submit(&mut self, request: DiskRequest) -> Result<(), DiskFull> {
        let mut held = self.lock();
        if held.waiting.len() == held.room {
            return Err(DiskFull(request));
        }
        held.waiting.push_back(request);
        (held.on_submit)();
        Ok(())
    }

    fn start(&mut self) {}

    fn completion_fd(&self) -> RawFd {
        self.fd
    }

    fn drain(&mut self, completions: &mut Vec<DiskCompletion>) {
        let mut held = self.lock();
        let _ = held.completion.read();
        completions.append(&mut held.failed);
        held.disk.drain(completions);
    }

    fn in_flight_count(&self) -> usize {
        let held = self.lock();
        held.waiting.len() + held.failed.len() + held.disk.in_flight_count()
    }

    fn inspect(&self) -> Value {
        json!({ "kind": "held" })
    }
}
