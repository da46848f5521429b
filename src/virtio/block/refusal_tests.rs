//! What the block device refuses: impossible requests are answered, broken chains need a reset.

use super::mock_driver::{Driver, FEATURES, HeldDisk, MEMORY_BYTES, Part};
use super::tests::{
    DISCARD, FLUSH, IN, IOERR, OK, OUT, SECTORS, UNSUPP, WRITE_ZEROES, driver, memory_disk, read_back,
};
use crate::virtio::device::{DeviceFault, VirtioDevice};

#[test]
fn impossible_requests_are_answered_and_change_nothing() {
    let mut driver = driver();
    let data = driver.place(&[0xAA; 1024]);
    let (out, into) = (Part(data, 512, false), Part(data, 512, true));
    let last = u64::from(SECTORS) - 1;
    assert_eq!(driver.ask(OUT, last, &[out]), (OK, 1), "the last sector exists");
    let cases = [
        (OUT, last, vec![out, out], IOERR),
        (IN, last + 1, vec![into], IOERR),
        (IN, u64::MAX / 512 + 1, vec![into], IOERR),
        (IN, u64::MAX, vec![into], IOERR),
        (IN, 0, vec![Part(data, 511, true)], IOERR),
        (IN, 0, vec![Part(MEMORY_BYTES - 256, 512, true)], IOERR),
        (IN, 0, vec![Part(u64::MAX - 256, 512, true)], IOERR),
        (IN, 0, vec![Part(0, 1 << 31, true)], IOERR),
        (OUT, 0, vec![], OK),
        (99, 0, vec![into], UNSUPP),
        (u32::MAX, 0, vec![], UNSUPP),
    ];
    for (kind, sector, parts, status) in cases {
        let context = format!("type {kind} at {sector} with {parts:?}");
        assert_eq!(driver.ask(kind, sector, &parts), (status, 1), "{context}");
    }
    assert!(read_back(&mut driver, 0, 512).iter().all(|byte| *byte == 0));
}

#[test]
fn a_read_only_disk_is_read_and_never_written() {
    let mut driver = Driver::new(memory_disk().read_only(), 1, false);
    assert_eq!(
        driver.device.device_features() & (1 << 5),
        1 << 5,
        "VIRTIO_BLK_F_RO"
    );
    let data = driver.place(&[0xAA; 512]);
    assert_eq!(driver.ask(OUT, 0, &[Part(data, 512, false)]), (IOERR, 1));
    assert_eq!(driver.ask(FLUSH, 0, &[]), (OK, 1));
    assert!(read_back(&mut driver, 0, 512).iter().all(|byte| *byte == 0));
}

#[test]
fn discards_and_clears_follow_the_rules_of_their_segment() {
    let mut driver = driver();
    let data = driver.place(&[0xAA; 4 * 512]);
    assert_eq!(driver.ask(OUT, 0, &[Part(data, 4 * 512, false)]), (OK, 1));
    let segment = |sector: u64, count: u32, flags: u32| {
        [
            &sector.to_le_bytes()[..],
            &count.to_le_bytes(),
            &flags.to_le_bytes(),
        ]
        .concat()
    };
    let sectors = u64::from(SECTORS);
    let cases = [
        (DISCARD, segment(1, 1, 0), OK),
        (DISCARD, segment(1, 1, 1), UNSUPP),
        (DISCARD, segment(sectors - 1, 2, 0), IOERR),
        (DISCARD, segment(u64::MAX, 1, 0), IOERR),
        (DISCARD, segment(0, 0, 0), IOERR),
        (DISCARD, segment(0, u32::MAX, 0), IOERR),
        (WRITE_ZEROES, segment(2, 1, 1), OK),
        (WRITE_ZEROES, segment(3, 1, 0), OK),
        (WRITE_ZEROES, segment(3, 1, 2), UNSUPP),
        (WRITE_ZEROES, segment(sectors, 1, 0), IOERR),
        (WRITE_ZEROES, segment(0, 1, 0)[..15].to_vec(), IOERR),
        (WRITE_ZEROES, [segment(0, 1, 0), segment(0, 1, 0)].concat(), IOERR),
    ];
    for (kind, segment, status) in cases {
        let at = driver.place(&segment);
        let split = [Part(at, 3, false), Part(at + 3, segment.len() as u32 - 3, false)];
        assert_eq!(
            driver.ask(kind, 0, &split),
            (status, 1),
            "type {kind}: {segment:?}"
        );
    }
    let content = read_back(&mut driver, 0, 4 * 512);
    let cleared: Vec<_> = content
        .chunks(512)
        .map(|sector| sector.iter().all(|byte| *byte == 0))
        .collect();
    assert_eq!(cleared, [false, true, true, true]);
}

