//! What the memory device refuses: drivers, amounts, regions and saved states.

use std::sync::Arc;

use serde_json::{Value, json};

use super::tests::{ACK, ADDRESS, Host, MIB, PLUG, REGION_BYTES, ask, device, request, start};
use super::*;
use crate::virtio::device::VirtioDevice;
use crate::virtio::testing::{Driver, MEMORY_BYTES, Part};

#[test]
fn a_driver_that_breaks_the_rules_is_told_how() {
    let outside = |writable, length| Part {
        address: MEMORY_BYTES,
        length,
        writable,
    };
    // Lengths of the parts, and whether the device is to write them.
    let cases: [(&[(usize, bool)], &str); 4] = [
        (
            &[(23, false), (10, true)],
            "queue 0: a request has 23 of 24 bytes",
        ),
        (
            &[(24, false), (9, true)],
            "queue 0: the room for a response has 9 of 10 bytes",
        ),
        (
            &[(24, false)],
            "queue 0: the room for a response has 0 of 10 bytes",
        ),
        (
            &[(20, false), (10, true), (4, false)],
            "queue 0: a request continues behind the room for its response",
        ),
    ];
    for (lengths, message) in cases {
        let (mut driver, _) = start(8 * MIB);
        let place = |&(length, writable): &(usize, bool)| Part {
            writable,
            ..driver.readable(&vec![0; length])
        };
        let parts: Vec<_> = lengths.iter().map(place).collect();
        let fault = driver.run(0, &parts).expect_err(message);
        assert_eq!(fault.to_string(), message);
    }
    let (mut driver, host) = start(8 * MIB);
    let response = driver.writable(10);
    driver
        .run(0, &[outside(false, 24), response])
        .expect_err("the request is outside");
    let request = driver.readable(&request(PLUG, ADDRESS, 1));
    driver
        .run(0, &[request, outside(true, 10)])
        .expect_err("the response is outside");
    assert_eq!(
        driver.device.plugged_bytes(),
        host.plugged_bytes(),
        "both know what is plugged"
    );
    assert_eq!(
        host.books(|books| books.changes.clone()),
        [BLOCK_BYTES],
        "a fault hides nothing"
    );
}

#[test]
fn amounts_and_regions_out_of_range_are_refused_with_the_limit() {
    let (mut driver, _) = start(0);
    let refused = |driver: &mut Driver<Mem>, bytes| {
        driver
            .device
            .set_requested(bytes)
            .expect_err("refused")
            .to_string()
    };
    assert_eq!(
        refused(&mut driver, MIB),
        "1048576 bytes are not a multiple of the block size, 2097152 bytes"
    );
    assert_eq!(
        refused(&mut driver, REGION_BYTES + BLOCK_BYTES),
        "1075838976 bytes exceed the region of 1073741824 bytes"
    );
    for (address, region_bytes) in [
        (ADDRESS + BLOCK_BYTES, REGION_BYTES),
        (ADDRESS, REGION_BYTES + BLOCK_BYTES),
        (ADDRESS, 0),
        (ADDRESS, REGION_BYTES_MAX + REGION_ALIGN_BYTES),
        (0u64.wrapping_sub(REGION_ALIGN_BYTES), 2 * REGION_ALIGN_BYTES),
    ] {
        let config = MemConfig {
            address,
            region_bytes,
            ram_bytes: 1 << 30,
            slot_bytes: REGION_ALIGN_BYTES,
        };
        let made = Mem::new(config, Arc::new(Host::default()));
        assert!(
            matches!(made, Err(MemError::Region { .. })),
            "{region_bytes:#x} at {address:#x}"
        );
    }
}

#[test]
fn impossible_saved_states_are_refused_by_field() {
    let (mut driver, _) = start(128 * MIB);
    assert_eq!(ask(&mut driver, PLUG, 0, 3), ACK);
    let saved = driver.device.save().expect("it can be saved");
    let mut outside = vec![0u64; 8];
    outside[7] = 1 << 63;
    for (field, value) in [
        ("address", json!(0)),
        ("region_bytes", json!(2 * REGION_BYTES)),
        ("requested_bytes", json!(MIB)),
        ("requested_bytes", json!(2 * REGION_BYTES)),
        ("usable_bytes", json!(u64::MAX)),
        ("usable_bytes", json!(0)),
        ("plugged", json!([7])),
        ("plugged", json!(outside)),
        ("plugged", Value::Null),
        ("unknown", json!(1)),
    ] {
        let mut state = saved.clone();
        state[field] = value.clone();
        let host = Host::default();
        device(&host).restore(&state).expect_err(field);
        assert_eq!(host.plugged_bytes(), 0, "{field} = {value} plugged something");
    }
}
