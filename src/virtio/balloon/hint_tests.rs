//! The balloon's queues for free pages, which leave the pages with the guest: reporting and hinting.

use std::sync::Arc;

use super::tests::{ALL_QUEUES, FEATURES, HIGH, Host, LOW, MIB, PLUGGED, config, numbers, part, start};
use super::*;
use crate::virtio::device::VirtioDevice;
use crate::virtio::testing::{Driver, Part};

const HINTING: u16 = 3;
const REPORTING: u16 = 4;
const PAGE_POISON: u64 = 1 << 4;

fn free(address: u64, length: u64) -> Part {
    part(address, u32::try_from(length).expect("a range fits"), true)
}

#[test]
fn reported_pages_go_back_to_the_host_and_do_not_count() {
    let (mut driver, host) = start();
    let ranges = [
        free(4 * MIB, 4 * MIB),
        free(PLUGGED.start, 2 * MIB),
        // Only whole pages, and only those there are.
        free(MIB + 1, 8192),
        free(MIB + 1, 4096),
        free(LOW.end - MIB, 1 << 31),
        free(HIGH.end - MIB, 2 * MIB),
        free(PLUGGED.end, MIB),
        free(u64::MAX - 4096, 8192),
    ];
    driver
        .run(REPORTING, &ranges)
        .expect("the ranges are well-formed");
    assert_eq!(driver.used(REPORTING).len(), 1);
    let expected = [
        (4 * MIB, 4 * MIB),
        (PLUGGED.start, 2 * MIB),
        (MIB + 4096, 4096),
        (LOW.end - MIB, MIB),
        (HIGH.start, (1 << 30) - MIB),
        (HIGH.end - MIB, MIB),
        (PLUGGED.start, MIB),
    ];
    assert_eq!(host.take().discarded, expected);
    assert_eq!(driver.device.ballooned_bytes(), 0);
    host.set_stuck(true);
    driver
        .run(REPORTING, &[free(0, MIB)])
        .expect("a host that refuses is no fault of the driver");
    assert_eq!(driver.used(REPORTING).len(), 1);
}

#[test]
fn free_pages_that_are_filled_with_something_keep_it() {
    let (mut driver, host) = start();
    driver.device.config_write(12, &0xAAAA_AAAAu32.to_le_bytes());
    driver.run(REPORTING, &[free(0, MIB)]).expect("well-formed");
    assert_eq!(host.take().discarded, []);
    assert_eq!(driver.used(REPORTING).len(), 1, "they are free all the same");
    // Filled with zeros, or with nothing in particular: the host's zeros will do.
    driver.device.config_write(12, &[0; 4]);
    driver.run(REPORTING, &[free(0, MIB)]).expect("well-formed");
    driver.restart(FEATURES & !PAGE_POISON, &ALL_QUEUES);
    driver.device.config_write(12, &[0xAA; 4]);
    driver.run(REPORTING, &[free(0, MIB)]).expect("well-formed");
    assert_eq!(host.take().discarded, [(0, MIB); 2]);
}

#[test]
fn queues_are_found_whichever_way_the_driver_numbers_them() {
    let hinting = 1 << 3;
    for (features, reporting_index) in [(FEATURES & !hinting, 3), (FEATURES & !hinting, 4), (FEATURES, 4)] {
        let host = Host::default();
        let device = Balloon::new(config(), Arc::new(host.clone())).expect("good memory");
        let mut queues = vec![0, 1, 2, reporting_index];
        if features & hinting != 0 {
            queues.insert(3, 3);
        }
        let mut driver = Driver::start(device, features, &queues);
        driver
            .run(reporting_index, &[free(MIB, MIB)])
            .expect("well-formed");
        assert_eq!(
            host.take().discarded,
            [(MIB, MIB)],
            "reporting is queue {reporting_index}"
        );
    }
}

#[test]
fn one_call_discards_so_many_ranges_and_goes_on_when_called_again() {
    let (mut driver, host) = start();
    // The ring has 64 descriptors, so that later chains overwrite parts of earlier ones.
    for _ in 0..4 {
        driver.offer(REPORTING, &[free(0, 4096); 60]);
    }
    driver.device.process_queue(REPORTING).expect("well-formed");
    assert_eq!(driver.used(REPORTING).len(), 3);
    assert_eq!(driver.interrupts.take_queue(REPORTING), 1);
    driver.settle().expect("well-formed");
    assert_eq!(driver.used(REPORTING).len(), 1);
    assert!(host.take().discarded.len() > 200);
}

#[test]
fn a_round_of_hinting_goes_from_command_to_done() {
    let (mut driver, host) = start();
    let command = |driver: &mut Driver<Balloon>, command: u64| {
        let command = driver.readable(&numbers([command]));
        driver.run(HINTING, &[command]).expect("well-formed");
    };
    driver.run(HINTING, &[free(0, MIB)]).expect("well-formed");
    assert_eq!(host.take().hinted, [], "there is no round");
    assert!(driver.device.start_hinting());
    assert_eq!(driver.interrupts.take_config(), 1);
    let round = driver.config(8, 4);
    assert_eq!(round, 2);
    driver.run(HINTING, &[free(0, MIB)]).expect("well-formed");
    assert_eq!(host.take().hinted, [], "the driver has not begun");
    command(&mut driver, round);
    driver
        .run(HINTING, &[free(4 * MIB, 4 * MIB)])
        .expect("well-formed");
    driver
        .run(HINTING, &[free(PLUGGED.start, MIB), free(HIGH.end - MIB, MIB)])
        .expect("well-formed");
    let books = host.take();
    assert_eq!(
        books.hinted,
        [(4 * MIB, 4 * MIB), (PLUGGED.start, MIB), (HIGH.end - MIB, MIB)]
    );
    assert_eq!(
        (books.discarded.len(), books.hinting_done_count),
        (0, 0),
        "hints are no reports"
    );
    command(&mut driver, 0);
    assert_eq!(host.take().hinting_done_count, 1);
    driver.run(HINTING, &[free(0, MIB)]).expect("well-formed");
    assert_eq!(host.take().hinted, [], "the round is over");
    driver.device.end_hinting();
    driver.device.end_hinting();
    assert_eq!((driver.config(8, 4), driver.interrupts.take_config()), (1, 1));
    assert_eq!(driver.used(HINTING).len(), 7, "every chain comes back");

    driver.device.start_hinting();
    let round = driver.readable(&numbers([3]));
    driver
        .run(HINTING, &[round, free(0, MIB)])
        .expect("both in one chain");
    assert_eq!(host.take().hinted, [(0, MIB)]);
    driver.device.reset();
    assert_eq!(host.take().hinting_done_count, 1, "there is nobody to go on");
    assert!(!driver.device.start_hinting(), "there is no driver");
    assert_eq!(driver.config(8, 4), 0);
}

#[test]
fn a_command_behind_hints_is_a_fault() {
    let (mut driver, _) = start();
    let command = driver.readable(&numbers([2]));
    let fault = driver
        .run(HINTING, &[free(0, MIB), command])
        .expect_err("out of order");
    assert_eq!(fault.to_string(), "queue 3: a command follows hints in one chain");
}
