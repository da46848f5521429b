//! A disk in this process's memory, for tests, fuzzing and scratch space. Its content is gone with it.
//!
//! Requests are carried out while they are submitted, by copying; the completion still takes the usual way through
//! the descriptor, so a device cannot tell the difference.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use serde_json::{Value, json};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::SECTOR_BYTES;
use super::backend::{DiskBackend, DiskCompletion, DiskFull, DiskOperation, DiskProperties, DiskRequest};

/// A disk whose bytes are in memory; untouched parts cost nothing.
pub struct MemoryDisk {
    bytes: Vec<u8>,
    properties: DiskProperties,
    completions: Vec<DiskCompletion>,
    completion: EventFd,
}

impl MemoryDisk {
    /// Makes a writable disk of `sector_count` sectors of 512 bytes, all zero.
    ///
    /// # Errors
    /// The host's error when it has no eventfd left.
    pub fn new(sector_count: u32) -> io::Result<Self> {
        let capacity_bytes = u64::from(sector_count) * SECTOR_BYTES;
        let length = usize::try_from(capacity_bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            bytes: vec![0; length],
            properties: DiskProperties {
                capacity_bytes,
                read_only: false,
                logical_block_bytes: SECTOR_BYTES as u32,
                physical_block_bytes: SECTOR_BYTES as u32,
                discard: true,
                write_zeroes: true,
            },
            completions: Vec::new(),
            completion: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Makes the disk refuse changes from now on.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.properties.read_only = true;
        self
    }

    fn perform(&mut self, operation: &DiskOperation) -> io::Result<()> {
        operation.check(&self.properties)?;
        let Some((offset_bytes, length_bytes)) = operation.range() else {
            return Ok(());
        };
        // The check has shown that the range is inside `bytes`, whose length is a usize.
        let range = offset_bytes as usize..(offset_bytes + length_bytes) as usize;
        match operation {
            DiskOperation::Read { buffers, .. } => buffers.fill_from(&self.bytes[range]),
            DiskOperation::Write { buffers, .. } => buffers.copy_to(&mut self.bytes[range]),
            DiskOperation::Discard { .. } | DiskOperation::WriteZeroes { .. } => self.bytes[range].fill(0),
            DiskOperation::Flush => {}
        }
        Ok(())
    }
}

impl DiskBackend for MemoryDisk {
    fn properties(&self) -> DiskProperties {
        self.properties
    }

    fn submit(&mut self, request: DiskRequest) -> Result<(), DiskFull> {
        let result = self.perform(&request.operation);
        self.completions.push(DiskCompletion { request, result });
        Ok(())
    }

    fn start(&mut self) {
        if !self.completions.is_empty() {
            // A full counter means that the descriptor is readable already.
            let _ = self.completion.write(1);
        }
    }

    fn completion_fd(&self) -> RawFd {
        self.completion.as_raw_fd()
    }

    fn drain(&mut self, completions: &mut Vec<DiskCompletion>) {
        // An empty counter is a spurious call.
        let _ = self.completion.read();
        completions.append(&mut self.completions);
    }

    fn in_flight_count(&self) -> usize {
        self.completions.len()
    }

    fn inspect(&self) -> Value {
        json!({ "kind": "memory", "in_flight": self.completions.len() })
    }
}
