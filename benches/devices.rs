//! What a guest's access costs on this side: the bus, the serial port, and the queues of the virtio devices. No guest
//! and no KVM take part; disk and network are this process's memory and sockets.

use std::hint::black_box;
use std::io::Read;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_lifecycle::bus::{Bus, BusDevice};
use vm_lifecycle::ids::{DiskName, PortName};
use vm_lifecycle::legacy::serial::Serial;
use vm_lifecycle::machine::fake::FakeVm;
use vm_lifecycle::machine::gsi::GsiTable;
use vm_lifecycle::memory::layout::SERIAL_GSI;
use vm_lifecycle::net::fake::FakeNet;
use vm_lifecycle::storage::MemoryDisk;
use vm_lifecycle::virtio::block::Block;
use vm_lifecycle::virtio::console::{Console, PortConfig};
use vm_lifecycle::virtio::device::{Activation, VirtioDevice, VirtioInterrupt};
use vm_lifecycle::virtio::net::Net;
use vm_lifecycle::virtio::queue_set::DeviceQueue;
use vm_lifecycle::virtio::rng::Rng;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const BUFFER: u64 = 0x4000;
const BUFFER_BYTES: usize = 4096;
const HEADER: u64 = 0x8000;
/// The largest packet of a network with the usual MTU, behind its `virtio_net_hdr`.
const PACKET_BYTES: usize = 12 + 1514;

struct Nothing;

impl BusDevice for Nothing {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}
    fn write(&self, _offset: u64, _data: &[u8]) {}
}

impl VirtioInterrupt for Nothing {
    fn signal_queue(&self, queue_index: u16) {
        black_box(queue_index);
    }

    fn signal_config(&self) {}
}

/// A device with one queue, which offers the same chain over and over.
struct Driver<D> {
    device: D,
    memory: Arc<GuestMemoryMmap>,
    queue_index: u16,
    offered: u16,
    /// What the device's own descriptors call for behind a kick.
    after: fn(&mut D),
}

impl<D: VirtioDevice> Driver<D> {
    /// A driver whose chain is one buffer of 4 KiB.
    fn new(device: D, queue_index: u16, flags: u32) -> Self {
        Self::of_chain(device, queue_index, &[(BUFFER, BUFFER_BYTES as u32, flags)])
    }

