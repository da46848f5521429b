//! The balloon against a driver, and a host that keeps books: pages, statistics, limits, saving.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use serde_json::json;

use super::*;
use crate::virtio::device::VirtioDevice;
use crate::virtio::testing::{Driver, MEMORY_BYTES, Part};

pub(super) const MIB: u64 = 1 << 20;
/// 3 GiB below the hole, 1 GiB above it, and a region for plugged memory behind that.
pub(super) const LOW: Range<u64> = 0..3 << 30;
pub(super) const HIGH: Range<u64> = 4 << 30..5 << 30;
pub(super) const PLUGGED: Range<u64> = 5 << 30..6 << 30;
const RAM_BYTES: u64 = 4 << 30;

/// All features of the device but `DEFLATE_ON_OOM`.
pub(super) const FEATURES: u64 = 0b11_1011;
pub(super) const ALL_QUEUES: [u16; 5] = [0, 1, 2, 3, 4];
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATS: u16 = 2;

/// What the host was asked and told.
#[derive(Default)]
pub(super) struct Books {
    pub(super) discarded: Vec<(u64, u64)>,
    changes: Vec<u64>,
    stats: Vec<BalloonStats>,
    pub(super) hinted: Vec<(u64, u64)>,
    pub(super) hinting_done_count: u32,
    pub(super) stuck: bool,
}

#[derive(Default, Clone)]
pub(super) struct Host(Arc<Mutex<Books>>);

impl Host {
    /// What happened since the last call.
    pub(super) fn take(&self) -> Books {
        let mut books = self.0.lock().expect("no panic while locked");
        let stuck = books.stuck;
        std::mem::replace(
            &mut books,
            Books {
                stuck,
                ..Books::default()
            },
        )
    }

    pub(super) fn set_stuck(&self, stuck: bool) {
        self.0.lock().expect("no panic while locked").stuck = stuck;
    }
}

fn check(address: u64, length_bytes: u64) {
    let end = address + length_bytes;
    let inside = [LOW, HIGH, PLUGGED]
        .iter()
        .any(|range| range.start <= address && end <= range.end);
    assert!(
        inside && length_bytes > 0,
        "{address:#x}+{length_bytes:#x} is not in one range"
    );
    assert_eq!((address | length_bytes) % PAGE_BYTES, 0, "whole pages");
}

impl BalloonHost for Host {
    fn discard(&self, address: u64, length_bytes: u64) -> io::Result<()> {
        check(address, length_bytes);
        let mut books = self.0.lock().expect("no panic while locked");
        if books.stuck {
            return Err(io::Error::other("stuck"));
        }
        books.discarded.push((address, length_bytes));
        Ok(())
    }

    fn changed(&self, ballooned_bytes: u64) {
        self.0
            .lock()
            .expect("no panic while locked")
            .changes
            .push(ballooned_bytes);
    }

    fn stats(&self, stats: BalloonStats) {
        self.0.lock().expect("no panic while locked").stats.push(stats);
    }

    fn hinted(&self, address: u64, length_bytes: u64) {
        check(address, length_bytes);
        self.0
            .lock()
            .expect("no panic while locked")
            .hinted
            .push((address, length_bytes));
    }

    fn hinting_done(&self) {
        self.0.lock().expect("no panic while locked").hinting_done_count += 1;
    }
}

pub(super) fn config() -> BalloonConfig {
    BalloonConfig {
        ram: vec![LOW, HIGH],
        plugged: Some(PLUGGED),
        deflate_on_oom: false,
        free_page_reporting: true,
    }
}

fn device(host: &Host) -> Balloon {
    Balloon::new(config(), Arc::new(host.clone())).expect("good memory")
}

pub(super) fn start() -> (Driver<Balloon>, Host) {
    let host = Host::default();
    (Driver::start(device(&host), FEATURES, &ALL_QUEUES), host)
}

pub(super) fn numbers(pages: impl IntoIterator<Item = u64>) -> Vec<u8> {
    let numbers = pages
        .into_iter()
        .map(|page| u32::try_from(page).expect("a page number"));
    numbers.flat_map(u32::to_le_bytes).collect()
}

/// Sends one list of pages and sees it come back.
fn send(driver: &mut Driver<Balloon>, queue: u16, pages: impl IntoIterator<Item = u64>) {
    let list = driver.readable(&numbers(pages));
    driver.run(queue, &[list]).expect("the list is well-formed");
    assert_eq!(driver.used(queue).len(), 1);
    assert_eq!(driver.interrupts.take_queue(queue), 1);
}

fn stat(tag: u16, value: u64) -> Vec<u8> {
    [tag.to_le_bytes().as_slice(), &value.to_le_bytes()].concat()
}

