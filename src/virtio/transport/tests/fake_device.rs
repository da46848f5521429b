//! A device that completes every chain at once, or holds it until it is told to let go.
//!
//! It tells a channel of every call, which is how a test waits for the event loop, and its switches are set through
//! `VirtioPciDevice::with_device` as a user's run-time changes are.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use serde_json::{Value, json};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::unit::{RestoreError, SaveError};
use crate::virtio::device::{
    Activation, DeviceEvent, DeviceFault, DeviceType, VirtioDevice, VirtioInterrupt,
};
use crate::virtio::queue_set::DeviceQueue;

const QUEUE_SIZE_MAX: u16 = 16;
pub const DEVICE_FEATURE: u64 = 1 << 5;
pub const TOKEN_DONE: u32 = 3;

/// What the device was called for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    Activate { driver_features: u64, queues: Vec<u16> },
    Queue(u16),
    Event { paused: bool },
    Reset,
}

pub struct FakeDevice {
    pub calls: Sender<Call>,
    pub queues: Vec<DeviceQueue>,
    pub interrupt: Option<Arc<dyn VirtioInterrupt>>,
    pub config: [u8; 8],
    /// Chains are held until `done` is written.
    pub hold: bool,
    pub in_flight: Vec<(u16, u16)>,
    pub done: Arc<EventFd>,
    pub refuse_activation: bool,
    pub queue_sizes_max: Vec<u16>,
}

impl FakeDevice {
    pub fn new(calls: Sender<Call>) -> Self {
        Self {
            calls,
            queues: Vec::new(),
            interrupt: None,
            config: [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88],
            hold: false,
            in_flight: Vec::new(),
            done: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("the host has eventfds")),
            refuse_activation: false,
            queue_sizes_max: vec![QUEUE_SIZE_MAX; 3],
        }
    }

    fn tell(&self, call: Call) {
        // A test that has seen enough no longer listens.
        let _ = self.calls.send(call);
    }
}

impl VirtioDevice for FakeDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn device_features(&self) -> u64 {
        DEVICE_FEATURE
    }

    fn queue_sizes_max(&self) -> Vec<u16> {
        self.queue_sizes_max.clone()
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            if let Some(value) = self.config.get(offset as usize + index) {
                *byte = *value;
            }
        }
    }

    fn config_write(&mut self, offset: u64, data: &[u8]) {
        for (index, byte) in data.iter().enumerate() {
            if let Some(value) = self.config.get_mut(offset as usize + index) {
                *value = *byte;
            }
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceFault> {
        if self.refuse_activation {
            return Err(DeviceFault::Driver("the device is in a bad mood".to_owned()));
        }
        self.tell(Call::Activate {
            driver_features: activation.driver_features,
            queues: activation.queues.iter().map(DeviceQueue::index).collect(),
        });
        self.queues = activation.queues;
        self.interrupt = Some(activation.interrupt);
        Ok(())
    }

    fn event_sources(&self) -> Vec<DeviceEvent> {
        vec![DeviceEvent {
            fd: self.done.as_raw_fd(),
            token: TOKEN_DONE,
        }]
    }

    fn process_queue(&mut self, queue_index: u16) -> Result<(), DeviceFault> {
        let hold = self.hold;
        let queue = self.queues.iter_mut().find(|queue| queue.index() == queue_index);
        if let Some(queue) = queue {
            while let Some(chain) = queue.pop()? {
                if hold {
                    self.in_flight.push((queue_index, chain.head_index()));
                } else {
                    queue.complete(chain.head_index(), 0)?;
                    queue.signal()?;
                }
            }
        }
        self.tell(Call::Queue(queue_index));
        Ok(())
    }

    fn process_event(&mut self, token: u32, paused: bool) -> Result<(), DeviceFault> {
        assert_eq!(token, TOKEN_DONE);
        let _ = self.done.read();
        for (queue_index, head_index) in self.in_flight.drain(..) {
            let queue = self.queues.iter_mut().find(|queue| queue.index() == queue_index);
            if let Some(queue) = queue {
                queue.complete(head_index, 0)?;
                queue.signal()?;
            }
        }
        self.tell(Call::Event { paused });
        Ok(())
    }

    fn queues(&self) -> &[DeviceQueue] {
        &self.queues
    }

    fn in_flight_count(&self) -> usize {
        self.in_flight.len()
    }

    fn reset(&mut self) {
        self.queues.clear();
        self.interrupt = None;
        self.tell(Call::Reset);
    }

    fn save(&self) -> Result<Value, SaveError> {
        Ok(json!({ "config": self.config }))
    }

    fn restore(&mut self, state: &Value) -> Result<(), RestoreError> {
        self.config = serde_json::from_value(state["config"].clone())?;
        Ok(())
    }

    fn inspect(&self) -> Value {
        json!({})
    }
}
