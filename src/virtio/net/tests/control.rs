//! The control queue and several queue pairs.
//!
//! Commands go through guest memory as a driver's do, and so do their answers.

use super::driver::{BUFFERS, FEATURES, MQ, Rig, packet, readable, writable};
use crate::virtio::device::{DeviceFault, VirtioDevice};

/// Sends a command through queue `control` and returns the driver's view of the answer.
pub fn command(rig: &mut Rig, control: u16, bytes: &[u8]) -> Result<u8, DeviceFault> {
    rig.write(BUFFERS, bytes);
    rig.write(BUFFERS + 0x100, &[0xee]);
    let (header, data) = (readable(BUFFERS, 2), bytes.len() as u32 - 2);
    let ring = &mut rig.rings[usize::from(control)];
    let head = ring.post(&[header, readable(BUFFERS + 2, data), writable(BUFFERS + 0x100, 1)]);
    rig.net.process_queue(control)?;
    assert_eq!(rig.rings[usize::from(control)].used(), [(head, 1)]);
    Ok(rig.read(BUFFERS + 0x100, 1)[0])
}

#[test]
fn the_number_of_pairs_is_checked_before_it_is_set() {
    let mut rig = Rig::ready(3, 16, FEATURES);
    for (bytes, ack) in [
        (&[4, 0, 2, 0][..], 0),
        (&[4, 0, 0, 0], 1),
        (&[4, 0, 4, 0], 1),
        (&[4, 0, 1, 1], 1),
        (&[4, 0, 1], 1),
        (&[4, 0, 1, 0, 0], 1),
        (&[4, 1, 1, 0], 1),
        (&[0, 0, 1, 0], 1),
    ] {
        assert_eq!(command(&mut rig, 6, bytes), Ok(ack), "{bytes:?}");
        assert_eq!(rig.net.inspect()["active_pair_count"], 2, "{bytes:?}");
        assert_eq!(rig.net.inspect()["backend"]["active_pair_count"], 2);
    }
    assert_eq!(command(&mut rig, 6, &[4, 0, 1, 0]), Ok(0));
    assert_eq!(rig.net.inspect()["backend"]["active_pair_count"], 1);
}

#[test]
fn a_second_pair_works_from_the_command_on_and_not_before() {
    let mut rig = Rig::ready(2, 16, FEATURES);
    rig.rings[2].post(&[writable(BUFFERS + 0x1000, 2048)]);
    rig.rings[3].post(&[readable(BUFFERS + 0x2000, 64)]);
    rig.far[1].send(&packet(64, 1)).expect("the socket has room");
    for queue_index in 0..4 {
        rig.net
            .process_queue(queue_index)
            .expect("the driver keeps to the rules");
    }
    rig.settle().expect("the driver keeps to the rules");
    assert_eq!((rig.rings[2].used(), rig.rings[3].used()), (vec![], vec![]));
    assert_eq!(command(&mut rig, 4, &[4, 0, 2, 0]), Ok(0));
    rig.settle().expect("the driver keeps to the rules");
    assert_eq!(rig.rings[2].used(), [(0, 64)]);
    assert_eq!(rig.rings[3].used(), [(0, 0)]);
    assert_eq!(command(&mut rig, 4, &[4, 0, 1, 0]), Ok(0));
    rig.settle().expect("the driver keeps to the rules");
    rig.far[1].send(&packet(64, 1)).expect("the socket has room");
    assert!(rig.is_idle(), "an unused pair is watched");
}

#[test]
fn without_multi_queue_the_control_queue_is_the_third() {
    let mut rig = Rig::ready(2, 16, FEATURES & !MQ);
    assert_eq!(command(&mut rig, 2, &[4, 0, 1, 0]), Ok(1));
    rig.settle().expect("the driver keeps to the rules");
}

#[test]
fn a_malformed_command_is_a_fault() {
    let cut = "queue 4: a command lacks its header or the place for its answer";
    for (parts, reason) in [
        (vec![readable(BUFFERS, 4)], cut),
        (vec![readable(BUFFERS, 1), writable(BUFFERS, 1)], cut),
        (vec![writable(BUFFERS, 1)], cut),
        (
            vec![readable(BUFFERS, 2), writable(BUFFERS, 1), readable(BUFFERS, 2)],
            "queue 4: a command continues behind the place for its answer",
        ),
    ] {
        let mut rig = Rig::ready(2, 16, FEATURES);
        rig.rings[4].post(&parts);
        let fault = rig.net.process_queue(4).expect_err("the command is malformed");
        assert_eq!(fault.to_string(), reason);
    }
}
