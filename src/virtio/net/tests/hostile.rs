//! Drivers that break the rules: each is a named fault, never a panic, and the card rests until its reset.
//!
//! The named cases first, then rings and descriptors of random content.

use proptest::prelude::{Strategy, any, prop, prop_oneof, proptest};

use super::driver::{BUFFERS, FEATURES, MEMORY_BYTES, MRG_RXBUF, Part, Rig, packet, readable, writable};
use crate::virtio::device::VirtioDevice;

#[test]
fn each_malformed_chain_has_its_name() {
    let end = MEMORY_BYTES as u64;
    for (queue_index, parts, reason) in [
        (
            1,
            vec![readable(BUFFERS, 11)],
            "queue 1: a packet of 11 bytes is shorter than the 12-byte header",
        ),
        (
            1,
            vec![readable(BUFFERS, 12), writable(BUFFERS, 64)],
            "queue 1: a descriptor has the wrong direction",
        ),
        (
            0,
            vec![writable(BUFFERS, 64), readable(BUFFERS, 64)],
            "queue 0: a descriptor has the wrong direction",
        ),
        (
            0,
            vec![writable(BUFFERS, 11)],
            "queue 0: a receive buffer of 11 bytes cannot hold the 12-byte header",
        ),
        (
            1,
            vec![readable(end - 8, 64)],
            "queue 1: Guest memory error: invalid guest address 16777216",
        ),
    ] {
        let mut rig = Rig::ready(1, 16, FEATURES);
        rig.rings[queue_index].post(&parts);
        let fault = rig.net.process_queue(queue_index as u16);
        assert_eq!(fault.expect_err("the chain is malformed").to_string(), reason);
    }
}

#[test]
fn a_loop_and_a_cut_chain_are_faults() {
    for next in [0, 16, 0xffff] {
        let mut rig = Rig::ready(1, 16, FEATURES);
        rig.rings[1].write_descriptor(0, readable(BUFFERS, 64), 1, next);
        rig.rings[1].offer(0);
        let fault = rig.net.process_queue(1).expect_err("the chain has no end");
        assert_eq!(
            fault.to_string(),
            "queue 1: descriptor chain is cut off, loops or is empty"
        );
    }
}

#[test]
fn a_faulted_card_rests_until_reset() {
    let mut rig = Rig::ready(1, 16, FEATURES);
    rig.post_receive(1, 2048);
    rig.settle().expect("the driver keeps to the rules so far");
    rig.rings[1].post(&[readable(BUFFERS, 1)]);
    rig.net.process_queue(1).expect_err("the packet is too short");
    rig.far[0].send(&packet(64, 1)).expect("the socket has room");
    assert!(rig.is_idle(), "a faulted card is woken");
    rig.net.process_queue(0).expect("a faulted card does nothing");
    assert!(rig.is_idle());
    assert_eq!(rig.rings[0].used(), []);
    rig.restart(FEATURES);
    rig.post_receive(1, 2048);
    rig.settle().expect("the driver keeps to the rules again");
    assert_eq!(rig.rings[0].used(), [(0, 64)]);
}

/// A descriptor with anything in it, in the neighbourhood of what is allowed.
fn descriptor() -> impl Strategy<Value = (Part, u16, u16)> {
    let end = MEMORY_BYTES as u64;
    let address = prop_oneof![0..end, end - 64..end + 64, any::<u64>()];
    let length = prop_oneof![0..64u32, 0..70_000u32, any::<u32>()];
    let part = (address, length, any::<bool>()).prop_map(|(address, length, writable)| Part {
        address,
        length,
        writable,
    });
    (part, 0..8u16, 0..10u16)
}

proptest! {
    #[test]
    fn no_ring_makes_the_card_panic_or_run_for_ever(
        features in prop_oneof![proptest::prelude::Just(FEATURES), proptest::prelude::Just(FEATURES & !MRG_RXBUF)],
        tables in prop::collection::vec(prop::collection::vec(descriptor(), 8), 5),
        heads in prop::collection::vec((0..5usize, 0..9u16), 0..32),
        jump in any::<Option<(u8, u16)>>(),
    ) {
        let mut rig = Rig::ready(2, 8, features);
        for (ring, table) in rig.rings.iter().zip(&tables) {
            for (index, (part, flags, next)) in (0..).zip(table) {
                ring.write_descriptor(index, *part, *flags, *next);
            }
        }
        for (ring, head) in heads {
            rig.rings[ring].offer(head);
        }
        if let Some((ring, index)) = jump {
            rig.rings[usize::from(ring) % 5].write_u16(0x1002, index);
        }
        for queue_index in [4, 0, 1, 2, 3, 5, 0xffff] {
            let _ = rig.far[0].send(&packet(1500, 1));
            if rig.net.process_queue(queue_index).is_err() {
                assert!(rig.is_idle(), "a faulted card is woken");
            }
        }
        // A fault ends it, too; `settle` panics when there is no end.
        let _ = rig.settle();
    }
}
