//! Packets to the guest: mergeable buffers, starvation, pausing, interrupts.
//!
//! `is_idle` stands for the promise that a guest which takes nothing costs nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{BUFFERS, FEATURES, GUEST_TSO4, MRG_RXBUF, Rig, packet, writable};
use crate::virtio::device::VirtioDevice;

#[test]
fn a_packet_fills_one_buffer_and_interrupts_once() {
    let mut rig = Rig::ready(1, 16, FEATURES);
    rig.post_receive(4, 2048);
    rig.far[0].send(&packet(100, 1)).expect("the socket has room");
    rig.settle().expect("the driver keeps to the rules");
    assert_eq!(rig.rings[0].used(), [(0, 100)]);
    let mut expected = packet(100, 1);
    expected[10] = 1;
    assert_eq!(rig.read(BUFFERS, 100), expected);
    assert_eq!(rig.interrupts.take_queues(), [0]);
    assert_eq!((rig.counter("rx_packets"), rig.counter("rx_bytes")), (1, 88));
}

#[test]
fn a_packet_spreads_over_chains_that_split_its_header() {
    let mut rig = Rig::ready(1, 16, FEATURES);
    for index in 0..6 {
        let address = BUFFERS + index * 0x1000;
        rig.rings[0].post(&[writable(address, 11), writable(address + 0x800, 589)]);
    }
    rig.far[0].send(&packet(1526, 2)).expect("the socket has room");
    rig.settle().expect("the driver keeps to the rules");
    assert_eq!(rig.rings[0].used(), [(0, 600), (2, 600), (4, 326)]);
    let mut received = Vec::new();
    for index in 0..3 {
        let address = BUFFERS + index * 0x1000;
        received.extend(rig.read(address, 11));
        received.extend(rig.read(address + 0x800, 589));
    }
    let mut expected = packet(1526, 2);
    expected[10] = 3;
    assert_eq!(received[..1526], expected);
    // The three other chains are the driver's to take back: nothing between turns is only in the device.
    assert_eq!(rig.net.queues()[0].queue().next_avail(), 3);
}

#[test]
fn without_mergeable_buffers_a_packet_fits_its_chain_or_is_dropped() {
    let mut rig = Rig::ready(1, 16, FEATURES & !MRG_RXBUF);
    rig.post_receive(2, 200);
    for length in [201, 200] {
        rig.far[0].send(&packet(length, 3)).expect("the socket has room");
    }
    rig.settle().expect("the driver keeps to the rules");
    assert_eq!(rig.rings[0].used(), [(0, 200)]);
    let mut expected = packet(200, 3);
    expected[10] = 1;
    assert_eq!(rig.read(BUFFERS, 200), expected);
    assert_eq!((rig.counter("rx_dropped"), rig.counter("rx_packets")), (1, 1));
}

#[test]
fn a_guest_without_buffers_costs_nothing_and_loses_nothing() {
    let mut rig = Rig::ready(1, 16, FEATURES);
    rig.settle().expect("the driver keeps to the rules");
    rig.far[0].send(&packet(64, 4)).expect("the socket has room");
    assert!(rig.is_idle(), "a packet nobody can take wakes the loop");
    rig.post_receive(2, 2048);
    rig.net.process_queue(0).expect("the driver keeps to the rules");
    assert_eq!(rig.rings[0].used(), [(0, 64)]);
    rig.far[0].send(&packet(65, 4)).expect("the socket has room");
    rig.settle().expect("the driver keeps to the rules");
    assert_eq!(rig.rings[0].used(), [(1, 65)]);
    rig.far[0].send(&packet(66, 4)).expect("the socket has room");
    rig.settle().expect("the driver keeps to the rules");
    rig.post_receive(1, 2048);
    rig.net.process_queue(0).expect("the driver keeps to the rules");
    assert_eq!(rig.rings[0].used(), [(2, 66)]);
}

#[test]
fn an_unsegmented_packet_waits_until_enough_is_posted() {
    let mut rig = Rig::ready(1, 256, FEATURES | GUEST_TSO4);
    rig.post_receive(2, 32768);
    rig.far[0].send(&packet(60_000, 5)).expect("the socket has room");
    rig.settle().expect("the driver keeps to the rules");
    assert_eq!(rig.rings[0].used(), [], "65,536 bytes do not hold every packet");
    rig.rings[0].post(&[writable(BUFFERS + 65536, 32768)]);
    rig.net.process_queue(0).expect("the driver keeps to the rules");
    assert_eq!(rig.rings[0].used(), [(0, 32768), (1, 27232)]);
    let mut expected = packet(60_000, 5);
    expected[10] = 2;
    assert_eq!(rig.read(BUFFERS, 60_000), expected);
}

