//! The entropy device against a driver's ring.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::Queue;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::device::VirtioInterrupt;

const DATA: u64 = 0x10_0000;
const MEMORY_BYTES: usize = 4 << 20;
const WRITE: u32 = VRING_DESC_F_WRITE;

#[derive(Default)]
struct Interrupts(AtomicUsize);

impl VirtioInterrupt for Interrupts {
    fn signal_queue(&self, queue_index: u16) {
        assert_eq!(queue_index, 0);
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn signal_config(&self) {}
}

struct Fixture {
    rng: Rng,
    memory: Arc<GuestMemoryMmap>,
    interrupts: Arc<Interrupts>,
}

impl Fixture {
    /// A device whose driver offers `chains`, each a list of buffers `(address, length, flags)`.
    fn new(chains: &[(u64, u32, u32)]) -> Self {
        let ranges = [(GuestAddress(0), MEMORY_BYTES)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("memory is free"));
        let mock = MockSplitQueue::create(&*memory, GuestAddress(0x1000), 256);
        let raw: Vec<_> = (1..)
            .zip(chains)
            .map(|(next, (address, length, flags))| Descriptor::new(*address, *length, *flags as u16, next))
            .map(RawDescriptor::from)
            .collect();
        mock.add_desc_chains(&raw, 0).expect("the chains fit");
        let queue: Queue = mock.create_queue().expect("a valid queue");
        let interrupts = Arc::new(Interrupts::default());
        let mut rng = Rng::new().expect("the host has random numbers");
        let queue = DeviceQueue::new(0, queue, memory.clone(), interrupts.clone());
        rng.activate(Activation {
            driver_features: 0,
            queues: vec![queue],
            interrupt: interrupts.clone(),
        })
        .expect("one queue is right");
        Self {
            rng,
            memory,
            interrupts,
        }
    }

    /// The used ring: its index and the length of entry `index`.
    fn used(&self, index: u64) -> (u16, u32) {
        let ring = self.rng.queues[0].queue();
        let address = virtio_queue::QueueT::used_ring(ring);
        let count = self
            .memory
            .read_obj(GuestAddress(address + 2))
            .expect("in memory");
        let length = self.memory.read_obj(GuestAddress(address + 8 + 8 * index));
        (count, length.expect("in memory"))
    }

    fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let read = self.memory.read_slice(&mut bytes, GuestAddress(address));
        read.expect("in memory");
        bytes
    }
}

#[test]
fn fills_every_buffer_of_a_chain_and_nothing_behind() {
    let chain = [
        (DATA, 4096, WRITE | VRING_DESC_F_NEXT),
        (DATA + 0x2000, 100, WRITE),
    ];
    let mut fixture = Fixture::new(&chain);
    fixture.rng.process_queue(0).expect("the driver is correct");
    assert_eq!(fixture.used(0), (1, 4196));
    assert_eq!(fixture.interrupts.0.load(Ordering::SeqCst), 1);
    let (first, second) = (fixture.bytes(DATA, 4096), fixture.bytes(DATA + 0x2000, 200));
    assert!(first.iter().filter(|byte| **byte == 0).count() < 200);
    assert!(second[..100].iter().any(|byte| *byte != 0));
    assert_eq!(second[100..], [0; 100]);
    assert_eq!(fixture.rng.inspect()["filled_bytes"], 4196);
}

#[test]
fn a_huge_chain_is_filled_up_to_the_limit() {
    let mut fixture = Fixture::new(&[(DATA, 1 << 20, WRITE)]);
    fixture.rng.process_queue(0).expect("the driver is correct");
    assert_eq!(fixture.used(0), (1, CHAIN_BYTES_MAX as u32));
    assert_eq!(fixture.bytes(DATA + CHAIN_BYTES_MAX as u64, 64), [0; 64]);
}

#[test]
fn one_call_stops_at_its_limit_and_goes_on_when_called_again() {
    let many = [(DATA, CALL_BYTES_MAX as u32 / 2, WRITE); 5];
    let mut fixture = Fixture::new(&many);
    fixture.rng.process_queue(0).expect("the driver is correct");
    assert_eq!(fixture.used(0).0, 2);
    for (paused, used) in [(false, 4), (true, 4)] {
        assert_eq!(fixture.rng.again.read().expect("work is left"), 1);
        fixture.rng.again.write(1).expect("the counter is empty");
        let done = fixture.rng.process_event(AGAIN_TOKEN, paused);
        done.expect("the driver is correct");
        assert_eq!(fixture.used(0).0, used);
    }
    assert!(
        fixture.rng.again.read().is_err(),
        "a paused device must not keep its descriptor readable"
    );
    fixture.rng.process_queue(0).expect("the driver is correct");
    assert_eq!(fixture.used(0).0, 5);
    assert!(fixture.rng.again.read().is_err(), "nothing is left to do");
}

#[test]
fn a_driver_that_breaks_the_rules_is_told_how() {
    let cases = [
        (
            (DATA, 16, 0),
            "queue 0: a buffer for random bytes is not writable",
        ),
        (
            (1 << 40, 16, WRITE),
            "queue 0: a buffer for random bytes is outside guest memory",
        ),
        (
            (DATA, 16, WRITE | VRING_DESC_F_NEXT),
            "queue 0: descriptor chain is cut off, loops or is empty",
        ),
    ];
    for (chain, message) in cases {
        // The last chain announces a second buffer, and the next descriptor announces itself without end.
        let mut fixture = Fixture::new(&[chain]);
        let endless = Descriptor::new(DATA, 1, (WRITE | VRING_DESC_F_NEXT) as u16, 1);
        let address = GuestAddress(0x1000 + 16);
        fixture
            .memory
            .write_obj(RawDescriptor::from(endless), address)
            .expect("in memory");
        let fault = fixture.rng.process_queue(0).expect_err("the driver is wrong");
        assert_eq!(fault.to_string(), message);
        assert_eq!(fixture.used(0).0, 0);
    }
}

#[test]
fn saved_state_is_empty_and_checked() {
    let mut rng = Rng::new().expect("the host has random numbers");
    let state = rng.save().expect("nothing encodes");
    assert_eq!(state, json!({}));
    rng.restore(&state).expect("just saved");
    let error = rng.restore(&json!({ "seed": 1 })).expect_err("an unknown field");
    assert_eq!(error.to_string(), "the saved state is malformed");
}

#[test]
fn schema_1_reads_and_writes_these_bytes() {
    crate::unit::testing::same_bytes::<RngV1>("{}");
}
