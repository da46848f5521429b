//! virtio-rng (virtio 1.2 §5.4): the host's random numbers in the guest's buffers.

mod device;

pub use device::{CHAIN_BYTES_MAX, Rng};
