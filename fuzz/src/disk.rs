//! A disk that is full at times, fails at times, and answers in an order of its own, as the input chooses.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use serde_json::{Value, json};
use vm_lifecycle::storage::{DiskBackend, DiskCompletion, DiskFull, DiskProperties, DiskRequest, MemoryDisk};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A disk in memory whose answers come late.
pub struct MoodyDisk {
    disk: MemoryDisk,
    waiting: VecDeque<DiskRequest>,
    room: usize,
    /// One decides about each completion; then they begin again. None: in order, without errors.
    moods: VecDeque<u8>,
    completion: EventFd,
}

impl MoodyDisk {
    /// Makes `disk` moody: room for 1 to 16 requests, and `moods`.
    pub fn new(disk: MemoryDisk, room: u8, moods: Vec<u8>) -> Self {
        Self {
            disk,
            waiting: VecDeque::new(),
            room: 1 + usize::from(room % 16),
            moods: moods.into(),
            completion: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("descriptors are free"),
        }
    }

    /// Completes one of the waiting requests; `true` when the next may follow at once.
    fn complete(&mut self, completions: &mut Vec<DiskCompletion>) -> bool {
        self.moods.rotate_left(usize::from(!self.moods.is_empty()));
        let mood = self.moods.back().copied().unwrap_or(1);
        let index = usize::from(mood >> 4) % self.waiting.len().max(1);
        let Some(request) = self.waiting.remove(index) else {
            return false;
        };
        if mood & 6 == 6 {
            let result = Err(io::Error::from_raw_os_error(5));
            completions.push(DiskCompletion { request, result });
        } else {
            self.disk
                .submit(request)
                .unwrap_or_else(|_| panic!("memory takes everything"));
            self.disk.drain(completions);
        }
        mood & 1 != 0
    }

    fn notify(&self) {
        if !self.waiting.is_empty() {
            // A full counter means that the descriptor is readable already.
            let _ = self.completion.write(1);
        }
    }
}

impl DiskBackend for MoodyDisk {
    fn properties(&self) -> DiskProperties {
        self.disk.properties()
    }

    fn submit(&mut self, request: DiskRequest) -> Result<(), DiskFull> {
        if self.waiting.len() == self.room {
            return Err(DiskFull(request));
        }
        self.waiting.push_back(request);
        Ok(())
    }

    fn start(&mut self) {
        self.notify();
    }

    fn completion_fd(&self) -> RawFd {
        self.completion.as_raw_fd()
    }

    fn drain(&mut self, completions: &mut Vec<DiskCompletion>) {
        // An empty counter is a spurious call.
        let _ = self.completion.read();
        while !self.waiting.is_empty() && self.complete(completions) {}
        self.notify();
    }

    fn in_flight_count(&self) -> usize {
        self.waiting.len()
    }

    fn inspect(&self) -> Value {
        json!({ "kind": "moody", "waiting": self.waiting.len() })
    }
}
