//! The block device against a mock driver: requests, framing, full backends, resets, pauses.

use std::io::Write;

use super::mock_driver::{Driver, FEATURES, HeldDisk, Part, header, offer_head};
use crate::storage::testing::wait_readable;
use crate::storage::{MemoryDisk, RawConfig, RawDisk, RawEngine};
use crate::virtio::device::VirtioDevice;

pub(super) const IN: u32 = 0;
pub(super) const OUT: u32 = 1;
pub(super) const FLUSH: u32 = 4;
pub(super) const GET_ID: u32 = 8;
pub(super) const DISCARD: u32 = 11;
pub(super) const WRITE_ZEROES: u32 = 13;
pub(super) const OK: u8 = 0;
pub(super) const IOERR: u8 = 1;
pub(super) const UNSUPP: u8 = 2;
pub(super) const SECTORS: u32 = 2048;

pub(super) fn memory_disk() -> MemoryDisk {
    MemoryDisk::new(SECTORS).expect("the host has eventfds")
}

pub(super) fn driver() -> Driver {
    Driver::new(memory_disk(), 1, false)
}

fn pattern(seed: u8, length: usize) -> Vec<u8> {
    (0..length).map(|index| (index % 253) as u8 ^ seed).collect()
}

/// Reads `length` bytes from `sector` on, which must succeed.
pub(super) fn read_back(driver: &mut Driver, sector: u64, length: u32) -> Vec<u8> {
    let target = driver.place(&vec![0xEE; length as usize]);
    let answer = driver.ask(IN, sector, &[Part(target, length, true)]);
    assert_eq!(answer, (OK, length + 1), "a read tells its data and its status");
    driver.bytes(target, length as usize)
}

#[test]
fn bytes_written_are_read_back_on_every_kind_of_disk() {
    let mut file = tempfile::NamedTempFile::new().expect("the host has a temporary directory");
    file.write_all(&vec![0; 512 * SECTORS as usize]).expect("room");
    let raw = |engine| {
        let path = file.path().to_owned();
        let config = RawConfig {
            path,
            read_only: false,
            engine,
        };
        RawDisk::open(&config).expect("a good image")
    };
    let disks = [None, Some(RawEngine::IoUring), Some(RawEngine::ThreadPool)];
    for (number, engine) in disks.into_iter().enumerate() {
        let mut driver = match engine {
            None => Driver::new(memory_disk(), 1, true),
            Some(engine) => Driver::new(raw(engine), 1, true),
        };
        let data = pattern(number as u8, 5 * 512);
        let source = driver.place(&data);
        let parts = [Part(source, 512, false), Part(source + 512, 4 * 512, false)];
        assert_eq!(driver.ask(OUT, 7, &parts), (OK, 1));
        assert_eq!(driver.ask(FLUSH, 0, &[]), (OK, 1));
        assert!(
            read_back(&mut driver, 7, 5 * 512) == data,
            "disk {number}: other bytes were read"
        );
        assert_eq!(driver.device.inspect()["written_bytes"], 5 * 512);
    }
}

#[test]
fn the_framing_of_a_request_does_not_matter() {
    let mut driver = driver();
    let data = pattern(3, 512);
    // Header and data in one descriptor; and a header in crumbs with an empty descriptor between.
    let together = driver.place(&[&header(OUT, 1)[..], &data].concat());
    let status = driver.place(&[0xFF]);
    driver.offer(0, &[Part(together, 16 + 512, false), Part(status, 1, true)]);
    let crumbs = driver.place(&header(OUT, 2));
    let parts = [
        Part(crumbs, 1, false),
        Part(crumbs + 1, 12, false),
        Part(0, 0, false),
        Part(crumbs + 13, 3, false),
        Part(together + 16, 500, false),
        Part(together + 516, 12, false),
        Part(status, 1, true),
    ];
    driver.offer(0, &parts);
    driver.run(0).expect("both are well-formed");
    assert_eq!(
        driver
            .used(0)
            .iter()
            .map(|(_, length)| *length)
            .collect::<Vec<_>>(),
        [1, 1]
    );
    assert_eq!(driver.bytes(status, 1), [OK]);
    assert!(read_back(&mut driver, 1, 512) == data);
    assert!(read_back(&mut driver, 2, 512) == data);

    // Data and status in one descriptor, then the status alone behind an empty one.
    let target = driver.place(&[0xEE; 513]);
    let head = driver.place(&header(IN, 1));
    driver.offer(0, &[Part(head, 16, false), Part(target, 513, true)]);
    driver.run(0).expect("well-formed");
    assert_eq!(driver.used(0)[0].1, 513);
    let bytes = driver.bytes(target, 513);
    assert!(bytes[..512] == data && bytes[512] == OK);
    driver.offer(
        0,
        &[
            Part(head, 16, false),
            Part(target, 512, true),
            Part(status, 1, true),
            Part(9, 0, true),
        ],
    );
    driver.run(0).expect("well-formed");
    assert_eq!(driver.used(0)[0].1, 513);
}

