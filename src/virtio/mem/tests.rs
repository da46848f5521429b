//! The memory device against a driver, and a host that keeps books.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;
use crate::virtio::device::VirtioDevice;
use crate::virtio::testing::Driver;

pub(super) const ADDRESS: u64 = 4 << 30;
pub(super) const REGION_BYTES: u64 = 1 << 30;
pub(super) const MIB: u64 = 1 << 20;
pub(super) const INACCESSIBLE: u64 = 1 << 1;

pub(super) const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
pub(super) const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

/// What the host was asked, and what it has.
#[derive(Default)]
pub(super) struct Books {
    pub(super) plugged: BTreeSet<u64>,
    pub(super) changes: Vec<u64>,
    pub(super) full: bool,
    pub(super) stuck: bool,
}

#[derive(Default, Clone)]
pub(super) struct Host(Arc<Mutex<Books>>);

impl Host {
    pub(super) fn books<R>(&self, look: impl FnOnce(&mut Books) -> R) -> R {
        look(&mut self.0.lock().expect("no panic while locked"))
    }

    pub(super) fn plugged_bytes(&self) -> u64 {
        self.books(|books| books.plugged.len() as u64 * BLOCK_BYTES)
    }
}

fn blocks(offset: u64, length_bytes: u64) -> impl Iterator<Item = u64> {
    assert_eq!(
        (offset | length_bytes) % BLOCK_BYTES,
        0,
        "the host gets whole blocks"
    );
    assert!(
        length_bytes > 0 && offset + length_bytes <= REGION_BYTES,
        "in the region"
    );
    offset / BLOCK_BYTES..(offset + length_bytes) / BLOCK_BYTES
}

impl MemHost for Host {
    fn plug(&self, offset: u64, length_bytes: u64) -> Result<(), PlugError> {
        self.books(|books| {
            if books.full {
                let what = "memslots";
                return Err(PlugError::Exhausted { what, limit: 7 });
            }
            for block in blocks(offset, length_bytes) {
                assert!(books.plugged.insert(block), "block {block} is plugged twice");
            }
            Ok(())
        })
    }

    fn unplug(&self, offset: u64, length_bytes: u64) -> Result<(), PlugError> {
        self.books(|books| {
            if books.stuck {
                let source = std::io::Error::other("stuck");
                return Err(PlugError::Host {
                    what: "a hole",
                    source,
                });
            }
            for block in blocks(offset, length_bytes) {
                books.plugged.remove(&block);
            }
            Ok(())
        })
    }

    fn changed(&self, plugged_bytes: u64) {
        self.books(|books| books.changes.push(plugged_bytes));
    }
}

pub(super) fn device(host: &Host) -> Mem {
    let config = MemConfig {
        address: ADDRESS,
        region_bytes: REGION_BYTES,
        ram_bytes: 1 << 30,
        slot_bytes: REGION_ALIGN_BYTES,
    };
    Mem::new(config, Arc::new(host.clone())).expect("a good region")
}

pub(super) fn start(requested_bytes: u64) -> (Driver<Mem>, Host) {
    let host = Host::default();
    let mut device = device(&host);
    device.set_requested(requested_bytes).expect("a good amount");
    (Driver::start(device, INACCESSIBLE, &[0]), host)
}

pub(super) fn request(kind: u16, address: u64, block_count: u16) -> Vec<u8> {
    // What is padding holds garbage, which the device must ignore.
    let mut bytes = vec![0xAA; 24];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&block_count.to_le_bytes());
    bytes
}

/// Sends one request; the response's type and state.
fn ask_for_state(driver: &mut Driver<Mem>, kind: u16, address: u64, block_count: u16) -> (u16, u16) {
    let request = driver.readable(&request(kind, address, block_count));
    let response = driver.writable(10);
    let head = driver.offer(0, &[request, response]);
    driver
        .device
        .process_queue(0)
        .expect("the request is well-formed");
    assert_eq!(driver.used(0), [(head, 10)]);
    let bytes = driver.bytes(response.address, 10);
    let word = |at| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    (word(0), word(8))
}

pub(super) fn ask(driver: &mut Driver<Mem>, kind: u16, block: u64, block_count: u16) -> u16 {
    ask_for_state(driver, kind, ADDRESS + block * BLOCK_BYTES, block_count).0
}

fn fields(driver: &Driver<Mem>) -> [u64; 3] {
    // usable_region_size, plugged_size, requested_size.
    [32, 40, 48].map(|offset| driver.config(offset, 8) / MIB)
}