    /// A driver whose chain has these parts: address, length, flags.
    fn of_chain(mut device: D, queue_index: u16, chain: &[(u64, u32, u32)]) -> Self {
        let ranges = [(GuestAddress(0), 1 << 20)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("memory is free"));
        let mut queue = Queue::new(64).expect("a power of two");
        queue.set_avail_ring_address(Some(AVAIL as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_ready(true);
        for (index, (address, length_bytes, flags)) in (0u16..).zip(chain) {
            let more = usize::from(index) + 1 < chain.len();
            let flags = flags | if more { VRING_DESC_F_NEXT } else { 0 };
            let descriptor = Descriptor::new(*address, *length_bytes, flags as u16, index + 1);
            let described = memory.write_obj(descriptor, GuestAddress(16 * u64::from(index)));
            described.expect("in memory");
        }
        let interrupt = Arc::new(Nothing);
        let queue = DeviceQueue::new(queue_index, queue, memory.clone(), interrupt.clone());
        let activation = Activation {
            driver_features: 0,
            queues: vec![queue],
            interrupt,
        };
        device.activate(activation).expect("the queue is right");
        Self {
            device,
            memory,
            queue_index,
            offered: 0,
            after: |_| (),
        }
    }

    /// Offers the buffer `count` times, kicks once and has every one of them returned.
    fn offer(&mut self, count: u16) {
        self.offered = self.offered.wrapping_add(count);
        let offered = self.memory.write_obj(self.offered, GuestAddress(AVAIL + 2));
        offered.expect("in memory");
        loop {
            self.device
                .process_queue(self.queue_index)
                .expect("the driver is correct");
            (self.after)(&mut self.device);
            let used: u16 = self.memory.read_obj(GuestAddress(USED + 2)).expect("in memory");
            if used == self.offered {
                return;
            }
        }
    }
}

fn bus(criterion: &mut Criterion) {
    let bus = Bus::new();
    let claims: Vec<_> = (0..128)
        .map(|index| bus.claim(0xC000_0000 + index * 0x8_0000, 0x8_0000, Arc::new(Nothing)))
        .map(|claim| claim.expect("the ranges do not overlap"))
        .collect();
    criterion.bench_function("bus/write among 128 ranges", |bencher| {
        bencher.iter(|| bus.write(black_box(0xC000_0000 + 77 * 0x8_0000 + 0x3000), &[1, 0]));
    });
    criterion.bench_function("bus/read that nobody answers", |bencher| {
        bencher.iter(|| bus.read(black_box(0x1000), &mut [0; 4]));
    });
    drop(claims);
}

fn serial(criterion: &mut Criterion) {
    let table = GsiTable::new(Arc::new(FakeVm::default()));
    let line = table.line(SERIAL_GSI).expect("the fake accepts");
    let serial = Serial::new(line, Box::new(std::io::sink()), || ());
    let text = [
        b"The quick brown fox jumps over the lazy dog, and then again.".as_slice(),
        b"\n",
    ]
    .concat();
    let mut group = criterion.benchmark_group("serial");
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("a line, polled as an early console does", |bencher| {
        bencher.iter(|| {
            for byte in &text {
                serial.read(5, &mut [0xFF]);
                serial.write(0, &[*byte]);
            }
        });
    });
    group.finish();
}

fn rng(criterion: &mut Criterion) {
    let device = Rng::new().expect("the host has random numbers");
    let mut driver = Driver::new(device, 0, VRING_DESC_F_WRITE);
    let mut group = criterion.benchmark_group("rng");
    group.throughput(Throughput::Bytes(BUFFER_BYTES as u64));
    group.bench_function("a 4 KiB buffer", |bencher| bencher.iter(|| driver.offer(1)));
    group.finish();
}

fn console(criterion: &mut Criterion) {
    let name = PortName::new("agent").expect("a short name");
    let port = PortConfig {
        name: name.clone(),
        console: false,
    };
    let (device, ports) = Console::new(vec![port]).expect("the host has epoll");
    let mut host = ports.connect(&name).expect("the port exists");
    let mut driver = Driver::new(device, 1, 0);
    driver
        .device
        .process_event(0, false)
        .expect("the driver is correct");
    let mut received = vec![0; 8 * BUFFER_BYTES];
    let mut group = criterion.benchmark_group("console");
    group.throughput(Throughput::Bytes(received.len() as u64));
    group.bench_function("32 KiB from guest to host", |bencher| {
        bencher.iter(|| {
            driver.offer(8);
            host.read_exact(&mut received).expect("the guest sent it");
        });
    });
    group.finish();
}

/// Reads and writes of 4 KiB: header, data, status (virtio 1.2 §5.2.6).
fn block(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("block");
    group.throughput(Throughput::Bytes(8 * BUFFER_BYTES as u64));
    for (kind, name, flags) in [(0u32, "read", VRING_DESC_F_WRITE), (1, "write", 0)] {
        let disk = MemoryDisk::new(2048).expect("the host has eventfds");
        let name_of_disk = DiskName::new("disk").expect("a short name");
        let device = Block::new(&name_of_disk, Box::new(disk), 1).expect("the host has eventfds");
        let chain = [
            (HEADER, 16, 0),
            (BUFFER, BUFFER_BYTES as u32, flags),
            (HEADER + 16, 1, VRING_DESC_F_WRITE),
        ];
        let mut driver = Driver::of_chain(device, 0, &chain);
        let written = driver.memory.write_obj(kind, GuestAddress(HEADER));
        written.expect("in memory");
        driver.after = |device| device.process_event(0, false).expect("the driver is correct");
        group.bench_function(format!("eight {name}s of 4 KiB"), |bencher| {
            bencher.iter(|| driver.offer(8));
        });
    }
    group.finish();
}

/// Packets of 1514 bytes with their header, to a socket and from it.
fn net(criterion: &mut Criterion) {
    let mac = "52:54:00:00:00:01".parse().expect("a good address");
    let mut packet = [0; PACKET_BYTES];
    let mut group = criterion.benchmark_group("net");
    group.throughput(Throughput::Bytes(8 * PACKET_BYTES as u64));
    for (queue_index, name) in [(1, "from guest to host"), (0, "from host to guest")] {
        let (backend, far_ends) = FakeNet::new(1).expect("the host has sockets");
        let device = Net::new(mac, Box::new(backend)).expect("one pair is right");
        let far = far_ends.first().expect("one pair has one far end");
        let to_guest = queue_index == 0;
        let flags = if to_guest { VRING_DESC_F_WRITE } else { 0 };
        let chain = [(BUFFER, PACKET_BYTES as u32, flags)];
        let mut driver = Driver::of_chain(device, queue_index, &chain);
        group.bench_function(format!("eight packets {name}"), |bencher| {
            bencher.iter(|| {
                if to_guest {
                    (0..8).for_each(|_| {
                        assert_eq!(far.send(&packet).expect("the socket has room"), PACKET_BYTES)
                    });
                }
                driver.offer(8);
                if !to_guest {
                    (0..8).for_each(|_| {
                        assert_eq!(far.recv(&mut packet).expect("the guest sent it"), PACKET_BYTES)
                    });
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, bus, serial, rng, console, block, net);
criterion_main!(benches);
