//! Bytes in both directions, back-pressure, closing and connecting again.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::driver::{Guest, MULTIPORT, WRITE, new_console, port_name};
use crate::virtio::device::VirtioDevice;

/// The queues of port 1.
const RECEIVE: u16 = 4;
const TRANSMIT: u16 = 5;
const OPEN: u8 = 6;

/// A guest whose `agent` is open at both ends.
fn connected() -> (Guest, UnixStream) {
    let mut guest = Guest::new(&["console", "agent"], MULTIPORT);
    let host = connect(&guest, "agent");
    guest.start(&[0, 1]);
    guest.messages();
    (guest, host)
}

fn connect(guest: &Guest, name: &str) -> UnixStream {
    let host = guest.ports.connect(&port_name(name)).expect("the port exists");
    host.set_nonblocking(true).expect("a socket");
    host
}

/// Everything that has arrived at the host end.
fn arrived(host: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Err(error) = host.read_to_end(&mut bytes) {
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    }
    bytes
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index % 251) as u8).collect()
}

#[test]
fn bytes_reach_the_host_whatever_the_buffers_they_come_in() {
    let (mut guest, mut host) = connected();
    guest.offer(TRANSMIT, &[(b"hel", 0), (b"", 0), (b"lo ", 0), (b"world", 0)]);
    guest.kick(TRANSMIT).expect("the driver is correct");
    guest.send(TRANSMIT, b"");
    assert_eq!(arrived(&mut host), b"hello world");
    assert_eq!(guest.collect(TRANSMIT), [b"", b""]);
    assert_eq!(guest.interrupt_count(TRANSMIT), 2);
    assert_eq!(guest.console.inspect()["ports"][1]["to_host_bytes"], 11);
}

#[test]
fn bytes_reach_the_guest_once_it_has_the_port_open() {
    let mut guest = Guest::new(&["console", "agent"], MULTIPORT);
    let mut host = connect(&guest, "agent");
    guest.start(&[]);
    guest.offer_room(RECEIVE, 4, 16);
    guest.kick(RECEIVE).expect("the driver is correct");
    host.write_all(b"who is there?").expect("the socket has room");
    guest.run();
    assert_eq!(guest.returned_count(RECEIVE), 0);
    guest.control(1, 6, 1);
    guest.run();
    assert_eq!(guest.collect(RECEIVE), [b"who is there?"]);
    assert_eq!(guest.interrupt_count(RECEIVE), 1);
}

#[test]
fn a_full_host_end_stops_the_guest_and_nothing_is_lost() {
    let (mut guest, mut host) = connected();
    let sent = pattern(900_000);
    let mut chunks = sent.chunks(30_000);
    // Thirty chains are far more than a socket holds.
    chunks.by_ref().for_each(|chunk| {
        guest.offer(TRANSMIT, &[(chunk, 0)]);
    });
    guest.kick(TRANSMIT).expect("the driver is correct");
    guest.run();
    let before = guest.returned_count(TRANSMIT);
    assert!(before < 30, "the host end took everything");
    guest.kick(TRANSMIT).expect("the driver is correct");
    assert_eq!(guest.returned_count(TRANSMIT), before);
    let mut received = Vec::new();
    while received.len() < sent.len() {
        let bytes = arrived(&mut host);
        assert!(
            !bytes.is_empty(),
            "the device stopped at {} bytes",
            received.len()
        );
        received.extend(bytes);
        guest.run();
    }
    assert_eq!(received, sent);
    assert_eq!(guest.returned_count(TRANSMIT), 30);
}

#[test]
fn a_full_host_end_of_a_console_loses_output_instead() {
    let mut guest = Guest::new(&["console"], MULTIPORT);
    let mut host = connect(&guest, "console");
    guest.start(&[0]);
    let sent = pattern(900_000);
    sent.chunks(30_000)
        .for_each(|chunk| guest.offer(1, &[(chunk, 0)]));
    guest.kick(1).expect("the driver is correct");
    guest.run();
    assert_eq!(guest.returned_count(1), 30);
    let received = arrived(&mut host);
    let lost = guest.console.inspect()["ports"][0]["lost_bytes"].as_u64();
    assert_eq!(received.len() as u64 + lost.expect("a number"), 900_000);
    assert!(lost > Some(0));
}

#[test]
fn a_guest_without_buffers_stops_the_host_and_nothing_is_lost() {
    let (mut guest, mut host) = connected();
    let sent = pattern(1000);
    assert!(
        !guest.wants_kicks(RECEIVE),
        "buffers are of no use before there is data"
    );
    host.write_all(&sent).expect("the socket has room");
    guest.run();
    assert_eq!(guest.returned_count(RECEIVE), 0);
    assert!(
        guest.wants_kicks(RECEIVE),
        "the driver would not tell of new buffers"
    );
    let mut received = Vec::new();
    while received.len() < sent.len() {
        guest.offer_room(RECEIVE, 3, 100);
        guest.kick(RECEIVE).expect("the driver is correct");
        guest.run();
        let chains = guest.collect(RECEIVE);
        assert!(
            !chains.is_empty(),
            "the device stopped at {} bytes",
            received.len()
        );
        received.extend(chains.concat());
    }
    assert_eq!(received, sent);
}