#[test]
fn the_configuration_is_laid_out_as_the_standard_says() {
    let (driver, _) = start(300 * MIB);
    let all = [0, 8, 16, 24, 32, 40, 48].map(|offset| driver.config(offset, 8));
    let usable_bytes = 512 * MIB;
    assert_eq!(
        all,
        [BLOCK_BYTES, 0, ADDRESS, REGION_BYTES, usable_bytes, 0, 300 * MIB]
    );
    let mut data = [0x55; 16];
    driver.device.config_read(48, &mut data);
    assert_eq!(data[8..], [0x55; 8], "nothing is behind the configuration");
    driver.device.config_read(u64::MAX, &mut data);
    assert_eq!(driver.device.device_features(), INACCESSIBLE);
}

#[test]
fn what_is_requested_can_be_plugged_and_no_more() {
    let (mut driver, host) = start(8 * MIB);
    assert_eq!(ask(&mut driver, PLUG, 0, 3), ACK);
    assert_eq!(host.plugged_bytes(), 6 * MIB);
    assert_eq!(ask(&mut driver, PLUG, 3, 2), NACK, "that would be 10 of 8 MiB");
    assert_eq!(ask(&mut driver, PLUG, 60, 1), ACK, "any place will do");
    assert_eq!(
        ask(&mut driver, PLUG, 3, 1),
        NACK,
        "everything requested is plugged"
    );
    assert_eq!(fields(&driver), [256, 8, 8]);
    assert_eq!(ask(&mut driver, UNPLUG, 1, 1), ACK);
    assert_eq!(ask(&mut driver, UNPLUG, 0, 2), ERROR, "block 1 is unplugged");
    assert_eq!(
        host.books(|books| books.plugged.clone()),
        BTreeSet::from([0, 2, 60])
    );
    assert_eq!(driver.device.plugged_bytes(), 6 * MIB);
    assert_eq!(
        host.books(|books| std::mem::take(&mut books.changes)),
        [6, 8, 6].map(|mib| mib * MIB)
    );
}

#[test]
fn impossible_requests_are_errors_and_change_nothing() {
    let (mut driver, host) = start(128 * MIB);
    assert_eq!(ask(&mut driver, PLUG, 4, 4), ACK);
    let usable_blocks = 128;
    for (kind, block, count, why) in [
        (PLUG, 7, 2, "block 7 is plugged"),
        (PLUG, 2, 3, "block 4 is plugged"),
        (PLUG, 0, 0, "no block"),
        (PLUG, usable_blocks, 1, "not usable"),
        (PLUG, usable_blocks - 1, 2, "the last one is not usable"),
        (PLUG, 0, u16::MAX, "beyond the region"),
        (UNPLUG, 3, 2, "block 3 is unplugged"),
        (UNPLUG, 4, 0, "no block"),
        (UNPLUG, usable_blocks, 1, "not usable"),
        (STATE, 4, 0, "no block"),
        (STATE, usable_blocks, 1, "not usable"),
        (17, 4, 1, "no such request"),
    ] {
        assert_eq!(ask(&mut driver, kind, block, count), ERROR, "{why}");
    }
    for address in [
        ADDRESS + 4096,
        ADDRESS - BLOCK_BYTES,
        0,
        u64::MAX,
        u64::MAX - BLOCK_BYTES + 1,
    ] {
        for kind in [PLUG, UNPLUG, STATE] {
            assert_eq!(
                ask_for_state(&mut driver, kind, address, 1).0,
                ERROR,
                "{kind} at {address:#x}"
            );
        }
    }
    assert_eq!(
        host.books(|books| books.plugged.clone()),
        BTreeSet::from([4, 5, 6, 7])
    );
}

#[test]
fn state_tells_plugged_unplugged_and_mixed() {
    let (mut driver, _) = start(128 * MIB);
    assert_eq!(ask(&mut driver, PLUG, 4, 4), ACK);
    let state = |driver: &mut Driver<Mem>, block, count| {
        ask_for_state(driver, STATE, ADDRESS + block * BLOCK_BYTES, count)
    };
    assert_eq!(state(&mut driver, 4, 4), (ACK, 0));
    assert_eq!(state(&mut driver, 8, 56), (ACK, 1));
    assert_eq!(state(&mut driver, 3, 2), (ACK, 2));
}