#[test]
fn a_driver_that_can_post_no_more_loses_only_what_does_not_fit() {
    let mut rig = Rig::ready(1, 4, FEATURES | GUEST_TSO4);
    rig.post_receive(4, 1000);
    for length in [4001, 4000] {
        rig.far[0].send(&packet(length, 6)).expect("the socket has room");
    }
    rig.settle().expect("the driver keeps to the rules");
    assert_eq!(rig.rings[0].used(), [(0, 1000), (1, 1000), (2, 1000), (3, 1000)]);
    assert_eq!((rig.counter("rx_dropped"), rig.counter("rx_packets")), (1, 1));
}

#[test]
fn a_packet_without_a_header_is_the_backends_error() {
    let mut rig = Rig::ready(1, 16, FEATURES);
    rig.post_receive(1, 2048);
    rig.far[0].send(&[0; 11]).expect("the socket has room");
    rig.settle().expect("the driver keeps to the rules");
    assert_eq!(rig.rings[0].used(), []);
    assert_eq!(rig.counter("rx_errors"), 1);
}

#[test]
fn a_paused_card_moves_nothing_and_sleeps() {
    let mut rig = Rig::ready(1, 16, FEATURES);
    rig.post_receive(2, 2048);
    rig.settle().expect("the driver keeps to the rules");
    rig.far[0].send(&packet(64, 7)).expect("the socket has room");
    assert!(!rig.is_idle());
    rig.net.process_event(0, true).expect("pausing cannot fail");
    assert!(rig.is_idle(), "a paused card is woken again and again");
    assert_eq!(rig.rings[0].used(), []);
    // Resuming is a spurious kick of every queue.
    rig.net.process_queue(0).expect("the driver keeps to the rules");
    rig.net.process_queue(1).expect("the driver keeps to the rules");
    rig.settle().expect("the driver keeps to the rules");
    assert_eq!(rig.rings[0].used(), [(0, 64)]);
}

#[test]
fn a_flood_is_taken_in_turns() {
    let mut rig = Rig::ready(1, 256, FEATURES);
    rig.post_receive(200, 2048);
    rig.settle().expect("the driver keeps to the rules");
    for _ in 0..100 {
        rig.far[0].send(&packet(64, 8)).expect("the socket has room");
    }
    rig.net
        .process_event(0, false)
        .expect("the driver keeps to the rules");
    assert_eq!(rig.rings[0].used().len(), 64);
    rig.settle().expect("the driver keeps to the rules");
    assert_eq!(rig.rings[0].used().len(), 36);
    assert_eq!(rig.interrupts.take_queues(), [0, 0], "one interrupt a turn");
}

#[test]
fn an_event_index_inside_a_spread_packet_interrupts() {
    for (used_event, interrupts) in [(0, vec![0]), (1, vec![0]), (2, vec![0]), (3, vec![])] {
        let mut rig = Rig::new(1, 16);
        rig.activate(FEATURES, true)
            .expect("the driver keeps to the rules");
        rig.rings[0].set_used_event(used_event);
        rig.post_receive(6, 600);
        rig.far[0].send(&packet(1526, 9)).expect("the socket has room");
        rig.settle().expect("the driver keeps to the rules");
        assert_eq!(rig.rings[0].used().len(), 3);
        assert_eq!(
            rig.interrupts.take_queues(),
            interrupts,
            "used_event {used_event}"
        );
    }
}

/// A driver on another vCPU that polls the ring must never see a part of a packet: it would drop it.
#[test]
fn a_spread_packet_appears_whole_to_a_polling_driver() {
    let mut rig = Rig::ready(1, 256, FEATURES);
    let memory = rig.memory.clone();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let poll = move || {
        let mut torn = None;
        while torn.is_none() && !stopped.load(Ordering::SeqCst) {
            let index: u16 = memory
                .load(GuestAddress(0x2002), Ordering::Acquire)
                .expect("the ring is in memory");
            torn = Some(index).filter(|index| index % 3 != 0);
        }
        torn
    };
    let driver = std::thread::spawn(poll);
    for _ in 0..2000 {
        rig.post_receive(3, 600);
        rig.net.process_queue(0).expect("the driver keeps to the rules");
        rig.far[0].send(&packet(1526, 11)).expect("the socket has room");
        rig.settle().expect("the driver keeps to the rules");
        assert_eq!(rig.rings[0].used().len(), 3);
    }
    stop.store(true, Ordering::SeqCst);
    assert_eq!(driver.join().expect("polling cannot fail"), None);
}

#[test]
fn a_driver_that_wants_no_interrupts_gets_none() {
    let mut rig = Rig::ready(1, 16, FEATURES);
    rig.rings[0].write_u16(0x1000, 1);
    rig.post_receive(1, 2048);
    rig.far[0].send(&packet(64, 10)).expect("the socket has room");
    rig.settle().expect("the driver keeps to the rules");
    assert_eq!(rig.rings[0].used(), [(0, 64)]);
    assert!(rig.interrupts.take_queues().is_empty());
}
