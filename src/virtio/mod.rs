//! virtio 1.2 devices behind PCI.
//!
//! A device (`VirtioDevice`) is passive: it is handed its queues when the driver sets `DRIVER_OK`, is called on the
//! device event loop when a queue is kicked or one of its descriptors is readable, and gives the queues back at
//! reset. The transport owns status, features, queue set-up, interrupts, pausing and saving of all that, once for
//! all devices.

pub mod balloon;
pub mod block;
pub mod console;
pub mod device;
pub mod features;
pub mod mem;
pub mod net;
pub mod queue_set;
pub mod rng;
pub mod spec;
pub mod status;
#[cfg(test)]
pub(crate) mod testing;
pub mod transport;
