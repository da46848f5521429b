//! The memory device: its queue, its configuration space, and what the host asks of it.
//!
//! The transport calls it on the device event loop (see [`VirtioDevice`]); the VM calls [`Mem::set_requested`] and the
//! like through the same lock (`VirtioPciDevice::with_device`), from any thread.
//!
//! A reset by the driver leaves plugged blocks alone, since the memory may be in use still (§5.15.4); the next driver
//! asks for UNPLUG ALL. The reset of the whole VM unplugs: after `Unit::reset`, while nothing runs, the VM calls
//! [`Mem::power_on`]. `VirtioDevice::reset` cannot tell the two apart.
//!
//! `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE` is offered and not insisted on (§5.15.4 leaves that to the device): a driver
//! that does without it may read unplugged blocks with the CPU, finds nothing there, and must not rely on what it
//! reads. `VIRTIO_MEM_F_ACPI_PXM` is not offered, since the guest has one node.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::host::{MemHost, PlugError};
use super::region::{BLOCK_BYTES, MemConfig, MemError, Region, RequestedError, Response};
use super::request::{Kind, Request};
use super::saved::MemV1;
use crate::guest_log::GuestLog;
use crate::unit::{RestoreError, SaveError};
use crate::virtio::device::{
    Activation, DeviceEvent, DeviceFault, DeviceType, VirtioDevice, VirtioInterrupt,
};
use crate::virtio::queue_set::DeviceQueue;

/// The driver does not touch unplugged memory (§5.15.3).
const VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: u32 = 1;
const QUEUE_SIZE_MAX: u16 = 64;
/// One call answers at most this many requests.
const CALL_REQUESTS_MAX: u32 = 16;
/// The token of the device's request to itself to go on.
const AGAIN_TOKEN: u32 = 0;
/// The size of `struct virtio_mem_config`.
const CONFIG_BYTES: usize = 56;

/// The memory device.
pub struct Mem {
    region: Region,
    host: Arc<dyn MemHost>,
    queues: Vec<DeviceQueue>,
    /// While a driver is there.
    interrupt: Option<Arc<dyn VirtioInterrupt>>,
    /// Readable while requests are left from a call that had done enough.
    again: EventFd,
    log: GuestLog,
}

impl Mem {
    /// Makes the device with nothing plugged and nothing requested.
    ///
    /// # Errors
    /// [`MemError`] when the region is impossible or the host has no eventfd left.
    pub fn new(config: MemConfig, host: Arc<dyn MemHost>) -> Result<Self, MemError> {
        Ok(Self {
            region: Region::new(config, host.clone())?,
            host,
            queues: Vec::new(),
            interrupt: None,
            again: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(MemError::Host)?,
            log: GuestLog::new("memory device"),
        })
    }

    /// Asks the guest to have `requested_bytes` plugged, and tells its driver if that is news. The same amount again
    /// does no harm.
    ///
    /// # Errors
    /// [`RequestedError`] when the amount is not a multiple of [`BLOCK_BYTES`] or larger than the region.
    pub fn set_requested(&mut self, requested_bytes: u64) -> Result<(), RequestedError> {
        if self.region.set_requested(requested_bytes)?
            && let Some(interrupt) = &self.interrupt
        {
            interrupt.signal_config();
        }
        Ok(())
    }

    /// Tells the driver again, if what is plugged is not what is requested: one that could not obey tries anew.
    pub fn remind(&self) {
        if self.plugged_bytes() != self.requested_bytes()
            && let Some(interrupt) = &self.interrupt
        {
            interrupt.signal_config();
        }
    }

    /// What is requested, in bytes.
    pub fn requested_bytes(&self) -> u64 {
        self.region.requested_bytes()
    }

    /// What is plugged, in bytes. More than requested while the guest has not given up enough.
    pub fn plugged_bytes(&self) -> u64 {
        self.region.plugged_bytes()
    }

    /// The part of the region in which the guest may plug blocks at present, in bytes from its start.
    pub fn usable_bytes(&self) -> u64 {
        self.region.usable_bytes()
    }

    /// The whole VM is reset: unplugs everything and keeps what is requested, which the guest plugs again when it is
    /// up. Called after `Unit::reset`, before any vCPU runs.
    ///
    /// # Errors
    /// [`PlugError`] when the host does not take the blocks back; they are plugged still.
    pub fn power_on(&mut self) -> Result<(), PlugError> {
        let before = self.region.plugged_bytes();
        self.region.empty()?;
        if before != 0 {
            self.host.changed(0);
        }
        Ok(())
    }

