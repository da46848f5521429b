//! The guest's side of a console: rings in guest memory, filled and emptied as a driver does it.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::ids::PortName;
use crate::virtio::console::{Console, ConsolePorts, PortConfig};
use crate::virtio::device::{Activation, DeviceFault, VirtioDevice, VirtioInterrupt};
use crate::virtio::queue_set::DeviceQueue;

pub(super) const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub(super) const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub(super) const MULTIPORT: u64 = 1 << 1;

const RING_SIZE: u16 = 64;
/// Each queue has this much memory: its rings first, its buffers behind them.
const QUEUE_BYTES: u64 = 0x10_0000;
const AVAIL_OFFSET: u64 = 0x1000;
const USED_OFFSET: u64 = 0x2000;
const DATA_OFFSET: u64 = 0x4000;

/// Interrupts, by queue.
#[derive(Default)]
struct Interrupts(Mutex<Vec<u16>>);

impl VirtioInterrupt for Interrupts {
    fn signal_queue(&self, queue_index: u16) {
        self.0.lock().expect("no panic while locked").push(queue_index);
    }

    fn signal_config(&self) {}
}

/// One queue as the driver sees it.
#[derive(Default, Clone)]
struct Ring {
    offered: u16,
    collected: u16,
    next_buffer: u64,
}

/// A guest with a console.
pub(super) struct Guest {
    pub(super) console: Console,
    pub(super) ports: ConsolePorts,
    pub(super) memory: Arc<GuestMemoryMmap>,
    rings: Vec<Ring>,
    interrupts: Arc<Interrupts>,
    epoll: Epoll,
}

pub(super) fn port_name(name: &str) -> PortName {
    PortName::new(name).expect("a short name")
}

/// `c…` is a console, everything else is not.
pub(super) fn new_console(names: &[&str]) -> (Console, ConsolePorts) {
    let config = |name: &&str| PortConfig {
        name: port_name(name),
        console: name.starts_with('c'),
    };
    Console::new(names.iter().map(config).collect()).expect("the host has epoll")
}

impl Guest {
    /// A guest whose driver has just set `DRIVER_OK`.
    pub(super) fn new(names: &[&str], driver_features: u64) -> Self {
        let queue_count = 2 * names.len() + 2;
        let ranges = [(GuestAddress(0), (QUEUE_BYTES as usize) * queue_count)];
        let memory = GuestMemoryMmap::from_ranges(&ranges).expect("memory is free");
        let (console, ports) = new_console(names);
        let mut guest = Self {
            console,
            ports,
            memory: Arc::new(memory),
            rings: vec![Ring::default(); queue_count],
            interrupts: Arc::default(),
            epoll: Epoll::new().expect("the host has epoll"),
        };
        guest.watch();
        guest.activate(driver_features);
        guest
    }

    /// Puts `console`, freshly restored, in the place of the one that the guest had.
    pub(super) fn move_to(&mut self, console: Console, ports: ConsolePorts, driver_features: u64) {
        let positions: Vec<_> = self
            .console
            .queues()
            .iter()
            .map(|queue| queue.queue().state())
            .collect();
        (self.console, self.ports) = (console, ports);
        self.epoll = Epoll::new().expect("the host has epoll");
        self.watch();
        self.activate_at(driver_features, |queue_index, queue| {
            queue.set_next_avail(positions[queue_index].next_avail);
            queue.set_next_used(positions[queue_index].next_used);
        });
    }

