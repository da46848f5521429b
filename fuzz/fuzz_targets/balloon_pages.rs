//! A balloon fed with any page lists, ranges, statistics and commands: nothing outside the guest's memory is discarded,
//! and no more is in it than there is RAM.
#![no_main]
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vm_lifecycle::virtio::balloon::{Balloon, PAGE_BYTES};
use vm_lifecycle::virtio::device::{DeviceFault, VirtioDevice};
use vm_lifecycle_fuzz::driver::{Driven, Step};
use vm_lifecycle_fuzz::memory::Books;

#[derive(Debug, Arbitrary)]
struct Input {
    features: u64,
    size_log2: u8,
    steps: Vec<BalloonStep>,
}

#[derive(Debug, Arbitrary)]
enum BalloonStep {
    Driver(Step),
    /// The host wants so many pages, possibly too many.
    Target(u32),
    Statistics,
    StartHinting,
    EndHinting,
    /// The driver writes its configuration.
    Config(u8, [u8; 4]),
    Stuck(bool),
    /// The state moves to another device.
    Save,
}

/// A command of hinting, an entry of statistics, or a list of 1 to 64 pages from a page on, near an end of RAM or in the
/// middle of it.
fn header([kind, page, page_high, count]: [u8; 4]) -> Vec<u8> {
    let page = u32::from(u16::from_le_bytes([page, page_high]));
    match kind % 8 {
        0 => (page % 4).to_le_bytes().to_vec(),
        1 => [[page as u8 % 12, 0].as_slice(), &[count; 8]].concat(),
        kind => {
            let first = [0, 0x3_FFF0, 0xF_FFF0, 0x10_7FF0, 0x14_7FF0, u32::MAX - 0x20][usize::from(kind) - 2];
            let pages =
                (0..1 + u32::from(count % 64)).map(|index| first.wrapping_add(page % 64).wrapping_add(index));
            pages.flat_map(u32::to_le_bytes).collect()
        }
    }
}

fn play(driven: &mut Driven<Balloon>, books: &Books, step: &BalloonStep) -> Result<(), DeviceFault> {
    match step {
        BalloonStep::Driver(step) => driven.play(step)?,
        BalloonStep::Target(pages) => {
            // Too many are refused.
            let _ = driven.device.set_target(u64::from(*pages) * PAGE_BYTES);
        }
        BalloonStep::Statistics => drop(driven.device.request_stats()),
        BalloonStep::StartHinting => drop(driven.device.start_hinting()),
        BalloonStep::EndHinting => driven.device.end_hinting(),
        BalloonStep::Config(offset, bytes) => driven.device.config_write(u64::from(offset % 20), bytes),
        BalloonStep::Stuck(stuck) => books.stuck.store(*stuck, Ordering::Relaxed),
        BalloonStep::Save => check_save(&driven.device),
    }
    Ok(())
}

fn check_save(device: &Balloon) {
    let saved = device.save().expect("it can be saved");
    let mut other = Arc::new(Books::default()).balloon();
    other.restore(&saved).expect("its own save");
    assert_eq!(other.ballooned_bytes(), device.ballooned_bytes());
    assert_eq!(other.save().expect("it can be saved"), saved);
}

fuzz_target!(|input: Input| {
    let books = Arc::new(Books::default());
    let Some(mut driven) = Driven::start(books.balloon(), input.features, input.size_log2, header) else {
        return;
    };
    let outcome = input
        .steps
        .iter()
        .try_for_each(|step| play(&mut driven, &books, step));
    driven.finish(outcome);
});
