//! The link, the configuration space, reset, saving and a backend that goes away.
//!
//! What the guest would read from the configuration space is compared, with the interrupts that tell it to.

use std::net::Shutdown;

use serde_json::json;

use super::control::command;
use super::driver::{BUFFERS, FEATURES, MQ, Rig, packet, readable};
use crate::net::fake::FakeNet;
use crate::virtio::device::{DeviceType, VirtioDevice};
use crate::virtio::net::Net;

fn config(rig: &Rig) -> [u8; 10] {
    let mut bytes = [0; 10];
    rig.net.config_read(0, &mut bytes);
    bytes
}

#[test]
fn the_configuration_holds_address_status_and_pairs() {
    let mut rig = Rig::new(3, 16);
    assert_eq!(rig.net.device_type(), DeviceType::Net);
    assert_eq!(rig.net.queue_sizes_max(), [256, 256, 256, 256, 256, 256, 64]);
    assert_eq!(config(&rig), [0x52, 1, 2, 3, 4, 5, 1, 0, 3, 0]);
    rig.net.config_write(0, &[0xff; 10]);
    let mut tail = [0xaa; 4];
    rig.net.config_read(8, &mut tail);
    assert_eq!(tail, [3, 0, 0xaa, 0xaa]);
    for offset in [10, 0xffff_ffff, u64::MAX] {
        rig.net.config_read(offset, &mut tail);
        assert_eq!(tail, [3, 0, 0xaa, 0xaa]);
    }
}

#[test]
fn a_pulled_cable_drops_both_ways_and_is_told() {
    let mut rig = Rig::ready(1, 16, FEATURES);
    rig.post_receive(2, 2048);
    rig.settle().expect("the driver keeps to the rules");
    rig.net.set_link(false);
    rig.net.set_link(false);
    assert_eq!((config(&rig)[6], rig.interrupts.config_count()), (0, 1));
    rig.far[0].send(&packet(64, 1)).expect("the socket has room");
    rig.rings[1].post(&[readable(BUFFERS, 64)]);
    rig.net.process_queue(1).expect("the driver keeps to the rules");
    rig.settle().expect("the driver keeps to the rules");
    assert_eq!((rig.counter("rx_dropped"), rig.counter("tx_dropped")), (1, 1));
    assert_eq!((rig.rings[0].used(), rig.rings[1].used()), (vec![], vec![(0, 0)]));
    rig.net.set_link(true);
    assert_eq!((config(&rig)[6], rig.interrupts.config_count()), (1, 2));
    rig.far[0].send(&packet(65, 1)).expect("the socket has room");
    rig.settle().expect("the driver keeps to the rules");
    assert_eq!(rig.rings[0].used(), [(0, 65)]);
    assert_eq!(rig.sent().len(), 0);
}

#[test]
fn a_card_whose_backend_is_taken_away_answers_its_driver_to_the_end() {
    let mut rig = Rig::ready(2, 16, FEATURES);
    rig.post_receive(2, 2048);
    rig.settle().expect("the driver keeps to the rules");
    drop(rig.net.unplug());
    assert_eq!((config(&rig)[6], rig.interrupts.config_count()), (0, 1));
    assert_eq!(config(&rig)[8], 2, "as many pairs as before");
    assert_eq!(command(&mut rig, 4, &[4, 0, 2, 0]), Ok(0));
    rig.rings[1].post(&[readable(BUFFERS, 64)]);
    rig.net.process_queue(1).expect("the driver keeps to the rules");
    assert_eq!(rig.rings[1].used(), [(0, 0)], "dropped");
    rig.net.reset();
    rig.activate(FEATURES, false).expect("another driver can try it");
    rig.net.set_link(true);
    assert_eq!(config(&rig)[6], 0);
    rig.settle().expect("the driver keeps to the rules");
}

#[test]
fn buffers_posted_while_the_cable_was_out_are_used() {
    let mut rig = Rig::ready(1, 16, FEATURES);
    rig.settle().expect("the driver keeps to the rules");
    rig.net.set_link(false);
    rig.post_receive(1, 2048);
    rig.net.process_queue(0).expect("the driver keeps to the rules");
    rig.settle().expect("the driver keeps to the rules");
    rig.net.set_link(true);
    rig.far[0].send(&packet(64, 2)).expect("the socket has room");
    rig.settle().expect("the driver keeps to the rules");
    assert_eq!(rig.rings[0].used(), [(0, 64)]);
}