#[test]
fn the_configuration_is_laid_out_as_the_standard_says() {
    let (mut driver, _) = start();
    driver.device.set_target(300 * MIB).expect("less than the RAM");
    driver.device.config_write(4, &77u32.to_le_bytes());
    driver.device.config_write(12, &0xAAAA_AAAAu32.to_le_bytes());
    driver.device.config_write(0, &[0xFF; 4]);
    driver.device.config_write(8, &[0xFF; 4]);
    driver.device.config_write(16, &[0xFF; 4]);
    driver.device.config_write(u64::MAX, &[0xFF; 4]);
    assert_eq!(
        [0, 4, 8, 12].map(|at| driver.config(at, 4)),
        [76_800, 77, 0, 0xAAAA_AAAA]
    );
    let mut data = [0x55; 8];
    driver.device.config_read(14, &mut data);
    assert_eq!(data, [0xAA, 0xAA, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55]);
    assert_eq!(driver.device.device_features(), FEATURES);
    let other = BalloonConfig {
        deflate_on_oom: true,
        free_page_reporting: false,
        ..config()
    };
    let other = Balloon::new(other, Arc::new(Host::default())).expect("good memory");
    assert_eq!(other.device_features(), 0b1_1111);
}

#[test]
fn pages_are_discarded_in_runs_and_come_out_again() {
    let (mut driver, host) = start();
    // As Linux does it: page after page, downwards.
    send(&mut driver, INFLATE, (512..768).rev());
    let books = host.take();
    assert_eq!(books.discarded, [(2 * MIB, MIB)]);
    assert_eq!(books.changes, [MIB]);
    send(&mut driver, INFLATE, [3, 786_431, 1, 2, 1_048_576, 2]);
    let (low_end, page) = (LOW.end - PAGE_BYTES, PAGE_BYTES);
    assert_eq!(
        host.take().discarded,
        [(page, 3 * page), (low_end, page), (HIGH.start, page)]
    );
    assert_eq!(driver.device.ballooned_bytes(), MIB + 5 * PAGE_BYTES);
    send(&mut driver, DEFLATE, (500..768).chain([9_000]));
    let books = host.take();
    assert_eq!((books.discarded, books.changes), (vec![], vec![5 * PAGE_BYTES]));
}

#[test]
fn a_page_given_twice_counts_once_and_the_claim_of_the_driver_not_at_all() {
    let (mut driver, host) = start();
    for _ in 0..3 {
        send(&mut driver, INFLATE, 10..20);
    }
    driver.device.config_write(4, &u32::MAX.to_le_bytes());
    assert_eq!(driver.device.ballooned_bytes(), 10 * PAGE_BYTES);
    let books = host.take();
    assert_eq!(books.changes, [10 * PAGE_BYTES], "told when it changes");
    assert_eq!(
        books.discarded.len(),
        3,
        "the guest may have used the pages in between"
    );
    send(&mut driver, DEFLATE, 0..100);
    send(&mut driver, DEFLATE, 0..100);
    assert_eq!(driver.device.ballooned_bytes(), 0);
}

#[test]
fn pages_that_are_not_start_up_ram_stay_out() {
    let (mut driver, host) = start();
    let outside = [
        LOW.end,
        HIGH.start - PAGE_BYTES,
        HIGH.end,
        PLUGGED.start,
        PLUGGED.end,
    ];
    send(&mut driver, INFLATE, outside.map(|address| address / PAGE_BYTES));
    send(&mut driver, INFLATE, [u64::from(u32::MAX)]);
    let books = host.take();
    assert!(books.discarded.is_empty() && books.changes.is_empty());
    send(
        &mut driver,
        INFLATE,
        [HIGH.end / PAGE_BYTES, HIGH.end / PAGE_BYTES - 1],
    );
    assert_eq!(host.take().discarded, [(HIGH.end - PAGE_BYTES, PAGE_BYTES)]);
    send(&mut driver, DEFLATE, outside.map(|address| address / PAGE_BYTES));
    assert_eq!(driver.device.ballooned_bytes(), PAGE_BYTES);
}

#[test]
fn what_the_host_does_not_take_does_not_count() {
    let (mut driver, host) = start();
    host.set_stuck(true);
    send(&mut driver, INFLATE, 0..100);
    assert_eq!(driver.device.ballooned_bytes(), 0);
    host.set_stuck(false);
    send(&mut driver, INFLATE, 0..100);
    assert_eq!(driver.device.ballooned_bytes(), 100 * PAGE_BYTES);
}