#[test]
fn the_serial_number_is_the_disk_name() {
    let mut driver = driver();
    let target = driver.place(&[0xEE; 32]);
    assert_eq!(driver.ask(GET_ID, 0, &[Part(target, 20, true)]), (OK, 21));
    assert_eq!(
        driver.bytes(target, 21),
        [b"disk-0".as_slice(), &[0; 14], &[0xEE]].concat()
    );
    assert_eq!(driver.ask(GET_ID, 0, &[Part(target, 19, true)]), (IOERR, 1));
}

#[test]
fn a_full_backend_holds_the_ring_up_and_loses_nothing() {
    let (disk, hand) = HeldDisk::new(2);
    let mut driver = Driver::new(disk, 1, false);
    let target = driver.place(&[0; 512]);
    let sent: Vec<_> = (0..10)
        .map(|sector| driver.request(0, IN, sector, &[Part(target, 512, true)]))
        .collect();
    driver
        .device
        .process_queue(0)
        .expect("the requests are well-formed");
    assert_eq!(hand.held_count(), 2);
    assert!(!driver.kicks_wanted(0), "while the ring waits, kicks are useless");
    let source = driver.device.event_sources()[0];
    let mut returned = Vec::new();
    for sector in 0..10 {
        assert!(
            hand.release(None)
                .contains(&format!("offset_bytes: {}", sector * 512)),
            "in order"
        );
        driver
            .device
            .process_event(source.token, false)
            .expect("the ring is fine");
        returned.extend(driver.used(0).into_iter().map(|(head, _)| head));
    }
    let heads: Vec<_> = sent.iter().map(|sent| sent.head_index).collect();
    assert_eq!(returned, heads);
    assert!(driver.kicks_wanted(0));
}

#[test]
fn after_a_reset_old_completions_reach_nobody() {
    let (disk, hand) = HeldDisk::new(10);
    let mut driver = Driver::new(disk, 1, false);
    let sent = driver.request(0, FLUSH, 0, &[]);
    driver.device.process_queue(0).expect("well-formed");
    driver.device.reset();
    assert_eq!(driver.device.in_flight_count(), 1, "the disk still works on it");
    assert!(driver.device.queues().is_empty());
    driver.activate(FEATURES);
    driver.interrupts.take();
    hand.release(None);
    driver.settle().expect("the old request is nobody's");
    assert_eq!(
        (
            driver.used_index(0),
            driver.status(sent),
            driver.interrupts.take()
        ),
        (0, 0xFF, 0)
    );

    let fresh = driver.request(0, FLUSH, 0, &[]);
    driver.device.process_queue(0).expect("well-formed");
    hand.release(None);
    driver.settle().expect("well-formed");
    assert_eq!((driver.used_index(0), driver.status(fresh)), (1, OK));
}

#[test]
fn a_paused_device_finishes_what_it_began_and_begins_nothing() {
    let (disk, hand) = HeldDisk::new(1);
    let mut driver = Driver::new(disk, 1, false);
    let first = driver.request(0, FLUSH, 0, &[]);
    let second = driver.request(0, FLUSH, 0, &[]);
    driver.device.process_queue(0).expect("well-formed");
    hand.release(None);
    let token = driver.device.event_sources()[0].token;
    driver.device.process_event(token, true).expect("well-formed");
    assert_eq!((driver.status(first), driver.status(second)), (OK, 0xFF));
    assert_eq!((driver.device.in_flight_count(), hand.held_count()), (0, 0));
    // Resuming is a kick.
    driver.device.process_queue(0).expect("well-formed");
    hand.release(None);
    driver.settle().expect("well-formed");
    assert_eq!(driver.status(second), OK);
}

#[test]
fn errors_of_the_host_become_io_errors_and_are_counted() {
    let (disk, hand) = HeldDisk::new(10);
    let mut driver = Driver::new(disk, 1, false);
    let target = driver.place(&[0; 512]);
    let sent = driver.request(0, IN, 0, &[Part(target, 512, true)]);
    driver.device.process_queue(0).expect("well-formed");
    hand.release(Some(libc::EIO));
    driver.settle().expect("an error of the host is no fault");
    assert_eq!(driver.status(sent), IOERR);
    assert_eq!(driver.used(0), [(sent.head_index, 1)]);
    let inspected = driver.device.inspect();
    assert_eq!(
        (&inspected["errors"], &inspected["reads"]),
        (&1.into(), &0.into())
    );
}

#[test]
fn writes_of_a_driver_that_does_not_flush_are_made_durable() {
    let (disk, hand) = HeldDisk::new(10);
    let mut driver = Driver::new(disk, 1, false);
    driver.device.reset();
    driver.activate(FEATURES & !(1 << 9));
    let data = driver.place(&[0xAA; 512]);
    let sent = driver.request(0, OUT, 0, &[Part(data, 512, false)]);
    driver.device.process_queue(0).expect("well-formed");
    assert!(hand.release(None).starts_with("Write"));
    let token = driver.device.event_sources()[0].token;
    driver.device.process_event(token, false).expect("well-formed");
    assert_eq!(driver.status(sent), 0xFF, "written, but not durable yet");
    assert_eq!(hand.release(None), "Flush");
    driver.settle().expect("well-formed");
    assert_eq!(driver.status(sent), OK);
    assert_eq!(driver.used(0), [(sent.head_index, 1)]);
}

