//! Random chains, rings and bytes: whatever a driver writes, every chain taken is returned once or the device faults.

use proptest::prelude::*;

use super::mock_driver::{Driver, MEMORY_BYTES, Part, header};
use crate::storage::MemoryDisk;
use crate::virtio::device::VirtioDevice;

/// Addresses that lie inside, at the ends and outside of memory.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (1 << 20)..(2u64 << 20),
        1 => MEMORY_BYTES - 600..MEMORY_BYTES + 600,
        1 => u64::MAX - 600..=u64::MAX,
        1 => any::<u64>(),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        3 => prop::sample::select(vec![0, 1, 15, 16, 17, 20, 512, 513, 1024, 4096]),
        1 => 0u32..70_000,
        1 => any::<u32>(),
    ]
}

/// Mostly readable parts followed by writable ones, as a request has them; sometimes anything.
fn parts() -> impl Strategy<Value = Vec<Part>> {
    let part =
        |writable| (address(), length(), writable).prop_map(|(at, length, write)| Part(at, length, write));
    let ordered = (
        prop::collection::vec(part(Just(false).boxed()), 0..4),
        prop::collection::vec(part(Just(true).boxed()), 0..4),
    );
    prop_oneof![
        3 => ordered.prop_map(|(readable, writable)| [readable, writable].concat()),
        1 => prop::collection::vec(part(any::<bool>().boxed()), 1..8),
    ]
    .prop_filter("a chain has a descriptor", |parts| !parts.is_empty())
}

fn kind() -> impl Strategy<Value = u32> {
    prop_oneof![5 => prop::sample::select(vec![0, 1, 4, 8, 11, 13]), 1 => any::<u32>()]
}

fn sector() -> impl Strategy<Value = u64> {
    prop_oneof![3 => 0u64..70, 1 => any::<u64>()]
}

/// A chain: a good header before its parts, if any.
#[derive(Debug, Clone)]
struct Chain {
    header: Option<(u32, u64)>,
    parts: Vec<Part>,
}

fn chain() -> impl Strategy<Value = Chain> {
    (prop::option::weighted(0.9, (kind(), sector())), parts())
        .prop_map(|(header, parts)| Chain { header, parts })
}

/// Offers the chains, runs them, and checks that nothing is lost or returned twice.
fn check(chains: Vec<Chain>, event_idx: bool) {
    let disk = MemoryDisk::new(64).expect("the host has eventfds");
    let mut driver = Driver::new(disk, 1, event_idx);
    // Random bytes where random buffers lie, so that segments of discards are random as well.
    let noise: Vec<u8> = (0..1u32 << 16)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    driver.place(&noise);
    let mut offered = Vec::new();
    for Chain {
        header: good,
        mut parts,
    } in chains
    {
        if let Some((kind, sector)) = good {
            let at = driver.place(&header(kind, sector));
            parts.insert(0, Part(at, 16, false));
        }
        offered.push(driver.offer(0, &parts));
    }
    let outcome = driver.run(0);
    // After a fault, requests begun before it end without being returned.
    assert_eq!(driver.settle(), Ok(()));
    let returned = driver.used(0);
    let mut heads: Vec<_> = returned.iter().map(|(head, _)| *head).collect();
    heads.sort_unstable();
    let count = heads.len();
    heads.dedup();
    assert_eq!(heads.len(), count, "a chain came back twice");
    assert!(
        heads.iter().all(|head| offered.contains(head)),
        "a chain came back that was never offered"
    );
    if outcome.is_ok() {
        assert_eq!(count, offered.len(), "a chain was lost without a fault");
    }
    assert_eq!(driver.device.in_flight_count(), 0);
}

proptest! {
    #[test]
    fn any_requests_are_returned_or_fault(
        chains in prop::collection::vec(chain(), 1..12),
        event_idx: bool,
    ) {
        check(chains, event_idx);
    }

    #[test]
    fn any_ring_content_is_survived(
        bytes in prop::collection::vec(any::<u8>(), 0x100),
        at in prop::sample::select(vec![0u64, 0x4000, 0x8000]),
        heads in prop::collection::vec(any::<u16>(), 0..300),
    ) {
        let disk = MemoryDisk::new(64).expect("the host has eventfds");
        let mut driver = Driver::new(disk, 1, true);
        driver.scribble(at, &bytes);
        for head in heads {
            driver.offer_head(0, head);
        }
        // Either outcome is right; a panic or a hang is not.
        let _ = driver.run(0);
        let _ = driver.settle();
        prop_assert_eq!(driver.device.in_flight_count(), 0);
    }
}