#[test]
fn the_driver_is_told_of_a_new_target_once() {
    let (mut driver, _) = start();
    for _ in 0..2 {
        driver.device.set_target(MIB).expect("less than the RAM");
    }
    assert_eq!(driver.interrupts.take_config(), 1);
    driver.device.set_target(RAM_BYTES).expect("all of the RAM");
    let mut refused = |target| driver.device.set_target(target).expect_err("refused").to_string();
    assert_eq!(
        refused(MIB + 1),
        "target 1048577 bytes is not a multiple of the page size, 4096 bytes"
    );
    let beyond = refused(RAM_BYTES + PAGE_BYTES);
    assert_eq!(
        beyond,
        "target 4294971392 bytes exceeds the start-up ram of 4294967296 bytes"
    );
    refused(1 << 60);
    assert_eq!(driver.device.target_bytes(), RAM_BYTES);
    driver.device.reset();
    driver.device.set_target(0).expect("no driver is no harm");
    assert_eq!(driver.interrupts.take_config(), 1, "of the whole RAM");
}

#[test]
fn a_reset_empties_the_balloon_and_keeps_the_target() {
    let (mut driver, host) = start();
    driver.device.set_target(MIB).expect("less than the RAM");
    send(&mut driver, INFLATE, 0..256);
    driver.device.config_write(4, &256u32.to_le_bytes());
    host.take();
    driver.restart(FEATURES, &ALL_QUEUES);
    assert_eq!(host.take().changes, [0]);
    assert_eq!([0, 4].map(|at| driver.config(at, 4)), [256, 0]);
    assert_eq!(driver.device.ballooned_bytes(), 0);
    driver.restart(FEATURES, &ALL_QUEUES);
    assert!(host.take().changes.is_empty(), "nothing changed");
}

#[test]
fn statistics_come_at_the_start_and_when_asked_for() {
    let (mut driver, host) = start();
    assert!(driver.device.request_stats(), "the driver has statistics");
    driver.settle().expect("its first buffer is to come");
    let first = driver.readable(&stat(4, 1000));
    driver.offer(STATS, &[first]);
    driver.device.process_queue(STATS).expect("well-formed");
    let free = |free_bytes| BalloonStats {
        free_bytes: Some(free_bytes),
        ..BalloonStats::default()
    };
    assert_eq!(host.take().stats, [free(1000)]);
    assert_eq!(driver.used(STATS).len(), 1, "asked for before it came");

    let again = driver.readable(&[stat(4, 2000), stat(99, 7)].concat());
    driver.run(STATS, &[again]).expect("well-formed");
    assert_eq!(host.take().stats, [free(2000)]);
    driver.device.process_queue(STATS).expect("a spurious kick");
    assert!(host.take().stats.is_empty(), "they are no news");
    assert_eq!(driver.used(STATS).len(), 0, "nobody asked");

    driver.interrupts.take_queue(STATS);
    assert!(driver.device.request_stats());
    assert!(driver.event(true).expect("a pause does nothing"));
    assert_eq!(driver.used(STATS).len(), 0, "the rings of a paused device rest");
    driver.device.process_queue(STATS).expect("resumed");
    assert_eq!(driver.used(STATS).len(), 1);
    assert_eq!(driver.interrupts.take_queue(STATS), 1);
    assert_eq!(
        driver.device.stats(),
        Some(free(2000)),
        "the latest until new ones come"
    );
    driver.restart(FEATURES & !(1 << 1), &[0, 1, 2, 3]);
    assert!(!driver.device.request_stats(), "this driver has none");
    assert_eq!(driver.device.stats(), None);
}

#[test]
fn a_call_does_so_much_and_goes_on_when_called_again() {
    let (mut driver, _) = start();
    for chain in 0..20u64 {
        let list = driver.readable(&numbers(chain * 256..(chain + 1) * 256));
        driver.offer(INFLATE, &[list]);
    }
    driver.device.process_queue(INFLATE).expect("well-formed");
    assert_eq!(driver.used(INFLATE).len(), 16);
    assert!(driver.event(true).expect("a pause does nothing"));
    assert!(
        !driver.event(true).expect("nothing happens"),
        "a paused device does not spin"
    );
    driver.device.process_queue(INFLATE).expect("resumed");
    driver.settle().expect("well-formed");
    assert_eq!(driver.used(INFLATE).len(), 4);
    assert_eq!(driver.device.ballooned_bytes(), 20 * MIB);
}

