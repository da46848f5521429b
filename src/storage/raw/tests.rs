//! The raw disk by both engines: content, limits, errors, and what happens when it is dropped in flight.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::storage::testing::{guest_memory, wait_readable};
use crate::storage::{DiskOperation, GuestBuffers};

pub(super) const ENGINES: [RawEngine; 2] = [RawEngine::IoUring, RawEngine::ThreadPool];
pub(super) const MIB: u64 = 1 << 20;

pub(super) fn image(content: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("the host has a temporary directory");
    file.write_all(content).expect("the temporary directory has room");
    file
}

pub(super) fn open(path: &Path, read_only: bool, engine: RawEngine) -> Result<RawDisk, OpenError> {
    RawDisk::open(&RawConfig {
        path: path.to_owned(),
        read_only,
        engine,
    })
}

/// A disk on a fresh file of `content`, and guest memory for its buffers.
struct Rig {
    file: NamedTempFile,
    disk: RawDisk,
    memory: Arc<GuestMemoryMmap>,
}

impl Rig {
    fn new(content: &[u8], engine: RawEngine) -> Self {
        let file = image(content);
        let disk = open(file.path(), false, engine).expect("a good image");
        let memory = guest_memory(8 << 20);
        Self { file, disk, memory }
    }

    fn buffers(&self, ranges: &[(u64, u32)]) -> GuestBuffers {
        let ranges = ranges
            .iter()
            .map(|(address, length)| (GuestAddress(*address), *length));
        GuestBuffers::new(self.memory.clone(), ranges).expect("the ranges are in memory")
    }

    fn run(&mut self, operations: Vec<DiskOperation>) -> Vec<io::Result<()>> {
        run(&mut self.disk, operations)
    }

    fn run_one(&mut self, operation: DiskOperation) -> io::Result<()> {
        self.run(vec![operation]).remove(0)
    }

    fn content(&self) -> Vec<u8> {
        fs::read(self.file.path()).expect("the image can be read")
    }
}

/// Carries the operations out and returns their results in the order of submission.
pub(super) fn run(disk: &mut RawDisk, operations: Vec<DiskOperation>) -> Vec<io::Result<()>> {
    let count = operations.len();
    let mut results: Vec<Option<io::Result<()>>> = (0..count).map(|_| None).collect();
    let mut completions = Vec::new();
    let mut collect = |disk: &mut RawDisk| {
        wait_readable(disk.completion_fd());
        disk.drain(&mut completions);
        for completion in completions.drain(..) {
            let slot = &mut results[completion.request.id as usize];
            assert!(
                slot.is_none(),
                "request {} completed twice",
                completion.request.id
            );
            *slot = Some(completion.result);
        }
    };
    for (id, operation) in (0..).zip(operations) {
        let mut request = DiskRequest { id, operation };
        while let Err(DiskFull(refused)) = disk.submit(request) {
            assert!(disk.in_flight_count() > 0, "a full disk has requests in flight");
            disk.start();
            collect(disk);
            request = refused;
        }
    }
    disk.start();
    while disk.in_flight_count() > 0 {
        collect(disk);
    }
    results
        .into_iter()
        .map(|result| result.expect("each request completes"))
        .collect()
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|index| (index % 251) as u8 ^ (index / 251) as u8)
        .collect()
}

