//! What stands in the transport where a device was that its owner has taken away.
//!
//! A vCPU or the event loop may be in the middle of an access to the device, and keeps the transport until it is done.
//! The device itself, and with it what it holds on the host, is gone by then: what comes late finds this, which holds
//! nothing, answers zeros and is never made ready.

use serde_json::{Value, json};

use crate::unit::{RestoreError, SaveError};
use crate::virtio::device::{Activation, DeviceEvent, DeviceFault, DeviceType, VirtioDevice};
use crate::virtio::queue_set::DeviceQueue;

/// No device any more, of the type that was there.
pub struct Gone(pub DeviceType);

impl VirtioDevice for Gone {
    fn device_type(&self) -> DeviceType {
        self.0
    }

    fn device_features(&self) -> u64 {
        0
    }

    fn queue_sizes_max(&self) -> Vec<u16> {
        Vec::new()
    }

    fn config_read(&self, _offset: u64, _data: &mut [u8]) {}

    fn config_write(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, _activation: Activation) -> Result<(), DeviceFault> {
        Err(DeviceFault::Driver("the device is gone".to_owned()))
    }

    fn event_sources(&self) -> Vec<DeviceEvent> {
        Vec::new()
    }

    fn process_queue(&mut self, _queue_index: u16) -> Result<(), DeviceFault> {
        Ok(())
    }

    fn process_event(&mut self, _token: u32, _paused: bool) -> Result<(), DeviceFault> {
        Ok(())
    }

    fn queues(&self) -> &[DeviceQueue] {
        &[]
    }

    fn in_flight_count(&self) -> usize {
        0
    }

    fn reset(&mut self) {}

    fn save(&self) -> Result<Value, SaveError> {
        Ok(Value::Null)
    }

    fn restore(&mut self, _state: &Value) -> Result<(), RestoreError> {
        Ok(())
    }

    fn inspect(&self) -> Value {
        json!({ "gone": true })
    }
}