#[test]
fn a_driver_that_breaks_the_rules_is_told_how() {
    let long = PAGES_PER_CHAIN_MAX as u32 * 4;
    let cases: [(u16, Part, &str); 7] = [
        (
            INFLATE,
            part(0, 6, false),
            "queue 0: 6 bytes are no list of page numbers",
        ),
        (
            INFLATE,
            part(0, 8, true),
            "queue 0: a buffer for the device to read is writable",
        ),
        (
            INFLATE,
            part(0, long + 4, false),
            "queue 0: 65540 bytes in one chain, the limit is 65536",
        ),
        (
            DEFLATE,
            part(0, u32::MAX, false),
            "queue 1: 4294967295 bytes in one chain, the limit is 65536",
        ),
        (
            STATS,
            part(0, 4100, false),
            "queue 2: 4100 bytes in one chain, the limit is 4096",
        ),
        (
            3,
            part(0, 3, false),
            "queue 3: a hinting command has 3 of 4 bytes",
        ),
        (
            4,
            part(0, 4096, false),
            "queue 4: a reported range is not writable",
        ),
    ];
    for (queue, part, message) in cases {
        let (mut driver, host) = start();
        let fault = driver.run(queue, &[part]).expect_err(message);
        assert_eq!(fault.to_string(), message);
        assert!(host.take().discarded.is_empty());
    }
    let (mut driver, host) = start();
    driver
        .run(INFLATE, &[part(MEMORY_BYTES - 4, 8, false)])
        .expect_err("it is outside memory");
    let list = driver.readable(&numbers(0..4));
    driver.offer(INFLATE, &[list]);
    driver
        .run(INFLATE, &[part(MEMORY_BYTES, 8, false)])
        .expect_err("it is outside memory");
    assert_eq!(host.take().changes, [4 * PAGE_BYTES], "a fault hides nothing");
}

pub(super) fn part(address: u64, length: u32, writable: bool) -> Part {
    Part {
        address,
        length,
        writable,
    }
}

#[test]
fn what_was_saved_goes_on() {
    let (mut driver, _) = start();
    driver.device.set_target(8 * MIB).expect("less than the RAM");
    send(&mut driver, INFLATE, (32_700..32_800).chain([1_048_576]));
    driver.device.config_write(4, &101u32.to_le_bytes());
    driver.device.start_hinting();
    let buffer = driver.readable(&stat(4, 1000));
    driver.run(STATS, &[buffer]).expect("well-formed");
    let saved = driver.device.save().expect("it can be saved");
    let host = Host::default();
    let mut restored = device(&host);
    restored.restore(&saved).expect("its own save");
    assert_eq!(restored.save().expect("it can be saved"), saved);
    let mut driver = driver.move_to(restored, FEATURES);
    assert_eq!(driver.device.ballooned_bytes(), 101 * PAGE_BYTES);
    assert_eq!([0, 4, 8].map(|at| driver.config(at, 4)), [2048, 101, 2]);
    assert!(host.take().discarded.is_empty(), "the pages are gone already");
    send(&mut driver, DEFLATE, 32_700..32_800);
    assert_eq!(driver.device.ballooned_bytes(), PAGE_BYTES);
    assert!(driver.device.request_stats());
    driver.settle().expect("well-formed");
    assert_eq!(driver.used(STATS).len(), 1, "the buffer was in the ring still");
    assert_eq!(host.take().stats[0].free_bytes, Some(1000));
}

#[test]
fn impossible_saved_states_are_refused() {
    let (mut driver, _) = start();
    send(&mut driver, INFLATE, 0..4);
    let saved = driver.device.save().expect("it can be saved");
    let chunk = saved["pages"][0].clone();
    let with = |number: u64| json!({ "number": number, "words": chunk["words"] });
    for (field, value) in [
        ("ram_bytes", json!(3 << 30)),
        ("target_bytes", json!(RAM_BYTES + PAGE_BYTES)),
        ("target_bytes", json!(1)),
        ("hint_command", json!(2)),
        ("pages", json!([with(0), with(0)])),
        ("pages", json!([with(1), with(0)])),
        ("pages", json!([with(24)])),
        ("pages", json!([with(u64::MAX)])),
        ("pages", json!([{ "number": 0, "words": [1] }])),
        ("unknown", json!(0)),
    ] {
        let mut state = saved.clone();
        state[field] = value.clone();
        let refused = device(&Host::default()).restore(&state);
        assert!(refused.is_err(), "{field} = {value} is accepted");
    }
}

#[test]
fn impossible_memory_is_refused() {
    let page = PAGE_BYTES;
    let cases = [
        (&[(0, page + 1)][..], None),
        (&[(page, page)], None),
        (&[(0, page), (page, 2 * page)], None),
        (&[(4 * page, 8 * page), (0, page)], None),
        (&[(0, (1 << 44) + page)], None),
        (&[(0, 2 * page)], Some(page..3 * page)),
    ];
    for (ram, plugged) in cases {
        let bad = BalloonConfig {
            ram: ram.iter().map(|(start, end)| *start..*end).collect(),
            plugged: plugged.clone(),
            ..config()
        };
        let made = Balloon::new(bad, Arc::new(Host::default()));
        assert!(
            matches!(made, Err(BalloonError::Memory { .. })),
            "{ram:x?} {plugged:x?}"
        );
    }
}