#[test]
fn what_a_closing_host_end_sent_arrives_before_the_closing() {
    let (mut guest, mut host) = connected();
    host.write_all(b"last words").expect("the socket has room");
    drop(host);
    guest.run();
    assert_eq!(guest.messages(), []);
    guest.offer_room(RECEIVE, 4, 4);
    guest.kick(RECEIVE).expect("the driver is correct");
    guest.run();
    assert_eq!(guest.collect(RECEIVE).concat(), b"last words");
    assert_eq!(guest.messages(), [super::message(1, OPEN, 0, "")]);
    assert!(!guest.is_readable());
    // Nobody listens any more: what the guest sends is swallowed, not kept.
    guest.send(TRANSMIT, b"hello?");
    assert_eq!(guest.returned_count(TRANSMIT), 1);
    assert_eq!(guest.console.inspect()["ports"][1]["lost_bytes"], 6);
}

#[test]
fn a_host_end_that_closes_while_full_lets_the_guest_go_on() {
    let (mut guest, host) = connected();
    pattern(900_000)
        .chunks(30_000)
        .for_each(|chunk| guest.offer(TRANSMIT, &[(chunk, 0)]));
    guest.kick(TRANSMIT).expect("the driver is correct");
    guest.run();
    assert!(guest.returned_count(TRANSMIT) < 30);
    drop(host);
    guest.run();
    assert_eq!(guest.returned_count(TRANSMIT), 30);
    assert_eq!(guest.messages(), [super::message(1, OPEN, 0, "")]);
}

#[test]
fn a_port_that_nobody_has_open_closes_at_once() {
    let mut guest = Guest::new(&["console", "agent"], MULTIPORT);
    let mut host = connect(&guest, "agent");
    guest.start(&[]);
    guest.messages();
    host.write_all(b"for nobody").expect("the socket has room");
    drop(host);
    guest.run();
    assert_eq!(guest.messages(), [super::message(1, OPEN, 0, "")]);
}

#[test]
fn closing_the_port_in_the_guest_frees_a_host_end_that_is_gone() {
    let (mut guest, mut host) = connected();
    host.write_all(b"no buffers for this")
        .expect("the socket has room");
    drop(host);
    guest.run();
    assert_eq!(guest.messages(), []);
    guest.control(1, 6, 0);
    assert_eq!(guest.messages(), [super::message(1, OPEN, 0, "")]);
}

#[test]
fn a_new_host_end_is_seen_after_the_closing_of_the_former_one() {
    let mut guest = Guest::new(&["console", "agent"], MULTIPORT);
    let mut first = connect(&guest, "agent");
    guest.control(u32::MAX, 0, 1);
    guest.control(1, 3, 1);
    guest.offer_room(2, 3, 128);
    guest.kick(2).expect("the driver is correct");
    guest.run();
    let told = guest.messages();
    assert_eq!(told.last(), Some(&super::message(1, OPEN, 1, "")), "{told:?}");
    guest.control(1, 6, 1);
    guest.offer_room(RECEIVE, 8, 64);
    guest.kick(RECEIVE).expect("the driver is correct");
    // No buffer for control messages is left: port 0 took the third.
    let mut second = connect(&guest, "agent");
    second.write_all(b"second").expect("the socket has room");
    guest.run();
    assert_eq!(arrived(&mut first), b"");
    assert_eq!(guest.returned_count(RECEIVE), 0);
    for (open, received) in [(0, 0), (1, 1)] {
        guest.offer_room(2, 1, 128);
        guest.kick(2).expect("the driver is correct");
        guest.run();
        assert_eq!(guest.messages(), [super::message(1, OPEN, open, "")]);
        assert_eq!(guest.returned_count(RECEIVE), received);
    }
    guest.send(TRANSMIT, b"answer");
    assert_eq!(arrived(&mut second), b"answer");
}

#[test]
fn a_paused_device_keeps_still_and_goes_on_when_resumed() {
    let (mut guest, mut host) = connected();
    guest.offer_room(RECEIVE, 4, 64);
    guest.kick(RECEIVE).expect("the driver is correct");
    host.write_all(b"while paused").expect("the socket has room");
    assert!(guest.is_readable());
    guest.console.process_event(0, true).expect("nothing is done");
    assert!(!guest.is_readable());
    let _other = connect(&guest, "console");
    guest.console.process_event(0, true).expect("nothing is done");
    assert!(!guest.is_readable());
    assert_eq!((guest.returned_count(RECEIVE), guest.returned_count(2)), (0, 0));
    for queue_index in 0..6 {
        guest.kick(queue_index).expect("the driver is correct");
    }
    guest.run();
    assert_eq!(guest.collect(RECEIVE), [b"while paused"]);
    assert_eq!(guest.messages(), [super::message(0, OPEN, 1, "")]);
}

