//! The console against a driver in guest memory and streams on the host.

mod driver;
mod hostile;
mod streams;

use super::*;
use crate::virtio::device::{DeviceType, VirtioDevice};
use driver::{Guest, MULTIPORT, new_console, port_name};
use serde_json::json;

fn message(id: u8, event: u8, value: u8, name: &str) -> (u8, u8, u8, String) {
    (id, event, value, name.to_owned())
}

#[test]
fn ports_are_announced_named_and_opened() {
    let mut guest = Guest::new(&["console", "agent"], MULTIPORT);
    guest.offer_room(2, 16, 128);
    let _host = guest.ports.connect(&port_name("agent")).expect("the port exists");
    guest.run();
    assert_eq!(guest.messages(), []);
    guest.control(u32::MAX, 0, 1);
    assert_eq!(guest.messages(), [message(0, 1, 1, ""), message(1, 1, 1, "")]);
    guest.control(0, 3, 1);
    assert_eq!(
        guest.messages(),
        [message(0, 4, 1, ""), message(0, 7, 1, "console")]
    );
    guest.control(1, 3, 1);
    assert_eq!(
        guest.messages(),
        [message(1, 7, 1, "agent"), message(1, 6, 1, "")]
    );
    assert_eq!(guest.interrupt_count(2), 3);
}

#[test]
fn messages_wait_for_buffers_and_none_is_lost() {
    let mut guest = Guest::new(&["console", "agent"], MULTIPORT);
    guest.control(u32::MAX, 0, 1);
    guest.control(0, 3, 1);
    guest.control(1, 3, 1);
    assert!(guest.wants_kicks(2), "the driver would not tell of new buffers");
    let mut seen = Vec::new();
    for _ in 0..8 {
        guest.offer_room(2, 1, 128);
        guest.kick(2).expect("the driver is correct");
        seen.extend(guest.messages().into_iter().map(|(id, event, _, _)| (id, event)));
    }
    // A port that is ready need not be announced.
    assert_eq!(seen, [(0, 4), (0, 7), (1, 7)]);
}

#[test]
fn shape_is_that_of_the_specification() {
    let (console, _ports) = new_console(&["console", "agent", "third"]);
    assert_eq!(console.device_type(), DeviceType::Console);
    assert_eq!(console.device_features(), MULTIPORT);
    assert_eq!(console.queue_sizes_max(), [64; 8]);
    let mut config = [0; 16];
    console.config_read(0, &mut config);
    assert_eq!(config[4..8], [3, 0, 0, 0]);
    let mut count = [0xAA; 2];
    console.config_read(4, &mut count);
    assert_eq!(count, [3, 0]);
    for offset in [12, 4096, u64::MAX] {
        let mut beyond = [0xAA; 4];
        console.config_read(offset, &mut beyond);
        assert_eq!(beyond, [0xAA; 4]);
    }
}

#[test]
fn a_console_without_or_with_too_many_or_equal_ports_is_refused() {
    let port = |name: String| PortConfig {
        name: port_name(&name),
        console: false,
    };
    let refused = |names: Vec<String>| {
        let made = Console::new(names.into_iter().map(port).collect());
        made.err().expect("these ports are impossible").to_string()
    };
    assert_eq!(refused(Vec::new()), "a console has 1 to 16 ports, not 0");
    let many = (0..17).map(|index| format!("p{index}")).collect();
    assert_eq!(refused(many), "a console has 1 to 16 ports, not 17");
    let twice = vec!["a".to_owned(), "b".to_owned(), "a".to_owned()];
    assert_eq!(refused(twice), "port name a is used twice");
}

#[test]
fn the_largest_console_serves_its_last_port() {
    let names: Vec<_> = (0..PORTS_MAX).map(|index| format!("p{index}")).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let mut guest = Guest::new(&names, MULTIPORT);
    let mut host = guest.ports.connect(&port_name("p15")).expect("the port exists");
    guest.start(&[15]);
    guest.send(33, b"last");
    let mut bytes = [0; 4];
    std::io::Read::read_exact(&mut host, &mut bytes).expect("the guest sent four");
    assert_eq!(&bytes, b"last");
}

#[test]
fn connecting_a_port_that_does_not_exist_or_no_longer_does_is_refused() {
    let (console, ports) = new_console(&["agent"]);
    let refused = |name: &str| {
        let error = ports.connect(&port_name(name)).err();
        error.expect("nothing to connect to").to_string()
    };
    assert_eq!(refused("agnet"), "the console has no port agnet");
    drop(console);
    assert_eq!(refused("agent"), "the console of port agent is gone");
}

#[test]
fn saved_ports_must_be_the_same_ports() {
    let (console, _ports) = new_console(&["console", "agent"]);
    let saved = console.save().expect("the state encodes");
    let cases = [
        (
            vec!["console"],
            "saved ports is 2 ports: the console has another number of ports",
        ),
        (
            vec!["console", "other"],
            "saved ports is agent: the port in this place has another name",
        ),
    ];
    for (names, message) in cases {
        let (mut other, _ports) = new_console(&names);
        let error = other.restore(&saved).expect_err("other ports");
        assert_eq!(error.to_string(), message);
    }
    let (mut same, _ports) = new_console(&["console", "agent"]);
    same.restore(&saved).expect("the same ports");
    assert!(same.restore(&json!({})).is_err());
}
