//! What a guest's access costs on this side: the bus, the serial port, and the queues of the small virtio devices.
//! No guest and no KVM take part.

use std::hint::black_box;
use std::io::Read;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;
use virtio_queue::{Queue, QueueT};
use vm_lifecycle::bus::{Bus, BusDevice};
use vm_lifecycle::ids::PortName;
use vm_lifecycle::legacy::serial::Serial;
use vm_lifecycle::machine::fake::FakeVm;
use vm_lifecycle::machine::gsi::GsiTable;
use vm_lifecycle::memory::layout::SERIAL_GSI;
use vm_lifecycle::virtio::console::{Console, PortConfig};
use vm_lifecycle::virtio::device::{Activation, VirtioDevice, VirtioInterrupt};
use vm_lifecycle::virtio::queue_set::DeviceQueue;
use vm_lifecycle::virtio::rng::Rng;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const BUFFER: u64 = 0x4000;
const BUFFER_BYTES: usize = 4096;

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

/// A device with one queue, which offers the same 4 KiB buffer over and over.
struct Driver<D> {
    device: D,
    memory: Arc<GuestMemoryMmap>,
    queue_index: u16,
    offered: u16,
}

impl<D: VirtioDevice> Driver<D> {
    fn new(mut device: D, queue_index: u16, flags: u16) -> Self {
        let ranges = [(GuestAddress(0), 1 << 20)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("memory is free"));
        let mut queue = Queue::new(64).expect("a power of two");
        queue.set_avail_ring_address(Some(AVAIL as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_ready(true);
        let descriptor = (u128::from(flags) << 96) | ((BUFFER_BYTES as u128) << 64) | u128::from(BUFFER);
        let described = memory.write_slice(&descriptor.to_le_bytes(), GuestAddress(0));
        described.expect("in memory");
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
    let mut driver = Driver::new(device, 0, VRING_DESC_F_WRITE as u16);
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

criterion_group!(benches, bus, serial, rng, console);
criterion_main!(benches);
