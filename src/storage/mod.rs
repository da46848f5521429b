//! Where a disk's bytes are: the completion-based [`DiskBackend`] contract and what implements it.
//!
//! | module | what it holds |
//! |---|---|
//! | `backend` | the contract: requests, completions, properties |
//! | `buffers` | the pieces of guest memory that a request reads or fills |
//! | `raw` | a raw image file or a block device, by io_uring or by a pool of threads |
//! | `memory_disk` | a disk in this process's memory, for tests and scratch space |
//!
//! A backend knows nothing of virtio: `virtio::block` drives one from the device event loop.

mod backend;
mod buffers;
mod memory_disk;
mod raw;
#[cfg(test)]
pub(crate) mod testing;

pub use backend::{DiskBackend, DiskCompletion, DiskFull, DiskOperation, DiskProperties, DiskRequest};
pub use buffers::{BufferError, GuestBuffers};
pub use memory_disk::MemoryDisk;
pub use raw::{OpenError, RawConfig, RawDisk, RawEngine};

/// The unit in which a disk's capacity is counted (virtio 1.2 §5.2.4).
pub const SECTOR_BYTES: u64 = 512;
