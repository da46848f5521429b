//! The contract between a disk device and the place its bytes are kept.
//!
//! A backend takes requests and answers each with exactly one completion, in any order:
//!
//! ```text
//! submit, submit, … → start → (descriptor becomes readable) → drain → completions
//! ```
//!
//! No method waits for I/O. A completion hands the request back, so that a wrapper (throttling, change tracking,
//! surviving lost storage) can look at its range, hold it, and submit it again later in the order it chooses.
//! The values in a request come from a guest: a backend refuses impossible ones and never panics.

use std::io;
use std::os::fd::RawFd;

use serde_json::Value;

use super::buffers::GuestBuffers;

/// A place where the bytes of one disk are kept.
///
/// Owned by one device and called on one thread at a time. **Dropping** a backend never waits: requests that the host
/// has begun go on without it, and whatever carries them out keeps their buffers alive until they have ended.
pub trait DiskBackend: Send {
    /// The disk's size and abilities; the same for the whole life of the backend.
    fn properties(&self) -> DiskProperties;

    /// Takes a request. Nothing needs to happen before [`DiskBackend::start`]. A request that cannot be carried out
    /// is taken as well, and fails in its completion.
    ///
    /// # Errors
    /// [`DiskFull`] gives the request back when there is no room for it. It is only returned while other requests are
    /// in flight; after the next completion there is room again.
    fn submit(&mut self, request: DiskRequest) -> Result<(), DiskFull>;

    /// Begins what was submitted since the last call. To be called once after a batch of requests.
    fn start(&mut self);

    /// A descriptor that is readable whenever a completion may be waiting; it stays the same and open while the
    /// backend lives. [`DiskBackend::drain`] makes it unreadable.
    fn completion_fd(&self) -> RawFd;

    /// Appends the completions that have arrived to `completions`. Spurious calls do no harm.
    fn drain(&mut self, completions: &mut Vec<DiskCompletion>);

    /// Requests taken whose completion was not drained yet. Only while it is not 0 may guest memory be touched.
    fn in_flight_count(&self) -> usize;

    /// What the backend is and does, for people and tools.
    fn inspect(&self) -> Value;
}

/// A disk's size and abilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskProperties {
    /// The size in bytes, a multiple of 512.
    pub capacity_bytes: u64,
    /// Whether requests that change data fail.
    pub read_only: bool,
    /// The smallest unit that the host addresses, a power of two from 512.
    pub logical_block_bytes: u32,
    /// The unit that the host writes without reading first, a power of two, not below the logical block.
    pub physical_block_bytes: u32,
    /// Whether [`DiskOperation::Discard`] can free space. The operation succeeds in any case.
    pub discard: bool,
    /// Whether [`DiskOperation::WriteZeroes`] is more than writing zeros one by one.
    pub write_zeroes: bool,
}

/// One request to a disk.
#[derive(Debug)]
pub struct DiskRequest {
    /// Chosen by whoever submits; not interpreted by the backend.
    pub id: u64,
    /// What is to be done.
    pub operation: DiskOperation,
}

/// What is asked of a disk. Offsets and lengths are in bytes; no length is 0.
#[derive(Debug)]
pub enum DiskOperation {
    /// Fill the buffers with the bytes from the offset on.
    Read {
        offset_bytes: u64,
        buffers: GuestBuffers,
    },
    /// Write the buffers from the offset on.
    Write {
        offset_bytes: u64,
        buffers: GuestBuffers,
    },
    /// Make every write that completed before this request was submitted survive a crash of the host.
    Flush,
    /// The guest no longer needs the range; what it reads there afterwards is not defined. A hint: it succeeds where
    /// the host cannot free space.
    Discard { offset_bytes: u64, length_bytes: u64 },
    /// Make the range read as zeros; with `unmap` its space may be freed.
    WriteZeroes {
        offset_bytes: u64,
        length_bytes: u64,
        unmap: bool,
    },
}

/// The end of a request.
#[derive(Debug)]
pub struct DiskCompletion {
    /// The request as it was submitted.
    pub request: DiskRequest,
    /// How it ended. An error of the host keeps its number (`raw_os_error`), so that lost storage can be told from a
    /// bad sector; `EINVAL` and `EPERM` are the refusals of [`DiskOperation::check`].
    pub result: io::Result<()>,
}

/// There is no room for another request now. Holds the request that was refused.
#[derive(Debug, thiserror::Error)]
#[error("the disk has no room for another request before one completes")]
pub struct DiskFull(pub DiskRequest);

impl DiskOperation {
    /// The range that the operation touches, as offset and length; `None` for a flush.
    pub fn range(&self) -> Option<(u64, u64)> {
        match self {
            Self::Read {
                offset_bytes,
                buffers,
            }
            | Self::Write {
                offset_bytes,
                buffers,
            } => Some((*offset_bytes, buffers.length_bytes())),
            Self::Discard {
                offset_bytes,
                length_bytes,
            }
            | Self::WriteZeroes {
                offset_bytes,
                length_bytes,
                unmap: _,
            } => Some((*offset_bytes, *length_bytes)),
            Self::Flush => None,
        }
    }

    /// Whether the disk may hold other bytes afterwards.
    pub fn changes_data(&self) -> bool {
        match self {
            Self::Write { .. } | Self::Discard { .. } | Self::WriteZeroes { .. } => true,
            Self::Read { .. } | Self::Flush => false,
        }
    }

    /// Checks the operation against a disk. Every backend refuses what this refuses.
    ///
    /// # Errors
    /// `EPERM` for a change of a read-only disk, `EINVAL` for a range that is empty or passes the end.
    pub fn check(&self, properties: &DiskProperties) -> io::Result<()> {
        if self.changes_data() && properties.read_only {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        if let Some((offset_bytes, length_bytes)) = self.range() {
            let end = offset_bytes.checked_add(length_bytes);
            if length_bytes == 0 || end.is_none_or(|end| end > properties.capacity_bytes) {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(read_only: bool) -> DiskProperties {
        DiskProperties {
            capacity_bytes: 4096,
            read_only,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            discard: true,
            write_zeroes: true,
        }
    }

    fn discard(offset_bytes: u64, length_bytes: u64) -> DiskOperation {
        DiskOperation::Discard {
            offset_bytes,
            length_bytes,
        }
    }

    fn refusal(operation: &DiskOperation, read_only: bool) -> Option<i32> {
        let result = operation.check(&disk(read_only));
        result.err().and_then(|error| error.raw_os_error())
    }

    #[test]
    fn ranges_are_checked_to_the_last_byte() {
        assert_eq!(refusal(&discard(0, 4096), false), None);
        assert_eq!(refusal(&discard(4095, 1), false), None);
        assert_eq!(refusal(&discard(4095, 2), false), Some(libc::EINVAL));
        assert_eq!(refusal(&discard(0, 0), false), Some(libc::EINVAL));
        assert_eq!(refusal(&discard(u64::MAX, 2), false), Some(libc::EINVAL));
    }

    #[test]
    fn a_read_only_disk_refuses_changes_and_allows_flushes() {
        assert_eq!(refusal(&discard(0, 512), true), Some(libc::EPERM));
        assert_eq!(refusal(&DiskOperation::Flush, true), None);
    }
}
