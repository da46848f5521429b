//! The contract of a virtio device: what block, net, console and the others implement, and what they are given.
//!
//! The transport serializes all calls (the device sits in one mutex), calls [`VirtioDevice::process_queue`] and
//! [`VirtioDevice::process_event`] on the device event loop only, and never while the device is paused, except for
//! events, which go on until nothing is in flight; after that nothing of a paused device is watched.

use std::any::Any;
use std::os::fd::RawFd;
use std::sync::Arc;

use serde_json::Value;

use super::queue_set::DeviceQueue;
use crate::unit::{RestoreError, SaveError};

/// A virtio device id (virtio 1.2 §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum DeviceType {
    Net = 1,
    Block = 2,
    Console = 3,
    Rng = 4,
    Balloon = 5,
    Mem = 24,
}

/// The device side of one virtio device.
pub trait VirtioDevice: Any + Send {
    /// The device's type.
    fn device_type(&self) -> DeviceType;

    /// The features of the device itself. The transport adds those of the ring and of virtio 1
    /// (`VIRTIO_F_VERSION_1`, `VIRTIO_F_INDIRECT_DESC`, `VIRTIO_F_EVENT_IDX`).
    fn device_features(&self) -> u64;

    /// The largest size of each queue, a power of two; its length is the number of queues.
    fn queue_sizes_max(&self) -> Vec<u16>;

    /// The driver reads the device-specific configuration. Bytes past its end stay as they are (zero).
    fn config_read(&self, offset: u64, data: &mut [u8]);

    /// The driver writes the device-specific configuration. Writes to read-only fields are ignored.
    fn config_write(&mut self, offset: u64, data: &[u8]);

    /// The driver is ready (`DRIVER_OK`): the device owns its queues from now on.
    ///
    /// # Errors
    /// [`DeviceFault`] when the driver's choice of features or queues cannot work; the transport asks for a reset.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceFault>;

    /// Descriptors of its own that the device wants watched while it is active; tokens are its own, below 0x8000.
    fn event_sources(&self) -> Vec<DeviceEvent>;

    /// The driver kicked queue `queue_index`, or the device was resumed. A spurious call does no harm.
    ///
    /// # Errors
    /// [`DeviceFault`] when the driver broke the rules; the transport sets `DEVICE_NEEDS_RESET`.
    fn process_queue(&mut self, queue_index: u16) -> Result<(), DeviceFault>;

    /// The device's own descriptor `token` is readable. While the device is paused (`paused`), it finishes work in
    /// flight and starts none.
    ///
    /// # Errors
    /// [`DeviceFault`] when the driver broke the rules; the transport sets `DEVICE_NEEDS_RESET`.
    fn process_event(&mut self, token: u32, paused: bool) -> Result<(), DeviceFault>;

    /// The queues while the device is active, empty otherwise. The transport saves them.
    fn queues(&self) -> &[DeviceQueue];

    /// Requests begun whose completion still touches guest memory.
    fn in_flight_count(&self) -> usize;

    /// The driver reset the device, or the VM is reset. Gives up the queues at once; what is in flight completes into
    /// the void, without touching guest memory after `in_flight_count` reached 0 and without waiting here. Until then
    /// [`VirtioDevice::process_event`] goes on, as in a pause, and the driver does not see the end of the reset.
    fn reset(&mut self);

    /// The device's own state (features, status and queues belong to the transport), as its frozen saved type.
    ///
    /// # Errors
    /// [`SaveError`] when the state cannot be expressed.
    fn save(&self) -> Result<Value, SaveError>;

    /// Takes over the device's own state, before it is activated again. The value is untrusted.
    ///
    /// # Errors
    /// [`RestoreError`] when a value is impossible.
    fn restore(&mut self, state: &Value) -> Result<(), RestoreError>;

    /// What the device is doing, for people and tools.
    fn inspect(&self) -> Value;
}

/// What a device is given when the driver is ready.
pub struct Activation {
    /// The features the driver accepted, a subset of those offered.
    pub driver_features: u64,
    /// The queues the driver enabled, in index order; a queue it left disabled is missing.
    pub queues: Vec<DeviceQueue>,
    /// The way to interrupt the driver.
    pub interrupt: Arc<dyn VirtioInterrupt>,
}

/// Interrupts of one virtio device. Callable from any thread, never blocks.
pub trait VirtioInterrupt: Send + Sync {
    /// Tells the driver of used buffers in queue `queue_index`.
    fn signal_queue(&self, queue_index: u16);

    /// Tells the driver that the configuration changed; raises `config_generation`.
    fn signal_config(&self);
}

/// A descriptor that a device wants watched.
#[derive(Debug, Clone, Copy)]
pub struct DeviceEvent {
    /// The descriptor, kept open by the device until it is reset with nothing in flight, or dropped.
    pub fd: RawFd,
    /// What [`VirtioDevice::process_event`] is told.
    pub token: u32,
}

/// The driver broke the rules; the device cannot go on before a reset.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceFault {
    /// A ring cannot be read or written, or its indices are impossible.
    #[error("queue {queue_index}: {reason}")]
    Queue { queue_index: u16, reason: String },
    /// The driver asked for something that the device does not do.
    #[error("{0}")]
    Driver(String),
}