/// Lets `host` take what the guest has waiting until it has `expected`.
fn drain(guest: &mut Guest, host: &mut UnixStream, expected: &[u8]) {
    let mut received = Vec::new();
    while received.len() < expected.len() {
        let bytes = arrived(host);
        assert!(
            !bytes.is_empty(),
            "the device stopped at {} bytes",
            received.len()
        );
        received.extend(bytes);
        guest.run();
    }
    assert_eq!(received, expected);
}

#[test]
fn a_host_end_in_the_place_of_a_full_one_begins_with_a_whole_buffer() {
    let (mut guest, mut first) = connected();
    let sent = pattern(900_000);
    sent.chunks(300_000)
        .for_each(|chunk| guest.offer(TRANSMIT, &[(chunk, 0)]));
    guest.kick(TRANSMIT).expect("the driver is correct");
    guest.run();
    let mut second = connect(&guest, "agent");
    guest.run();
    let begun = arrived(&mut first).len().div_ceil(300_000);
    drain(&mut guest, &mut second, &sent[begun * 300_000..]);
    assert_eq!(guest.returned_count(TRANSMIT), 3);
}

#[test]
fn a_host_end_after_a_restore_begins_with_a_whole_buffer() {
    let (mut guest, mut host) = connected();
    let sent = pattern(900_000);
    sent.chunks(300_000)
        .for_each(|chunk| guest.offer(TRANSMIT, &[(chunk, 0)]));
    guest.kick(TRANSMIT).expect("the driver is correct");
    guest.run();
    let state = guest.console.save().expect("the state encodes");
    assert_eq!(state["ports"][1]["partly_sent"], true);
    let (mut console, ports) = new_console(&["console", "agent"]);
    console.restore(&state).expect("just saved");
    guest.move_to(console, ports, MULTIPORT);
    let begun = arrived(&mut host).len().div_ceil(300_000);
    let mut host = connect(&guest, "agent");
    for queue_index in 0..6 {
        guest.kick(queue_index).expect("the driver is correct");
    }
    // The guest hears that its former host end is gone, then of the new one.
    let told = [super::message(1, OPEN, 0, ""), super::message(1, OPEN, 1, "")];
    assert_eq!(guest.messages(), told);
    drain(&mut guest, &mut host, &sent[begun * 300_000..]);
    assert_eq!(guest.returned_count(TRANSMIT), 3);
}

#[test]
fn a_driver_without_multiport_has_its_console_at_once() {
    let mut guest = Guest::new(&["console", "agent"], 0);
    let mut host = connect(&guest, "console");
    guest.offer_room(0, 2, 64);
    host.write_all(b"in").expect("the socket has room");
    guest.run();
    assert_eq!(guest.collect(0), [b"in"]);
    guest.send(1, b"out");
    assert_eq!(arrived(&mut host), b"out");
    assert_eq!(guest.returned_count(2), 0);
    drop(host);
    guest.run();
    let mut host = connect(&guest, "console");
    guest.run();
    guest.send(1, b"again");
    assert_eq!(arrived(&mut host), b"again");
}

#[test]
fn a_host_end_stays_connected_over_a_reset_by_the_driver() {
    let (mut guest, mut host) = connected();
    guest.reset(MULTIPORT);
    host.write_all(b"early").expect("the socket has room");
    guest.run();
    guest.offer_room(RECEIVE, 2, 64);
    guest.start(&[1]);
    let told = guest.messages();
    assert!(told.contains(&super::message(1, OPEN, 1, "")), "{told:?}");
    assert_eq!(guest.collect(RECEIVE), [b"early"]);
}

#[test]
fn a_host_end_that_closed_before_a_reset_is_noticed_after_it() {
    let (mut guest, mut host) = connected();
    host.write_all(b"no buffers for this")
        .expect("the socket has room");
    drop(host);
    guest.run();
    assert_eq!(guest.console.inspect()["ports"][1]["host_connected"], true);
    guest.reset(MULTIPORT);
    guest.start(&[]);
    assert_eq!(guest.console.inspect()["ports"][1]["host_connected"], false);
}

#[test]
fn buffers_are_used_one_read_at_a_time() {
    let (mut guest, mut host) = connected();
    let room = [0; 8];
    guest.offer(RECEIVE, &[(&[], WRITE), (&room, WRITE), (&room, WRITE)]);
    guest.kick(RECEIVE).expect("the driver is correct");
    host.write_all(b"0123456789").expect("the socket has room");
    guest.run();
    guest.offer_room(RECEIVE, 1, 8);
    guest.kick(RECEIVE).expect("the driver is correct");
    guest.run();
    let lengths: Vec<_> = guest.collect(RECEIVE).iter().map(Vec::len).collect();
    assert_eq!(lengths, [8, 2]);
}