#[test]
fn a_lost_backend_is_a_pulled_cable_for_good() {
    let mut rig = Rig::ready(1, 16, FEATURES);
    rig.post_receive(1, 2048);
    rig.settle().expect("the driver keeps to the rules");
    rig.near
        .shutdown(Shutdown::Both)
        .expect("the socket is connected");
    assert!(!rig.is_idle());
    rig.settle().expect("the driver keeps to the rules");
    assert_eq!((config(&rig)[6], rig.interrupts.config_count()), (0, 1));
    assert_eq!(rig.net.inspect()["backend_lost"], json!(true));
    rig.rings[1].post(&[readable(BUFFERS, 64)]);
    rig.net.process_queue(1).expect("the driver keeps to the rules");
    assert_eq!(rig.rings[1].used(), [(0, 0)]);
    rig.net.set_link(true);
    assert_eq!(config(&rig)[6], 0);
}

#[test]
fn reset_gives_the_queues_up_and_stops_watching() {
    let mut rig = Rig::ready(1, 16, FEATURES);
    rig.post_receive(1, 2048);
    rig.settle().expect("the driver keeps to the rules");
    rig.net.reset();
    rig.far[0].send(&packet(64, 3)).expect("the socket has room");
    assert!(rig.is_idle());
    assert!(rig.net.queues().is_empty());
    rig.net.process_queue(0).expect("a kick after reset is spurious");
    assert_eq!(rig.rings[0].used(), []);
}

#[test]
fn the_state_survives_saving_and_a_bad_one_is_refused() {
    let mut rig = Rig::ready(2, 16, FEATURES);
    rig.net.set_link(false);
    let state = rig.net.save().expect("the state encodes");
    assert_eq!(state, json!({ "link_up": false, "active_pair_count": 1 }));

    let mut restored = Rig::new(2, 16);
    let state = json!({ "link_up": false, "active_pair_count": 2 });
    restored.net.restore(&state).expect("the card has two pairs");
    assert_eq!(restored.net.save().expect("the state encodes"), state);
    restored
        .activate(FEATURES, false)
        .expect("the driver keeps to the rules");
    assert_eq!(restored.net.inspect()["backend"]["active_pair_count"], json!(2));
    restored.settle().expect("the driver keeps to the rules");
    assert_eq!(restored.interrupts.config_count(), 1);

    for state in [
        json!({ "link_up": true, "active_pair_count": 3 }),
        json!({ "link_up": true }),
        json!({ "link_up": true, "active_pair_count": 1, "more": 0 }),
        json!(7),
    ] {
        assert!(rig.net.restore(&state).is_err(), "{state} was taken");
    }
}

#[test]
fn a_driver_without_the_restored_pairs_is_refused() {
    let mut rig = Rig::new(2, 16);
    rig.net
        .restore(&json!({ "link_up": true, "active_pair_count": 2 }))
        .expect("the card has two pairs");
    let fault = rig.activate(FEATURES & !MQ, false);
    assert_eq!(
        fault.expect_err("one pair was accepted").to_string(),
        "2 queue pairs are in use, the driver accepted 1"
    );
}

#[test]
fn a_backend_with_no_pairs_makes_no_card() {
    let (backend, _far) = FakeNet::new(0).expect("nothing is needed");
    let mac = "52:01:02:03:04:05".parse().expect("a unicast address");
    let error = Net::new(mac, Box::new(backend)).err().expect("no pair");
    assert_eq!(
        error.to_string(),
        "a network card cannot have 0 queue pairs, the range is 1 to 32"
    );
}

#[test]
fn the_backend_is_told_what_the_driver_accepted() {
    let mut rig = Rig::ready(1, 16, FEATURES | 1 << 7 | 1 << 9);
    let offloads = rig.net.inspect()["backend"]["receive_offloads"].take();
    assert_eq!(
        offloads,
        json!({ "checksum": true, "tso4": true, "tso6": false, "ecn": true })
    );
    rig.net.reset();
    let fault = rig.activate(1 << 7, false).expect_err("GUEST_CSUM is missing");
    assert_eq!(
        fault.to_string(),
        "the driver accepted GUEST_TSO4 without GUEST_CSUM"
    );
}