#[test]
fn a_chain_that_is_no_request_needs_a_reset_and_says_why() {
    let at = 1 << 20;
    let cases = [
        (
            vec![Part(at, 16, false)],
            "queue 0: request has no writable byte for its status",
        ),
        (
            vec![Part(at, 15, false), Part(at, 1, true)],
            "queue 0: request header has 15 readable bytes of 16",
        ),
        (
            vec![Part(at, 16, true), Part(at, 1, true)],
            "queue 0: request header has 0 readable bytes of 16",
        ),
        (
            vec![Part(at, 16, false), Part(at, 1, true), Part(at, 1, false)],
            "queue 0: request has a readable descriptor after a writable one",
        ),
        (
            vec![Part(MEMORY_BYTES - 8, 16, false), Part(at, 1, true)],
            "queue 0: request header at 0x7ffff8 is not in guest memory",
        ),
        (
            vec![Part(at, 16, false), Part(MEMORY_BYTES, 1, true)],
            "queue 0: request status at 0x800000 is not in guest memory",
        ),
    ];
    for (parts, reason) in cases {
        let mut driver = driver();
        driver.offer(0, &parts);
        let fault = driver.run(0).expect_err("the chain is malformed");
        assert_eq!(fault.to_string(), reason);
        assert_eq!(driver.used_index(0), 0);
        // Until the reset, nothing is done any more; after it, all is well.
        driver.offer(0, &parts);
        assert_eq!(driver.run(0), Ok(()));
        driver.device.reset();
        driver.activate(FEATURES);
        read_back(&mut driver, 0, 512);
    }
}

#[test]
fn chains_that_loop_or_are_too_long_need_a_reset() {
    const NEXT: u8 = 1;
    const INDIRECT: u8 = 4;
    // Descriptor `address, length, flags, next` as it lies in memory.
    let descriptor = |address: u64, length: u32, flags: u8, next: u16| {
        let [next_low, next_high] = next.to_le_bytes();
        [
            &address.to_le_bytes()[..],
            &length.to_le_bytes(),
            &[flags, 0, next_low, next_high],
        ]
        .concat()
    };
    let mut looping = driver();
    looping.scribble(0, &descriptor(1 << 20, 16, NEXT, 0));
    looping.offer_head(0, 0);
    let fault = looping.run(0).expect_err("the descriptor follows itself");
    assert_eq!(
        fault.to_string(),
        "queue 0: descriptor chain is cut off, loops or is empty"
    );

    let mut long = driver();
    let table: Vec<u8> = (1..=257)
        .flat_map(|next| descriptor(1 << 20, 16, if next == 257 { 0 } else { NEXT }, next))
        .collect();
    let at = long.place(&table);
    long.scribble(0, &descriptor(at, table.len() as u32, INDIRECT, 0));
    long.offer_head(0, 0);
    let fault = long
        .run(0)
        .expect_err("an indirect table may not be longer than the ring");
    assert_eq!(
        fault.to_string(),
        "queue 0: request has 257 descriptors, the limit is 256"
    );
}

#[test]
fn a_driver_cannot_have_more_in_flight_than_its_ring_holds() {
    let (disk, hand) = HeldDisk::new(1000);
    let mut driver = Driver::with_queue_size(disk, 1, false, 8);
    let sent = driver.request(0, FLUSH, 0, &[]);
    for _ in 1..8 {
        driver.offer_head(0, sent.head_index);
    }
    assert_eq!(driver.device.process_queue(0), Ok(()));
    assert_eq!(hand.held_count(), 8);
    driver.offer_head(0, sent.head_index);
    let fault = driver
        .device
        .process_queue(0)
        .expect_err("there are no more descriptors");
    assert_eq!(
        fault.to_string(),
        "queue 0: the driver offers more chains than the ring holds"
    );
    assert!(matches!(fault, DeviceFault::Queue { queue_index: 0, .. }));
    // What was in flight completes into the void.
    for _ in 0..8 {
        hand.release(None);
    }
    driver.settle().expect("nothing is answered");
    assert_eq!(driver.used_index(0), 0);
}