fn errno(result: io::Result<()>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

#[test]
fn vectored_writes_reach_the_file_and_are_read_back() {
    for engine in ENGINES {
        let mut rig = Rig::new(&vec![0xEE; MIB as usize], engine);
        let data = pattern(10_000);
        rig.memory
            .write_slice(&data, GuestAddress(0x10_0000))
            .expect("in memory");
        // Pieces of odd lengths, out of order in memory.
        let pieces = [
            (0x10_0000, 1),
            (0x10_0001, 4999),
            (0x10_1388, 3000),
            (0x10_1F40, 2000),
        ];
        let write = DiskOperation::Write {
            offset_bytes: 512,
            buffers: rig.buffers(&pieces),
        };
        rig.run_one(write).expect("the write succeeds");
        rig.run_one(DiskOperation::Flush).expect("the flush succeeds");
        let content = rig.content();
        assert!(
            content[512..10_512] == data[..],
            "{engine:?}: the file holds other bytes"
        );
        assert!(
            content[..512]
                .iter()
                .chain(&content[10_512..])
                .all(|byte| *byte == 0xEE)
        );

        let read = DiskOperation::Read {
            offset_bytes: 512,
            buffers: rig.buffers(&[(0x20_2000, 7000), (0x20_0000, 3000)]),
        };
        rig.run_one(read).expect("the read succeeds");
        let mut back = vec![0; 10_000];
        let (first, second) = back.split_at_mut(7000);
        rig.memory
            .read_slice(first, GuestAddress(0x20_2000))
            .expect("in memory");
        rig.memory
            .read_slice(second, GuestAddress(0x20_0000))
            .expect("in memory");
        assert!(back == data, "{engine:?}: other bytes were read");
    }
}

#[test]
fn more_requests_than_fit_complete_once_each_with_their_own_data() {
    const COUNT: u64 = 3 * REQUESTS_MAX as u64;
    for engine in ENGINES {
        let mut rig = Rig::new(&vec![0; (COUNT * 4096) as usize], engine);
        let data = pattern((COUNT * 4096) as usize);
        rig.memory.write_slice(&data, GuestAddress(0)).expect("in memory");
        let writes = (0..COUNT).rev().map(|index| DiskOperation::Write {
            offset_bytes: index * 4096,
            buffers: rig.buffers(&[(index * 4096, 4096)]),
        });
        let writes = writes.collect();
        assert!(
            rig.run(writes).iter().all(Result::is_ok),
            "{engine:?}: a write failed"
        );
        assert!(rig.content() == data, "{engine:?}: the file holds other bytes");

        let target = 4 * MIB;
        let reads = (0..COUNT).map(|index| DiskOperation::Read {
            offset_bytes: index * 4096,
            buffers: rig.buffers(&[(target + index * 4096, 4096)]),
        });
        let reads = reads.collect();
        assert!(
            rig.run(reads).iter().all(Result::is_ok),
            "{engine:?}: a read failed"
        );
        let mut back = vec![0; data.len()];
        rig.memory
            .read_slice(&mut back, GuestAddress(target))
            .expect("in memory");
        assert!(back == data, "{engine:?}: other bytes were read");
    }
}

#[test]
fn cleared_ranges_read_as_zeros_to_the_byte_and_free_space() {
    for engine in ENGINES {
        let length = (4 * MIB) as usize;
        let mut rig = Rig::new(&vec![0xAB; length], engine);
        rig.file.as_file().sync_all().expect("the host writes it");
        let blocks = rig.file.as_file().metadata().expect("open").blocks();
        let (offset_bytes, length_bytes) = (MIB + 512, MIB + 1024);
        let clears = [
            DiskOperation::Discard {
                offset_bytes,
                length_bytes,
            },
            DiskOperation::WriteZeroes {
                offset_bytes: 0,
                length_bytes: 700,
                unmap: false,
            },
            DiskOperation::WriteZeroes {
                offset_bytes: 3 * MIB,
                length_bytes: MIB,
                unmap: true,
            },
        ];
        for clear in clears {
            let (offset_bytes, length_bytes) = clear.range().expect("it has a range");
            rig.run_one(clear).expect("the range is cleared");
            let content = rig.content();
            let (start, end) = (offset_bytes as usize, (offset_bytes + length_bytes) as usize);
            assert_eq!(content.len(), length, "{engine:?}: the size changed");
            assert!(
                content[start..end].iter().all(|byte| *byte == 0),
                "{engine:?}: not zero"
            );
            assert!(
                content.get(end).is_none_or(|byte| *byte == 0xAB),
                "{engine:?}: cleared too much"
            );
            assert!(
                start == 0 || content[start - 1] == 0xAB,
                "{engine:?}: cleared too early"
            );
        }
        let freed = blocks - rig.file.as_file().metadata().expect("open").blocks();
        assert!(freed * 512 >= MIB, "{engine:?}: freed only {freed} sectors");
    }
}

#[test]
fn zeros_are_written_where_the_file_system_cannot_clear() {
    let rig = Rig::new(&vec![0xAB; (3 * MIB) as usize], RawEngine::ThreadPool);
    let operation = DiskOperation::WriteZeroes {
        offset_bytes: 512,
        length_bytes: 2 * MIB + 512,
        unmap: true,
    };
    let mut job = Job::new(rig.disk.image.clone(), DiskRequest { id: 1, operation });
    let unsupported = || Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
    let mode = |step| match step {
        job::Step::Allocate { mode, .. } => mode & !libc::FALLOC_FL_KEEP_SIZE,
        _ => panic!("expected an fallocate"),
    };
    assert_eq!(mode(job.step()), libc::FALLOC_FL_PUNCH_HOLE);
    assert!(job.advance(unsupported()).is_none());
    assert_eq!(mode(job.step()), libc::FALLOC_FL_ZERO_RANGE);
    assert!(job.advance(unsupported()).is_none());
    // The first piece is cut short; the others start where it ended and none is larger than 1 MiB.
    let mut offsets = Vec::new();
    let mut answer = 4097;
    loop {
        let job::Step::Write { offset_bytes, iovecs } = job.step() else {
            panic!("expected a write of zeros");
        };
        assert!(iovecs.count() <= 256);
        offsets.push(offset_bytes);
        if let Some(result) = job.advance(Ok(answer)) {
            result.expect("all zeros are written");
            break;
        }
        answer = MIB;
    }
    assert_eq!(offsets, [512, 512 + 4097, 512 + 4097 + MIB]);
}

#[test]
fn transient_answers_are_retried_and_then_reported() {
    let rig = Rig::new(&[0; 512], RawEngine::ThreadPool);
    let mut job = Job::new(
        rig.disk.image.clone(),
        DiskRequest {
            id: 1,
            operation: DiskOperation::Flush,
        },
    );
    let interrupted = || Err(io::Error::from_raw_os_error(libc::EINTR));
    for _ in 0..16 {
        assert!(job.advance(interrupted()).is_none());
    }
    let result = job.advance(interrupted()).expect("the seventeenth is final");
    assert_eq!(errno(result), Some(libc::EINTR));
}

#[test]
fn errors_keep_their_number() {
    for engine in ENGINES {
        let mut rig = Rig::new(&vec![1; MIB as usize], engine);
        let read = |rig: &Rig, offset_bytes| DiskOperation::Read {
            offset_bytes,
            buffers: rig.buffers(&[(0, 4096)]),
        };
        let past_end = read(&rig, MIB - 512);
        assert_eq!(errno(rig.run_one(past_end)), Some(libc::EINVAL));
        let far = read(&rig, u64::MAX - 100);
        assert_eq!(errno(rig.run_one(far)), Some(libc::EINVAL));
        // The file loses its end behind our back: what is left of the read is short, and then nothing comes.
        rig.file
            .as_file()
            .set_len(MIB / 2 + 512)
            .expect("the file is ours");
        let cut = read(&rig, MIB / 2);
        assert_eq!(errno(rig.run_one(cut)), Some(libc::EIO));
        drop(rig.disk);

        let mut reader = open(rig.file.path(), true, engine).expect("a good image");
        assert!(reader.properties().read_only && !reader.properties().discard);
        let write = DiskOperation::Write {
            offset_bytes: 0,
            buffers: GuestBuffers::new(rig.memory, [(GuestAddress(0), 512)]).expect("in memory"),
        };
        assert_eq!(errno(run(&mut reader, vec![write]).remove(0)), Some(libc::EPERM));
    }
}

#[test]
fn requests_that_were_not_begun_go_with_the_disk() {
    for engine in ENGINES {
        let mut rig = Rig::new(&[0; 4096], engine);
        for id in 0..4 {
            let buffers = rig.buffers(&[(0, 512)]);
            let operation = DiskOperation::Read {
                offset_bytes: 0,
                buffers,
            };
            rig.disk
                .submit(DiskRequest { id, operation })
                .expect("there is room");
        }
        drop(rig.disk);
        wait_until_freed(&Arc::downgrade(&rig.memory), rig.memory);
    }
}

#[test]
fn memory_outlives_a_dropped_disk_until_the_kernel_is_done() {
    let (read_end, mut write_end) = io::pipe().expect("the host has pipes");
    let file = image(&[0; 512]);
    // Stands for a stuck disk: a read of an empty pipe begins and does not end.
    let mut stuck = Image::open(file.path(), false).expect("a good image");
    stuck.file = File::from(OwnedFd::from(read_end));
    let completion = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("the host has eventfds"));
    let mut engine = UringEngine::new(&completion).expect("the host has io_uring");
    let memory = guest_memory(4096);
    let buffers = GuestBuffers::new(memory.clone(), [(GuestAddress(0), 512)]).expect("in memory");
    let operation = DiskOperation::Read {
        offset_bytes: 0,
        buffers,
    };
    let job = Job::new(Arc::new(stuck), DiskRequest { id: 1, operation });
    assert!(engine.submit(job).is_ok());
    engine.start();

    drop(engine);
    assert_eq!(
        Arc::strong_count(&memory),
        2,
        "the request still holds guest memory"
    );
    write_end.write_all(&[7; 512]).expect("the pipe has room");
    let weak = Arc::downgrade(&memory);
    wait_until_freed(&weak, memory);
}

/// Gives `memory` up and waits until nobody else holds it.
fn wait_until_freed(weak: &std::sync::Weak<GuestMemoryMmap>, memory: Arc<GuestMemoryMmap>) {
    drop(memory);
    let deadline = Instant::now() + Duration::from_secs(60);
    while weak.upgrade().is_some() {
        assert!(Instant::now() < deadline, "guest memory was never given up");
        std::thread::yield_now();
    }
}

#[test]
fn threads_end_when_there_is_nothing_to_do() {
    let mut rig = Rig::new(&[0; 4096], RawEngine::ThreadPool);
    assert_eq!(
        rig.disk.pool.thread_count(),
        0,
        "no thread before the first request"
    );
    rig.run_one(DiskOperation::Flush).expect("the flush succeeds");
    let deadline = Instant::now() + Duration::from_secs(60);
    while rig.disk.pool.thread_count() > 0 {
        assert!(Instant::now() < deadline, "an idle thread stays");
        std::thread::yield_now();
    }
    rig.run_one(DiskOperation::Flush).expect("a new thread takes it");
}