#[test]
fn a_full_disk_delays_the_flush_of_a_write_and_does_not_fail_it() {
    let (disk, hand) = HeldDisk::new(2);
    let mut driver = Driver::new(disk, 2, false);
    driver.device.reset();
    driver.activate(FEATURES & !(1 << 9));
    let data = driver.place(&[0xAA; 512]);
    let write = driver.request(0, OUT, 0, &[Part(data, 512, false)]);
    let read = driver.request(0, IN, 8, &[Part(data, 512, true)]);
    driver.device.process_queue(0).expect("well-formed");
    assert!(hand.release(None).starts_with("Write"));
    // Before the device hears of that, another queue takes the room.
    let other = driver.request(1, IN, 16, &[Part(data, 512, true)]);
    driver.device.process_queue(1).expect("well-formed");
    let token = driver.device.event_sources()[0].token;
    let outcome = driver.device.process_event(token, false);
    outcome.expect("a full disk is no fault");
    assert_eq!((driver.status(write), hand.held_count()), (0xFF, 2));
    assert!(driver.device.in_flight_count() > 2, "a pause waits for the flush");
    for kind in ["Read", "Read", "Flush"] {
        assert!(hand.release(None).starts_with(kind));
        driver.device.process_event(token, false).expect("well-formed");
    }
    for sent in [write, read, other] {
        assert_eq!(driver.status(sent), OK);
    }
    assert_eq!(driver.device.in_flight_count(), 0);
}

#[test]
fn each_queue_gets_its_own_chains_back() {
    let mut driver = Driver::new(memory_disk(), 4, false);
    assert_eq!(driver.device.queue_sizes_max(), [256; 4]);
    let sent: Vec<_> = (0..4).map(|queue| driver.request(queue, FLUSH, 0, &[])).collect();
    for queue in [3, 0, 2, 1, 9] {
        driver.device.process_queue(queue).expect("well-formed");
    }
    driver.settle().expect("well-formed");
    for (queue, sent) in (0..4).zip(sent) {
        assert_eq!(
            (driver.used(queue), driver.status(sent)),
            (vec![(sent.head_index, 1)], OK)
        );
    }
}

#[test]
fn interrupts_come_when_the_driver_asked_for_them() {
    let mut driver = Driver::new(memory_disk(), 1, true);
    driver.set_used_event(0, 2);
    driver.ask(FLUSH, 0, &[]);
    driver.ask(FLUSH, 0, &[]);
    assert_eq!(
        driver.interrupts.take(),
        0,
        "the driver wants to sleep over two requests"
    );
    driver.ask(FLUSH, 0, &[]);
    assert_eq!(driver.interrupts.take(), 1);
    assert_eq!(driver.avail_event(0), 3, "the next chain shall be kicked");
}

#[test]
fn a_driver_that_never_stops_does_not_keep_the_loop() {
    let (disk, hand) = HeldDisk::new(1000);
    let mut driver = Driver::with_queue_size(disk, 1, false, 4);
    let sent = driver.request(0, FLUSH, 0, &[]);
    // Whenever the device begins a request, the driver has offered the next one already.
    let memory = driver.memory.clone();
    hand.on_submit(move || offer_head(&memory, 0, 4, sent.head_index));
    driver.device.process_queue(0).expect("well-formed");
    assert_eq!(hand.held_count(), 4, "one call serves one ring");
    for _ in 0..4 {
        hand.release(None);
    }
    let [completion, again] = driver.device.event_sources()[..] else {
        panic!("two sources");
    };
    driver
        .device
        .process_event(completion.token, true)
        .expect("well-formed");
    assert_eq!((driver.used_index(0), hand.held_count()), (4, 0));
    wait_readable(again.fd);
    driver
        .device
        .process_event(again.token, false)
        .expect("well-formed");
    assert_eq!(hand.held_count(), 4, "the next turn of the loop goes on");
}

#[test]
fn a_saved_device_is_restored_on_the_same_disk_only() {
    let driver = driver();
    let state = driver.device.save().expect("it can be expressed");
    let expected = serde_json::json!({
        "capacity_bytes": 1_048_576, "logical_block_bytes": 512, "read_only": false, "queue_count": 1,
    });
    assert_eq!(state, expected);
    let mut same = self::driver();
    same.device.restore(&state).expect("the same disk");
    let mut smaller = Driver::new(MemoryDisk::new(SECTORS - 1).expect("room"), 1, false);
    let error = smaller.device.restore(&state).expect_err("another disk");
    assert_eq!(
        error.to_string(),
        "saved capacity_bytes is 1048576: the disk is another one now"
    );
    let error = same.device.restore(&serde_json::json!({ "capacity_bytes": -1 }));
    assert_eq!(
        error.expect_err("malformed").to_string(),
        "the saved state is malformed"
    );
}
