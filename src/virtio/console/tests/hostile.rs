//! Drivers that lie, flood or break the rules.

use super::driver::{Guest, MULTIPORT, NEXT, WRITE, port_name};
use crate::virtio::device::VirtioDevice;

#[test]
fn a_flood_of_requests_owes_each_message_once() {
    let mut guest = Guest::new(&["console", "agent"], MULTIPORT);
    for _ in 0..500 {
        guest.control(u32::MAX, 0, 1);
        guest.control(1, 3, 1);
        guest.collect(3);
    }
    guest.offer_room(2, 32, 128);
    guest.kick(2).expect("the driver is correct");
    assert_eq!(
        guest.messages(),
        [super::message(0, 1, 1, ""), super::message(1, 7, 1, "agent")]
    );
}

#[test]
fn one_call_reads_a_bounded_number_of_messages() {
    let mut guest = Guest::new(&["console", "agent"], MULTIPORT);
    (0..64).for_each(|_| guest.offer(3, &[(&[0; 8], 0)]));
    guest.kick(3).expect("the driver is correct");
    assert_eq!(guest.collect(3).len(), 64);
    // It looks again by itself, and finds what was offered meanwhile without a kick.
    guest.offer(3, &[(&[0; 8], 0)]);
    guest.run();
    assert_eq!(guest.collect(3).len(), 1);
}

#[test]
fn impossible_messages_are_returned_and_ignored() {
    let mut guest = Guest::new(&["console", "agent"], MULTIPORT);
    guest.offer_room(2, 32, 128);
    for id in [2, 16, 0x1_0000, u32::MAX] {
        guest.control(id, 3, 1);
        guest.control(id, 6, 1);
    }
    (0..=9).for_each(|event| guest.control(0, event, 0));
    guest.control(0, u16::MAX, 1);
    guest.send(3, &[0; 7]);
    guest.send(3, &[]);
    assert_eq!(guest.collect(3).len(), 8 + 10 + 1 + 2);
    assert_eq!(guest.messages(), []);
    guest.control(0, 3, 1);
    assert_eq!(guest.messages().len(), 2);
}

/// What the device says when the driver offers one chain on `queue_index` and kicks.
fn fault(queue_index: u16, buffers: &[(&[u8], u16)]) -> String {
    let mut guest = Guest::new(&["console", "agent"], MULTIPORT);
    let host = guest.ports.connect(&port_name("agent")).expect("the port exists");
    std::io::Write::write_all(&mut &host, b"input").expect("the socket has room");
    match queue_index {
        // Leaves the device with messages to send and no buffers for them.
        2 => guest.control(1, 3, 1),
        _ => guest.start(&[1]),
    }
    guest.offer(queue_index, buffers);
    let fault = guest.kick(queue_index).expect_err("the driver broke the rules");
    // The device is still until it is reset, whatever happens to it, and does not keep the loop awake.
    guest.run();
    drop(host);
    let _other = guest.ports.connect(&port_name("agent")).expect("the port exists");
    guest.run();
    for queue_index in 0..6 {
        guest.kick(queue_index).expect("nothing is done");
    }
    assert!(!guest.is_readable());
    guest.reset(MULTIPORT);
    guest.start(&[1]);
    assert!(guest.messages().contains(&super::message(1, 6, 1, "")));
    fault.to_string()
}

#[test]
fn broken_chains_are_faults_with_their_reason() {
    let room = [0; 16];
    let cut = "descriptor chain is cut off, loops or is empty";
    let cases = [
        (
            5,
            vec![(&room[..], WRITE)],
            "queue 5: a buffer to transmit is writable",
        ),
        (
            3,
            vec![(&room[..], WRITE)],
            "queue 3: a control message is writable",
        ),
        (
            4,
            vec![(&room[..], 0)],
            "queue 4: a buffer to receive into is not writable",
        ),
        (
            4,
            vec![(&room[..0], WRITE)],
            "queue 4: a chain to receive into is empty",
        ),
        (
            2,
            vec![(&room[..], 0)],
            "queue 2: a buffer for a control message is not writable",
        ),
        (
            2,
            vec![(&room[..8], WRITE)],
            "queue 2: a control message lacks 5 bytes of room",
        ),
        (5, vec![(&room[..], NEXT)], &format!("queue 5: {cut}")),
        (3, vec![(&room[..8], NEXT)], &format!("queue 3: {cut}")),
    ];
    for (queue_index, buffers, message) in cases {
        assert_eq!(fault(queue_index, &buffers), message);
    }
}

#[test]
fn a_buffer_outside_memory_is_a_fault() {
    for queue_index in [3, 5] {
        let mut guest = Guest::new(&["console", "agent"], MULTIPORT);
        let _host = guest.ports.connect(&port_name("agent")).expect("the port exists");
        guest.run();
        guest.offer(queue_index, &[(&[1; 8], 0)]);
        guest.move_buffer(queue_index, u64::MAX - 3);
        let fault = guest.kick(queue_index).expect_err("the buffer is nowhere");
        assert!(
            fault.to_string().starts_with(&format!("queue {queue_index}: ")),
            "{fault}"
        );
    }
}

#[test]
fn a_guest_that_only_sends_does_not_keep_the_loop() {
    let mut guest = Guest::new(&["console", "agent"], MULTIPORT);
    guest.start(&[0, 1]);
    (0..64).for_each(|_| guest.offer(5, &[(&[7; 100], 0)]));
    guest.kick(5).expect("the driver is correct");
    assert_eq!(guest.collect(5).len(), 64);
    assert!(guest.is_readable(), "the device looks again by itself");
    guest.run();
    assert_eq!(guest.console.inspect()["ports"][1]["lost_bytes"], 6400);
}
