//! A block device fed with any chains, rings and bytes, on a disk in any mood: every chain comes back or the device
//! faults.
#![no_main]
#![forbid(unsafe_code)]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vm_lifecycle::ids::DiskName;
use vm_lifecycle::storage::MemoryDisk;
use vm_lifecycle::virtio::block::Block;
use vm_lifecycle_fuzz::disk::MoodyDisk;
use vm_lifecycle_fuzz::driver::{Driven, Step};

#[derive(Debug, Arbitrary)]
struct Input {
    features: u64,
    size_log2: u8,
    queue_count: u8,
    read_only: bool,
    room: u8,
    moods: Vec<u8>,
    steps: Vec<Step>,
}

/// Type and sector of a request (virtio 1.2 §5.2.6).
fn header([kind, unusual, low, high]: [u8; 4]) -> Vec<u8> {
    let kind = if unusual == 0xFF {
        u32::MAX
    } else {
        u32::from(kind % 16)
    };
    let sector = u64::from(u16::from_le_bytes([low, high]));
    [kind.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat()
}

fuzz_target!(|input: Input| {
    let mut disk = MemoryDisk::new(64).expect("descriptors are free");
    if input.read_only {
        disk = disk.read_only();
    }
    let disk = MoodyDisk::new(disk, input.room, input.moods);
    let name = DiskName::new("disk").expect("a good name");
    let queue_count = 1 + u16::from(input.queue_count % 3);
    let block = Block::new(&name, Box::new(disk), queue_count).expect("descriptors are free");
    let Some(mut driven) = Driven::start(block, input.features, input.size_log2, header) else {
        return;
    };
    let outcome = input.steps.iter().try_for_each(|step| driven.play(step));
    driven.finish(outcome);
});