    /// Serves the queue and reports what changed, also when the driver broke the rules on the way.
    fn serve(&mut self) -> Result<(), DeviceFault> {
        let before = self.region.plugged_bytes();
        let outcome = self.serve_queue();
        let plugged_bytes = self.region.plugged_bytes();
        if plugged_bytes != before {
            self.host.changed(plugged_bytes);
        }
        outcome
    }

    fn serve_queue(&mut self) -> Result<(), DeviceFault> {
        let Some(queue) = self.queues.first_mut() else {
            return Ok(());
        };
        let mut request_count = 0;
        while request_count < CALL_REQUESTS_MAX {
            let Some(request) = Request::next(queue)? else {
                break;
            };
            let response = execute(&mut self.region, &request, &self.log);
            request.answer(queue, response)?;
            request_count += 1;
        }
        if request_count > 0 {
            queue.signal()?;
        }
        if request_count == CALL_REQUESTS_MAX {
            // The counter cannot be full: it is read before each call that could raise it.
            let _ = self.again.write(1);
        }
        Ok(())
    }
}

fn execute(region: &mut Region, request: &Request, log: &GuestLog) -> Response {
    let (address, block_count) = (request.address, request.block_count);
    let response = match request.kind {
        Kind::Plug => region.plug(address, block_count, log),
        Kind::Unplug => region.unplug(address, block_count, log),
        Kind::UnplugAll => region.unplug_all(log),
        Kind::State => region.state(address, block_count),
        Kind::Unknown(_) => Response::Error,
    };
    if response == Response::Error {
        let kind = request.kind;
        log.warn(format_args!(
            "refused {kind:?} of {block_count} blocks at {address:#x}"
        ));
    }
    response
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> DeviceType {
        DeviceType::Mem
    }

    fn device_features(&self) -> u64 {
        1 << VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes_max(&self) -> Vec<u16> {
        vec![QUEUE_SIZE_MAX]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let MemConfig {
            address,
            region_bytes,
            ram_bytes: _,
            slot_bytes: _,
        } = self.region.config();
        // struct virtio_mem_config (§5.15.4); node_id and padding are zero.
        let fields = [
            BLOCK_BYTES,
            0,
            address,
            region_bytes,
            self.region.usable_bytes(),
            self.region.plugged_bytes(),
            self.region.requested_bytes(),
        ];
        let mut config = [0; CONFIG_BYTES];
        for (place, field) in config.chunks_exact_mut(8).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        let start = usize::try_from(offset).map_or(CONFIG_BYTES, |offset| offset.min(CONFIG_BYTES));
        let length = data.len().min(CONFIG_BYTES - start);
        data[..length].copy_from_slice(&config[start..start + length]);
    }

    fn config_write(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceFault> {
        let Activation {
            driver_features: _,
            queues,
            interrupt,
        } = activation;
        self.queues = queues;
        self.interrupt = Some(interrupt);
        Ok(())
    }

    fn event_sources(&self) -> Vec<DeviceEvent> {
        vec![DeviceEvent {
            fd: self.again.as_raw_fd(),
            token: AGAIN_TOKEN,
        }]
    }

    fn process_queue(&mut self, _queue_index: u16) -> Result<(), DeviceFault> {
        self.serve()
    }

    fn process_event(&mut self, _token: u32, paused: bool) -> Result<(), DeviceFault> {
        // A paused device is called for its queue again when it is resumed.
        let _ = self.again.read();
        if paused { Ok(()) } else { self.serve() }
    }

    fn queues(&self) -> &[DeviceQueue] {
        &self.queues
    }

    fn in_flight_count(&self) -> usize {
        0
    }

    fn reset(&mut self) {
        self.queues.clear();
        self.interrupt = None;
    }

    fn save(&self) -> Result<Value, SaveError> {
        Ok(serde_json::to_value(MemV1::new(&self.region))?)
    }

    fn restore(&mut self, state: &Value) -> Result<(), RestoreError> {
        let restored = MemV1::deserialize(state)?.apply(&mut self.region);
        self.host.changed(self.region.plugged_bytes());
        restored
    }

    fn inspect(&self) -> Value {
        json!({
            "requested_bytes": self.region.requested_bytes(),
            "usable_bytes": self.region.usable_bytes(),
            "plugged_bytes": self.region.plugged_bytes(),
        })
    }
}
