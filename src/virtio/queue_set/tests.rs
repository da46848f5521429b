//! Rings that go away under the device, and chains without measure.

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::*;

const SIZE: u16 = 16;
/// Flags and index are the last bytes of the first region; the entries are in the second.
const BORDER: u64 = 0x1_0000;
const TABLE: u64 = 0x2_0000;
const MEMORY_BYTES: usize = 0x40_0000;

struct Silent;

impl VirtioInterrupt for Silent {
    fn signal_queue(&self, _queue_index: u16) {}

    fn signal_config(&self) {}
}

/// A queue whose available ring lies across the border of two regions, and its memory.
fn queue() -> (DeviceQueue, GuestMemoryAtomic<GuestMemoryMmap>) {
    let ranges = [
        (GuestAddress(0), BORDER as usize),
        (GuestAddress(BORDER), MEMORY_BYTES - BORDER as usize),
    ];
    let memory = GuestMemoryMmap::from_ranges(&ranges).expect("the host has memory for a test");
    let memory = GuestMemoryAtomic::new(memory);
    let mut queue = Queue::new(SIZE).expect("a power of two");
    queue.set_desc_table_address(Some(0x1000), Some(0));
    queue.set_avail_ring_address(Some(BORDER as u32 - 4), Some(0));
    queue.set_used_ring_address(Some(0x3000), Some(0));
    queue.set_ready(true);
    (
        DeviceQueue::new(3, queue, memory.clone(), Arc::new(Silent)),
        memory,
    )
}

fn write<T: vm_memory::ByteValued>(memory: &GuestMemoryAtomic<GuestMemoryMmap>, value: T, address: u64) {
    let written = memory.memory().write_obj(value, GuestAddress(address));
    written.expect("in memory");
}

/// Offers one chain: an indirect table of `count` descriptors of `length_bytes` each.
fn offer(memory: &GuestMemoryAtomic<GuestMemoryMmap>, count: u16, length_bytes: u32) {
    for index in 0..count {
        let flags = if index + 1 < count { VRING_DESC_F_NEXT } else { 0 };
        let descriptor = SplitDescriptor::new(0, length_bytes, flags as u16, index + 1);
        write(memory, descriptor, TABLE + 16 * u64::from(index));
    }
    let table_bytes = u32::from(count) * 16;
    let indirect = SplitDescriptor::new(TABLE, table_bytes, VRING_DESC_F_INDIRECT as u16, 0);
    write(memory, indirect, 0x1000);
    write(memory, 1u16, BORDER - 2);
}

#[test]
fn an_entry_in_memory_that_the_guest_gave_back_is_a_fault_and_not_an_empty_ring() {
    let (mut queue, memory) = queue();
    assert!(queue.pop().expect("the ring is in memory").is_none());
    let (shrunk, _) = memory
        .memory()
        .remove_region(GuestAddress(BORDER), MEMORY_BYTES as u64 - BORDER)
        .expect("the second region is there");
    assert_eq!(shrunk.iter().map(GuestMemoryRegion::len).sum::<u64>(), BORDER);
    memory.lock().expect("not poisoned").replace(shrunk);
    assert!(queue.pop().expect("nothing is offered").is_none());
    write(&memory, 1u16, BORDER - 2);
    let fault = queue.pop().expect_err("the entry is gone").to_string();
    assert_eq!(fault, "queue 3: Guest memory error: invalid guest address 65536");
}

#[test]
fn a_chain_of_a_thousand_descriptors_passes_and_a_longer_one_is_a_fault() {
    for (count, reason) in [
        (1024, None),
        (1025, Some("queue 3: descriptor chain is longer than 1024")),
        (u16::MAX, Some("queue 3: descriptor chain is longer than 1024")),
    ] {
        let (mut queue, memory) = queue();
        offer(&memory, count, 1);
        let chain = queue
            .pop()
            .expect("the ring is in memory")
            .expect("one is offered");
        let outcome = descriptors(chain, 3).map(|parts| parts.len());
        match reason {
            None => assert_eq!(outcome.expect("a legal chain"), usize::from(count)),
            Some(reason) => assert_eq!(outcome.expect_err("too long").to_string(), reason),
        }
    }
}

#[test]
fn a_chain_of_four_gibibytes_is_a_fault() {
    let (mut queue, memory) = queue();
    offer(&memory, 257, 16 << 20);
    let chain = queue
        .pop()
        .expect("the ring is in memory")
        .expect("one is offered");
    let fault = descriptors(chain, 3)
        .expect_err("2^32 bytes and more")
        .to_string();
    assert_eq!(fault, "queue 3: descriptor chain is cut off, loops or is empty");
}