#[test]
fn the_usable_part_grows_with_the_request_and_shrinks_when_everything_is_unplugged() {
    let (mut driver, host) = start(0);
    assert_eq!(fields(&driver), [0, 0, 0]);
    for (requested_mib, usable_mib) in [
        (2, 256),
        (128, 256),
        (130, 384),
        (896, 1024),
        (1024, 1024),
        (2, 1024),
    ] {
        driver
            .device
            .set_requested(requested_mib * MIB)
            .expect("a good amount");
        assert_eq!(fields(&driver), [usable_mib, 0, requested_mib]);
        assert_eq!(driver.interrupts.take_config(), 1);
    }
    driver.device.set_requested(2 * MIB).expect("a good amount");
    assert_eq!(driver.interrupts.take_config(), 0, "nothing changed");
    assert_eq!(ask(&mut driver, PLUG, 500, 1), ACK);
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(fields(&driver), [256, 0, 2]);
    assert_eq!(host.plugged_bytes(), 0);
    assert_eq!(
        driver.interrupts.take_config(),
        0,
        "UNPLUG ALL tells by its response"
    );
    driver.device.set_requested(0).expect("a good amount");
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(fields(&driver), [0, 0, 0]);
}

#[test]
fn a_large_guest_gets_room_for_its_large_memory_blocks() {
    let config = MemConfig {
        address: (65 << 30) + REGION_ALIGN_BYTES,
        region_bytes: 64 << 30,
        ram_bytes: 64 << 30,
        slot_bytes: REGION_ALIGN_BYTES,
    };
    let mut device = Mem::new(config, Arc::new(Host::default())).expect("a good region");
    device.set_requested(1 << 30).expect("a good amount");
    // Memory blocks begin at 66 GiB: the first is needed, the second is to spare.
    assert_eq!(config.address + device.usable_bytes(), 70 << 30);
}

#[test]
fn a_host_that_refuses_makes_the_driver_wait() {
    let (mut driver, host) = start(128 * MIB);
    host.books(|books| books.full = true);
    assert_eq!(ask(&mut driver, PLUG, 0, 4), BUSY);
    assert_eq!(fields(&driver)[1], 0, "nothing is recorded");
    host.books(|books| books.full = false);
    assert_eq!(ask(&mut driver, PLUG, 0, 4), ACK);
    host.books(|books| books.stuck = true);
    assert_eq!(ask(&mut driver, UNPLUG, 0, 1), BUSY);
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), BUSY);
    assert_eq!(fields(&driver)[1], 8, "all of it counts as plugged still");
    driver.device.power_on().expect_err("the host is stuck");
    host.books(|books| books.stuck = false);
    assert_eq!(ask(&mut driver, UNPLUG, 0, 4), ACK);
    assert_eq!(host.books(|books| books.changes.clone()), [8 * MIB, 0]);
}

#[test]
fn blocks_strewn_over_the_region_show_little_more_than_was_granted() {
    let (mut driver, host) = start(REGION_BYTES);
    let slot = REGION_ALIGN_BYTES / BLOCK_BYTES;
    // Linux fills one after the other, from either end.
    for part in [0, 1, 7, 6] {
        assert_eq!(ask(&mut driver, PLUG, part * slot, slot as u16), ACK);
    }
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), ACK);
    driver.device.set_requested(16 * MIB).expect("a good amount");
    // All of the region is usable until the next UNPLUG ALL, of which 16 MiB need one slot, and one more is to spare.
    driver.device.set_requested(REGION_BYTES).expect("a good amount");
    driver.device.set_requested(16 * MIB).expect("a good amount");
    let answers = [0, 3, 5, 7].map(|part| ask(&mut driver, PLUG, part * slot, 1));
    assert_eq!(answers, [ACK, ACK, BUSY, BUSY]);
    assert_eq!(
        ask(&mut driver, PLUG, 5 * slot - 1, 2),
        BUSY,
        "a range over a border"
    );
    assert_eq!(ask(&mut driver, PLUG, 1, 6), ACK, "what is live can be filled");
    assert_eq!(host.plugged_bytes(), 16 * MIB);
}

#[test]
fn a_driver_that_could_not_obey_can_be_reminded() {
    let (mut driver, _host) = start(8 * MIB);
    driver.interrupts.take_config();
    driver.device.remind();
    assert_eq!(driver.interrupts.take_config(), 1);
    assert_eq!(ask(&mut driver, PLUG, 0, 4), ACK);
    driver.device.remind();
    assert_eq!(driver.interrupts.take_config(), 0, "it has obeyed");
}