    fn watch(&self) {
        let fd = self.console.event_sources()[0].fd;
        let added = self
            .epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0));
        added.expect("an epoll instance can be watched");
    }

    pub(super) fn activate(&mut self, driver_features: u64) {
        self.activate_at(driver_features, |_, _| ());
    }

    fn activate_at(&mut self, driver_features: u64, place: impl Fn(usize, &mut Queue)) {
        let queue = |queue_index: usize| {
            let base = queue_index as u32 * QUEUE_BYTES as u32;
            let mut queue = Queue::new(RING_SIZE).expect("a power of two");
            queue.set_desc_table_address(Some(base), None);
            queue.set_avail_ring_address(Some(base + AVAIL_OFFSET as u32), None);
            queue.set_used_ring_address(Some(base + USED_OFFSET as u32), None);
            queue.set_ready(true);
            place(queue_index, &mut queue);
            let memory = self.memory.clone();
            DeviceQueue::new(queue_index as u16, queue, memory, self.interrupts.clone())
        };
        let activation = Activation {
            driver_features,
            queues: (0..self.rings.len()).map(queue).collect(),
            interrupt: self.interrupts.clone(),
        };
        self.console.activate(activation).expect("the queues are right");
    }

    /// The driver resets the device and sets it up again, with empty rings.
    pub(super) fn reset(&mut self, driver_features: u64) {
        self.console.reset();
        self.rings.fill(Ring::default());
        for queue in 0..self.rings.len() as u64 {
            for offset in [AVAIL_OFFSET, USED_OFFSET] {
                self.put(queue * QUEUE_BYTES + offset, &[0; 4]);
            }
        }
        self.activate(driver_features);
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        let written = self.memory.write_slice(bytes, GuestAddress(address));
        written.expect("rings and buffers are in memory");
    }

    fn take<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let read = self.memory.read_slice(&mut bytes, GuestAddress(address));
        read.expect("rings and buffers are in memory");
        bytes
    }

    /// Writes one descriptor and returns the address of its buffer.
    fn describe(&mut self, queue_index: u16, descriptor: u16, length: u32, flags: u16, next: u16) -> u64 {
        let base = u64::from(queue_index) * QUEUE_BYTES;
        let ring = &mut self.rings[usize::from(queue_index)];
        if ring.next_buffer + u64::from(length) > QUEUE_BYTES - DATA_OFFSET {
            ring.next_buffer = 0;
        }
        let address = base + DATA_OFFSET + ring.next_buffer;
        ring.next_buffer += u64::from(length);
        let at = base + 16 * u64::from(descriptor);
        self.put(at, &address.to_le_bytes());
        self.put(at + 8, &length.to_le_bytes());
        self.put(at + 12, &flags.to_le_bytes());
        self.put(at + 14, &next.to_le_bytes());
        address
    }

    fn publish(&mut self, queue_index: u16, head: u16) {
        let base = u64::from(queue_index) * QUEUE_BYTES + AVAIL_OFFSET;
        let ring = &mut self.rings[usize::from(queue_index)];
        let slot = u64::from(ring.offered % RING_SIZE);
        ring.offered = ring.offered.wrapping_add(1);
        let offered = ring.offered;
        self.put(base + 4 + 2 * slot, &head.to_le_bytes());
        self.put(base + 2, &offered.to_le_bytes());
    }

    /// Offers a chain of buffers without kicking; a chain begins at the descriptor of the ring's next slot. When the
    /// last buffer is flagged to have a next one, that is the first: the chain is a circle.
    pub(super) fn offer(&mut self, queue_index: u16, buffers: &[(&[u8], u16)]) {
        let head = self.rings[usize::from(queue_index)].offered % RING_SIZE;
        let last = buffers.len() - 1;
        for (index, (bytes, flags)) in buffers.iter().enumerate() {
            let descriptor = (head + index as u16) % RING_SIZE;
            let (flags, next) = if index < last {
                (flags | NEXT, (descriptor + 1) % RING_SIZE)
            } else {
                (*flags, head)
            };
            let address = self.describe(queue_index, descriptor, bytes.len() as u32, flags, next);
            self.put(address, bytes);
        }
        self.publish(queue_index, head);
    }

    /// Moves the buffer of the descriptor that was offered last.
    pub(super) fn move_buffer(&mut self, queue_index: u16, address: u64) {
        let last = self.rings[usize::from(queue_index)].offered.wrapping_sub(1) % RING_SIZE;
        let at = u64::from(queue_index) * QUEUE_BYTES + 16 * u64::from(last);
        self.put(at, &address.to_le_bytes());
    }

    /// Offers `count` empty buffers to receive into, without kicking.
    pub(super) fn offer_room(&mut self, queue_index: u16, count: usize, length: usize) {
        let room = vec![0; length];
        (0..count).for_each(|_| self.offer(queue_index, &[(&room, WRITE)]));
    }

    pub(super) fn kick(&mut self, queue_index: u16) -> Result<(), DeviceFault> {
        self.console.process_queue(queue_index)
    }

    /// Whether the device asked to be told of new chains (`VIRTQ_USED_F_NO_NOTIFY` is clear).
    pub(super) fn wants_kicks(&self, queue_index: u16) -> bool {
        let flags = u64::from(queue_index) * QUEUE_BYTES + USED_OFFSET;
        self.take::<2>(flags) == [0, 0]
    }

    /// Offers `bytes` on a transmit queue and kicks.
    pub(super) fn send(&mut self, queue_index: u16, bytes: &[u8]) {
        self.offer(queue_index, &[(bytes, 0)]);
        self.kick(queue_index).expect("the driver is correct");
    }

    /// Sends a control message.
    pub(super) fn control(&mut self, id: u32, event: u16, value: u16) {
        let [a, b, c, d] = id.to_le_bytes();
        let ([e, f], [g, h]) = (event.to_le_bytes(), value.to_le_bytes());
        self.send(3, &[a, b, c, d, e, f, g, h]);
    }

    /// The number of chains that the device returned and the driver has not collected.
    pub(super) fn returned_count(&self, queue_index: u16) -> u16 {
        let used = u64::from(queue_index) * QUEUE_BYTES + USED_OFFSET;
        let index = u16::from_le_bytes(self.take(used + 2));
        index.wrapping_sub(self.rings[usize::from(queue_index)].collected)
    }

    /// Collects what the device returned: the bytes it wrote, chain by chain.
    pub(super) fn collect(&mut self, queue_index: u16) -> Vec<Vec<u8>> {
        let base = u64::from(queue_index) * QUEUE_BYTES;
        let mut chains = Vec::new();
        for _ in 0..self.returned_count(queue_index) {
            let ring = &mut self.rings[usize::from(queue_index)];
            let entry = base + USED_OFFSET + 4 + 8 * u64::from(ring.collected % RING_SIZE);
            ring.collected = ring.collected.wrapping_add(1);
            let head = u32::from_le_bytes(self.take(entry));
            let length = u32::from_le_bytes(self.take(entry + 4));
            let address = u64::from_le_bytes(self.take(base + 16 * u64::from(head)));
            let mut bytes = vec![0; length as usize];
            let read = self.memory.read_slice(&mut bytes, GuestAddress(address));
            read.expect("buffers are in memory");
            chains.push(bytes);
        }
        chains
    }

    /// Collects the control messages as (id, event, value, name).
    pub(super) fn messages(&mut self) -> Vec<(u8, u8, u8, String)> {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("names are text");
        let chains = self.collect(2);
        let parse = |bytes: &Vec<u8>| (bytes[0], bytes[4], bytes[6], text(&bytes[8..]));
        chains.iter().map(parse).collect()
    }

    /// Whether the device has its loop call it.
    pub(super) fn is_readable(&self) -> bool {
        let mut events = [EpollEvent::default()];
        self.epoll.wait(0, &mut events).expect("the host has epoll") > 0
    }

    /// Calls the device for as long as it wants to be called, which must not be for ever.
    pub(super) fn run(&mut self) {
        for _ in 0..1000 {
            if !self.is_readable() {
                return;
            }
            let done = self.console.process_event(0, false);
            done.expect("the driver is correct");
        }
        panic!("the device descriptor {} stays readable", self.epoll.as_raw_fd());
    }

    /// The driver's side of the start: announces itself, adds every port and opens those of `open`.
    pub(super) fn start(&mut self, open: &[u32]) {
        self.offer_room(2, 32, 128);
        self.control(u32::MAX, 0, 1);
        let port_count = self.rings.len() as u32 / 2 - 1;
        (0..port_count).for_each(|id| self.control(id, 3, 1));
        open.iter().for_each(|id| self.control(*id, 6, 1));
        self.run();
    }

    /// The interrupts of `queue_index` so far.
    pub(super) fn interrupt_count(&self, queue_index: u16) -> usize {
        let interrupts = self.interrupts.0.lock().expect("no panic while locked");
        interrupts.iter().filter(|index| **index == queue_index).count()
    }
}
