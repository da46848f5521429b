//! The block device (virtio 1.2 §5.2): a disk of the guest, on any [`DiskBackend`](crate::storage::DiskBackend).
//!
//! ```text
//! kick ─ pop ─ request (bytes → plan) ─ backend ─ completion eventfd ─ status byte, used ring, interrupt
//! ```
//!
//! Everything runs on the device event loop and nothing there waits for the disk. `request` decides about a chain
//! without side effects on the ring; `device` owns the rings and what is in flight; `config` is what the driver reads;
//! `saved` is what a saved VM remembers of its disk.

mod config;
mod device;
#[cfg(test)]
mod fuzz_tests;
#[cfg(test)]
mod mock_driver;
#[cfg(test)]
mod refusal_tests;
mod request;
mod saved;
#[cfg(test)]
mod tests;

pub use device::Block;
