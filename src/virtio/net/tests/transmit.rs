//! Packets from the guest: gathering, a full backend, turns.
//!
//! The far end of the socket is asked for what arrived, not the card's counters alone.

use super::driver::{BUFFERS, FEATURES, Rig, packet, readable};
use crate::virtio::device::VirtioDevice;

#[test]
fn a_packet_is_gathered_from_its_descriptors() {
    let mut rig = Rig::ready(1, 16, FEATURES);
    let bytes = packet(300, 1);
    rig.write(BUFFERS, &bytes[..12]);
    rig.write(BUFFERS + 0x1000, &bytes[12..100]);
    rig.write(BUFFERS + 0x2000, &bytes[100..]);
    let head = rig.rings[1].post(&[
        readable(BUFFERS, 12),
        readable(BUFFERS + 0x1000, 88),
        readable(BUFFERS + 0x2000, 200),
    ]);
    rig.net.process_queue(1).expect("the driver keeps to the rules");
    assert_eq!(rig.sent(), [bytes]);
    assert_eq!(rig.rings[1].used(), [(head, 0)]);
    assert_eq!(rig.interrupts.take_queues(), [1]);
    assert_eq!((rig.counter("tx_packets"), rig.counter("tx_bytes")), (1, 288));
}

#[test]
fn a_full_backend_keeps_packets_in_the_ring_until_it_has_room() {
    let mut rig = Rig::ready(1, 16, FEATURES);
    rig.write(BUFFERS, &packet(60_000, 2));
    for _ in 0..8 {
        rig.rings[1].post(&[readable(BUFFERS, 60_000)]);
    }
    rig.net.process_queue(1).expect("the driver keeps to the rules");
    rig.settle().expect("the driver keeps to the rules");
    let sent_count = rig.rings[1].used().len();
    assert!(
        sent_count < 8,
        "the socket took {sent_count} packets of 60,000 bytes"
    );
    assert!(rig.is_idle(), "a full backend wakes the loop");
    let mut received_count = 0;
    while received_count < 8 {
        let received = rig.sent();
        assert!(!received.is_empty(), "only {received_count} packets came");
        assert!(received.iter().all(|bytes| *bytes == packet(60_000, 2)));
        received_count += received.len();
        rig.settle().expect("the driver keeps to the rules");
    }
    assert_eq!((received_count, rig.rings[1].used().len()), (8, 8 - sent_count));
    assert_eq!((rig.counter("tx_errors"), rig.counter("tx_dropped")), (0, 0));
}

#[test]
fn a_flood_is_sent_in_turns_without_another_kick() {
    let mut rig = Rig::ready(1, 256, FEATURES);
    rig.settle().expect("the driver keeps to the rules");
    for _ in 0..100 {
        rig.rings[1].post(&[readable(BUFFERS, 64)]);
    }
    rig.net.process_queue(1).expect("the driver keeps to the rules");
    assert_eq!(rig.rings[1].used().len(), 64);
    rig.settle().expect("the driver keeps to the rules");
    assert_eq!(rig.rings[1].used().len(), 36);
    assert_eq!(rig.sent().len(), 100);
}

#[test]
fn packets_posted_before_the_driver_was_ready_are_sent() {
    let mut rig = Rig::new(1, 16);
    rig.rings[1].post(&[readable(BUFFERS, 64)]);
    rig.activate(FEATURES, false)
        .expect("the driver keeps to the rules");
    rig.settle().expect("the driver keeps to the rules");
    assert_eq!(rig.sent().len(), 1);
}

#[test]
fn a_packet_longer_than_any_is_dropped_and_returned() {
    let mut rig = Rig::ready(1, 16, FEATURES);
    let head = rig.rings[1].post(&[readable(BUFFERS, 1 << 20)]);
    rig.net.process_queue(1).expect("the driver keeps to the rules");
    assert_eq!(rig.rings[1].used(), [(head, 0)]);
    assert_eq!((rig.sent().len(), rig.counter("tx_dropped")), (0, 1));
}