#[test]
fn a_driver_reset_leaves_memory_plugged_and_a_vm_reset_does_not() {
    let (mut driver, host) = start(256 * MIB);
    assert_eq!(ask(&mut driver, PLUG, 0, 100), ACK);
    driver.device.set_requested(64 * MIB).expect("a good amount");
    driver.restart(0, &[0]);
    assert_eq!(fields(&driver), [384, 200, 64], "the next driver finds it all");
    assert_eq!(ask(&mut driver, UNPLUG, 0, 1), ACK);

    driver.device.reset();
    driver.device.power_on().expect("the host takes it back");
    assert_eq!(host.plugged_bytes(), 0);
    driver.interrupts.take_config();
    driver.device.set_requested(96 * MIB).expect("a good amount");
    assert_eq!(driver.interrupts.take_config(), 0, "there is no driver");
    driver.restart(INACCESSIBLE, &[0]);
    assert_eq!(
        fields(&driver),
        [256, 0, 96],
        "the guest comes up and plugs again"
    );
    assert_eq!(ask(&mut driver, PLUG, 0, 48), ACK);
}

#[test]
fn requests_may_be_cut_up_in_any_way() {
    let (mut driver, _) = start(8 * MIB);
    let whole = request(PLUG, ADDRESS, 1);
    let mut parts: Vec<_> = whole.chunks(5).map(|piece| driver.readable(piece)).collect();
    let response: Vec<_> = (0..4).map(|_| driver.writable(3)).collect();
    parts.extend(&response);
    driver.run(0, &parts).expect("the request is whole");
    assert_eq!(driver.used(0)[0].1, 10);
    let bytes: Vec<_> = response
        .iter()
        .flat_map(|part| driver.bytes(part.address, 3))
        .collect();
    assert_eq!(bytes, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xEE, 0xEE]);
    assert_eq!(driver.device.plugged_bytes(), BLOCK_BYTES);
}

#[test]
fn one_call_answers_so_many_requests_and_goes_on_when_called_again() {
    let (mut driver, _) = start(128 * MIB);
    for block in 0..20 {
        let request = driver.readable(&request(PLUG, ADDRESS + block * BLOCK_BYTES, 1));
        let response = driver.writable(10);
        driver.offer(0, &[request, response]);
    }
    driver.device.process_queue(0).expect("well-formed");
    assert_eq!(driver.used(0).len(), 16);
    assert_eq!(driver.interrupts.take_queue(0), 1);
    assert!(driver.event(true).expect("a pause does nothing"));
    assert_eq!(driver.used(0).len(), 0);
    assert!(
        !driver.event(true).expect("nothing happens"),
        "a paused device does not spin"
    );
    driver.device.process_queue(0).expect("well-formed");
    assert_eq!(driver.used(0).len(), 4);
    driver.settle().expect("nothing is left");
}

#[test]
fn what_was_saved_is_plugged_again() {
    let (mut driver, _) = start(512 * MIB);
    assert_eq!(ask(&mut driver, PLUG, 0, 3), ACK);
    assert_eq!(ask(&mut driver, PLUG, 63, 2), ACK);
    driver.device.set_requested(4 * MIB).expect("a good amount");
    let saved = driver.device.save().expect("it can be saved");
    let host = Host::default();
    let mut restored = device(&host);
    restored.restore(&saved).expect("its own save");
    assert_eq!(restored.save().expect("it can be saved"), saved);
    assert_eq!(
        host.books(|books| books.plugged.clone()),
        BTreeSet::from([0, 1, 2, 63, 64])
    );
    let mut driver = driver.move_to(restored, INACCESSIBLE);
    assert_eq!(fields(&driver), [640, 10, 4]);
    assert_eq!(ask(&mut driver, UNPLUG, 63, 2), ACK);

    let full = Host::default();
    full.books(|books| books.full = true);
    let error = device(&full).restore(&saved).expect_err("the host is full");
    assert_eq!(
        error.to_string(),
        "the host does not accept 10485760 bytes of plugged memory"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever the driver asks for, host and device agree, and no plug goes beyond what is requested.
    #[test]
    fn host_and_device_agree_after_any_requests(
        steps in prop::collection::vec((0u16..5, 0u64..520, 0u16..600, 0u64..=512), 1..40)
    ) {
        let (mut driver, host) = start(64 * MIB);
        for (kind, block, count, requested) in steps {
            if kind == 4 {
                driver.device.set_requested(requested * BLOCK_BYTES).expect("in the region");
                continue;
            }
            let before = driver.device.plugged_bytes();
            let response = ask(&mut driver, kind, block, count);
            let after = driver.device.plugged_bytes();
            prop_assert!(after <= before || after <= driver.device.requested_bytes());
            prop_assert!(response == ACK || before == after, "{} changed something", response);
            prop_assert_eq!(after, host.plugged_bytes());
            prop_assert_eq!(driver.config(40, 8), after);
            prop_assert!(driver.device.usable_bytes() >= driver.device.requested_bytes());
        }
    }
}
