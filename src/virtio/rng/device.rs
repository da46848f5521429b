//! The entropy device: one queue of buffers that it fills from `/dev/urandom`.
//!
//! Called by the transport on the device event loop. A guest may offer buffers without end, so one call fills at most
//! [`CALL_BYTES_MAX`] and lets the loop's other devices run before it goes on. The device has no state of its own:
//! its saved form is empty.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemory, GuestMemoryMmap, Permissions, ReadVolatile};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::unit::{RestoreError, SaveError};
use crate::virtio::device::{Activation, DeviceEvent, DeviceFault, DeviceType, VirtioDevice};
use crate::virtio::queue_set::{DeviceQueue, descriptors};

/// A chain gets at most this many random bytes; a longer one is returned partly filled, as the specification allows.
pub const CHAIN_BYTES_MAX: usize = 64 << 10;
/// One call fills at most about this many bytes.
const CALL_BYTES_MAX: usize = 64 << 10;
/// One call returns at most this many chains, however short they are.
const CALL_CHAINS_MAX: usize = 64;

const QUEUE_SIZE_MAX: u16 = 64;
/// The token of the device's request to itself to go on.
const AGAIN_TOKEN: u32 = 0;

/// The entropy device.
pub struct Rng {
    source: File,
    /// Readable while buffers are left from a call that had done enough.
    again: EventFd,
    queues: Vec<DeviceQueue>,
    filled_bytes: u64,
}

/// The frozen saved form: nothing.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RngV1 {}

impl Rng {
    /// Makes the device and opens the host's source of random numbers.
    ///
    /// # Errors
    /// The host's error when `/dev/urandom` or an eventfd cannot be opened.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            source: File::open("/dev/urandom")?,
            again: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            queues: Vec::new(),
            filled_bytes: 0,
        })
    }

    fn fill_queue(&mut self) -> Result<(), DeviceFault> {
        let Some(queue) = self.queues.first_mut() else {
            return Ok(());
        };
        let (mut call_bytes, mut chain_count, mut exhausted) = (0, 0, false);
        while !exhausted && call_bytes < CALL_BYTES_MAX && chain_count < CALL_CHAINS_MAX {
            let chain = match queue.pop()? {
                None if queue.enable_kicks()? => queue.pop()?,
                chain => chain,
            };
            let Some(chain) = chain else {
                exhausted = true;
                continue;
            };
            let head_index = chain.head_index();
            let buffers = descriptors(chain, queue.index())?;
            let filled = fill(&self.source, &queue.memory(), &buffers);
            let length_bytes = filled.map_err(|reason| queue.fault(&reason))?;
            queue.complete(head_index, length_bytes as u32)?;
            call_bytes += length_bytes;
            chain_count += 1;
        }
        self.filled_bytes += call_bytes as u64;
        if chain_count > 0 {
            queue.signal()?;
        }
        if !exhausted {
            // The counter cannot be full: it is read before each call that could raise it.
            let _ = self.again.write(1);
        }
        Ok(())
    }
}

/// Fills the driver's `buffers` with up to [`CHAIN_BYTES_MAX`] bytes; returns how many.
fn fill(source: &File, memory: &GuestMemoryMmap, buffers: &[Descriptor]) -> Result<usize, String> {
    let mut source = source;
    let mut filled_bytes = 0;
    for buffer in buffers {
        if !buffer.is_write_only() {
            return Err("a buffer for random bytes is not writable".to_owned());
        }
        let length_bytes = (buffer.len() as usize).min(CHAIN_BYTES_MAX - filled_bytes);
        let outside = |_| "a buffer for random bytes is outside guest memory".to_owned();
        let slices = memory.get_slices(buffer.addr(), length_bytes, Permissions::Write);
        for slice in slices.map_err(outside)? {
            let mut slice = slice.map_err(outside)?;
            source
                .read_exact_volatile(&mut slice)
                .map_err(|error| format!("the host gives no random bytes: {error}"))?;
        }
        filled_bytes += length_bytes;
    }
    Ok(filled_bytes)
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn device_features(&self) -> u64 {
        0
    }

    fn queue_sizes_max(&self) -> Vec<u16> {
        vec![QUEUE_SIZE_MAX]
    }

    fn config_read(&self, _offset: u64, _data: &mut [u8]) {}

    fn config_write(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceFault> {
        self.queues = activation.queues;
        Ok(())
    }

    fn event_sources(&self) -> Vec<DeviceEvent> {
        vec![DeviceEvent {
            fd: self.again.as_raw_fd(),
            token: AGAIN_TOKEN,
        }]
    }

    fn process_queue(&mut self, _queue_index: u16) -> Result<(), DeviceFault> {
        self.fill_queue()
    }

    fn process_event(&mut self, _token: u32, paused: bool) -> Result<(), DeviceFault> {
        // A paused device is called for its queue again when it is resumed.
        let _ = self.again.read();
        if paused { Ok(()) } else { self.fill_queue() }
    }

    fn queues(&self) -> &[DeviceQueue] {
        &self.queues
    }

    fn in_flight_count(&self) -> usize {
        0
    }

    fn reset(&mut self) {
        self.queues.clear();
    }

    fn save(&self) -> Result<Value, SaveError> {
        Ok(serde_json::to_value(RngV1 {})?)
    }

    fn restore(&mut self, state: &Value) -> Result<(), RestoreError> {
        let RngV1 {} = RngV1::deserialize(state)?;
        Ok(())
    }

    fn inspect(&self) -> Value {
        json!({ "filled_bytes": self.filled_bytes })
    }
}

#[cfg(test)]
mod tests;
