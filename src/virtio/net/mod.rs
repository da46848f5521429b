//! The network card: virtio 1.2 §5.1, over any [`NetBackend`](crate::net::NetBackend).
//!
//! ```text
//! rx0 tx0 rx1 tx1 … control        one pair unless the backend has more; control only with several pairs
//! ```
//!
//! Packets move between the backend and guest buffers directly. All of it happens on the device event loop, a
//! bounded number of packets at a time. A card that waits, for packets, for buffers or for room in the backend,
//! watches only what it waits for and costs nothing meanwhile.

#![forbid(unsafe_code)]

mod buffers;
mod control;
mod device;
mod features;
mod rx;
mod saved;
mod turns;
mod tx;
mod watch;

pub use device::{Net, NetError};

#[cfg(test)]
mod tests;
