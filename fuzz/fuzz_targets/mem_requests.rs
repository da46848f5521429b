//! A memory device fed with any requests: it and the host agree on what is plugged, and it is never more than requested
//! unless it was so before.
#![no_main]
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vm_lifecycle::virtio::device::{DeviceFault, VirtioDevice};
use vm_lifecycle::virtio::mem::{BLOCK_BYTES, Mem};
use vm_lifecycle_fuzz::driver::{Driven, Step};
use vm_lifecycle_fuzz::memory::{Books, REGION};

#[derive(Debug, Arbitrary)]
struct Input {
    features: u64,
    size_log2: u8,
    /// What is requested at first, in blocks.
    requested: u8,
    steps: Vec<MemStep>,
}

#[derive(Debug, Arbitrary)]
enum MemStep {
    Driver(Step),
    /// A request as it should be.
    Ask([u8; 4]),
    /// The host requests so many blocks, possibly too many.
    Request(u16),
    Stuck(bool),
    /// The whole VM is reset.
    PowerOn,
    /// The state moves to another device on another host.
    Save,
}

/// A request of virtio 1.2 §5.15.6: mostly of few blocks that can be plugged, now and then of any.
fn header([kind, block, count, unusual]: [u8; 4]) -> Vec<u8> {
    let (block, count) = match unusual {
        0xFF => (u64::from(block) << 2, u16::from(count) << 8),
        0xFE => (u64::MAX / BLOCK_BYTES - u64::from(block), count.into()),
        _ => (u64::from(block % 140), u16::from(count % 16)),
    };
    let address = REGION.start.wrapping_add(block * BLOCK_BYTES);
    let mut request = vec![0; 24];
    request[0] = kind % 5;
    request[8..16].copy_from_slice(&address.to_le_bytes());
    request[16..18].copy_from_slice(&count.to_le_bytes());
    request
}

fn play(driven: &mut Driven<Mem>, books: &Arc<Books>, step: &MemStep) -> Result<(), DeviceFault> {
    let before = driven.device.plugged_bytes();
    let outcome = match step {
        MemStep::Driver(step) => driven.play(step),
        MemStep::Ask(header) => driven.ask(0, *header, 10),
        MemStep::Request(blocks) => {
            // Too many are refused.
            let _ = driven.device.set_requested(u64::from(*blocks) * BLOCK_BYTES);
            Ok(())
        }
        MemStep::Stuck(stuck) => {
            books.stuck.store(*stuck, Ordering::Relaxed);
            Ok(())
        }
        MemStep::PowerOn => {
            let emptied = driven.device.power_on();
            assert!(emptied.is_err() || driven.device.plugged_bytes() == 0);
            Ok(())
        }
        MemStep::Save => {
            check_save(&driven.device);
            Ok(())
        }
    };
    let after = driven.device.plugged_bytes();
    assert_eq!(after, books.plugged_bytes(), "the host has another amount");
    assert!(
        after <= before || after <= driven.device.requested_bytes(),
        "more than requested"
    );
    assert!(driven.device.usable_bytes() >= driven.device.requested_bytes());
    outcome
}

fn check_save(device: &Mem) {
    let saved = device.save().expect("it can be saved");
    let books = Arc::new(Books::default());
    let mut other = books.mem();
    other.restore(&saved).expect("its own save");
    assert_eq!(books.plugged_bytes(), device.plugged_bytes());
    assert_eq!(other.save().expect("it can be saved"), saved);
}

fuzz_target!(|input: Input| {
    let books = Arc::new(Books::default());
    let mut mem = books.mem();
    let requested_bytes = u64::from(input.requested) * BLOCK_BYTES;
    mem.set_requested(requested_bytes).expect("the region is larger");
    let Some(mut driven) = Driven::start(mem, input.features, input.size_log2, header) else {
        return;
    };
    let outcome = input
        .steps
        .iter()
        .try_for_each(|step| play(&mut driven, &books, step));
    driven.finish(outcome);
});
