//! The card itself: what it offers, its configuration space, its link and what it watches.
//!
//! The transport calls it (see [`VirtioDevice`]); the VM calls [`Net::set_link`] through the same lock.

use std::io;

use serde::Deserialize;
use serde_json::{Value, json};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use vmm_sys_util::epoll::EventSet;

use super::features;
use super::rx::Framing;
use super::saved::NetStateV1;
use super::turns::{Active, Counters, Pair};
use super::watch::Watch;
use crate::guest_log::GuestLog;
use crate::ids::MacAddr;
use crate::net::unplugged::Unplugged;
use crate::net::{NetBackend, QUEUE_PAIR_COUNT_MAX};
use crate::unit::{RestoreError, SaveError};
use crate::virtio::device::{Activation, DeviceEvent, DeviceFault, DeviceType, VirtioDevice};
use crate::virtio::queue_set::DeviceQueue;

/// The largest size of a receive or transmit queue.
const DATA_QUEUE_SIZE_MAX: u16 = 256;
/// The largest size of the control queue.
const CONTROL_QUEUE_SIZE_MAX: u16 = 64;

/// A virtio network card.
pub struct Net {
    mac: MacAddr,
    pub(super) backend: Box<dyn NetBackend>,
    /// What the user wants of the link.
    link_up: bool,
    /// The backend reported that it is gone.
    pub(super) backend_lost: bool,
    /// How many queue pairs the driver uses.
    pub(super) active_pair_count: u16,
    /// The driver may believe in another state of the link than it has now.
    pub(super) announce_link: bool,
    pub(super) counters: Counters,
    pub(super) log: GuestLog,
    pub(super) watch: Watch,
    pub(super) active: Option<Active>,
}

/// Why a network card cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The backend's number of queue pairs is out of range.
    #[error("a network card cannot have {count} queue pairs, the range is 1 to {QUEUE_PAIR_COUNT_MAX}")]
    QueuePairCount { count: u16 },
    /// The host has no more descriptors.
    #[error("the host refused the descriptors of network card {mac}")]
    Host {
        mac: MacAddr,
        #[source]
        source: io::Error,
    },
}

impl Net {
    /// Makes a card with address `mac` and its link up. It has as many queue pairs as `backend`.
    ///
    /// # Errors
    /// [`NetError`] when the backend's number of pairs is out of range or the host has no more descriptors.
    pub fn new(mac: MacAddr, backend: Box<dyn NetBackend>) -> Result<Self, NetError> {
        let pair_count = backend.queue_pair_count();
        if !(1..=QUEUE_PAIR_COUNT_MAX).contains(&pair_count) {
            return Err(NetError::QueuePairCount { count: pair_count });
        }
        Ok(Self {
            mac,
            backend,
            link_up: true,
            backend_lost: false,
            active_pair_count: 1,
            announce_link: false,
            counters: Counters::default(),
            log: GuestLog::new(format!("network card {mac}")),
            watch: Watch::new(pair_count).map_err(|source| NetError::Host { mac, source })?,
            active: None,
        })
    }

    /// Plugs the cable in (`up`) or pulls it. While it is out, packets are dropped in both directions. The driver is
    /// told; one that did not accept `VIRTIO_NET_F_STATUS` takes the link for up always (virtio 1.2 §5.1.4.2).
    pub fn set_link(&mut self, up: bool) {
        let before = self.is_link_up();
        self.link_up = up;
        if self.is_link_up() != before {
            self.link_changed();
        }
    }

    /// Whether the guest has a link.
    pub fn is_link_up(&self) -> bool {
        self.link_up && !self.backend_lost
    }

    /// Hands out the backend for good; closing it may take the host long. The driver sees a card without a link, and what
    /// it asks for is answered as before.
    #[must_use = "dropping the backend closes it"]
    pub fn unplug(&mut self) -> Box<dyn NetBackend> {
        self.watch.clear(&*self.backend);
        let unplugged = Box::new(Unplugged::like(&*self.backend));
        let backend = std::mem::replace(&mut self.backend, unplugged);
        let before = self.is_link_up();
        self.backend_lost = true;
        if before {
            self.link_changed();
        } else {
            self.rewatch();
        }
        backend
    }

    fn link_changed(&mut self) {
        if let Some(active) = &mut self.active {
            if active.has_status {
                active.interrupt.signal_config();
            }
            for pair in &mut active.pairs {
                (pair.receive_due, pair.transmit_due) = (true, true);
            }
            self.watch.again();
            self.rewatch();
        }
    }

    pub(super) fn backend_is_lost(&mut self) {
        if self.backend_lost {
            return;
        }
        log::error!("network card {}: its backend is gone", self.mac);
        let before = self.is_link_up();
        self.backend_lost = true;
        if before {
            self.link_changed();
        }
    }

    /// Watches exactly what can be acted on.
    pub(super) fn rewatch(&mut self) {
        let link_up = self.is_link_up();
        let backend = &*self.backend;
        let (active_pair_count, lost) = (self.active_pair_count, self.backend_lost);
        let Some(active) = self.active.as_ref().filter(|active| !active.parked) else {
            return self.watch.clear(backend);
        };
        self.watch.set(backend, |pair_index| {
            let pair = active.pairs.get(usize::from(pair_index));
            let Some(pair) = pair.filter(|_| pair_index < active_pair_count && !lost) else {
                return EventSet::empty();
            };
            let mut wanted = EventSet::empty();
            wanted.set(EventSet::IN, !pair.waits_for_buffers || !link_up);
            wanted.set(EventSet::OUT, pair.waits_for_room);
            wanted
        });
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn device_features(&self) -> u64 {
        features::offered(&*self.backend)
    }

    fn queue_sizes_max(&self) -> Vec<u16> {
        let pair_count = self.backend.queue_pair_count();
        let mut sizes = vec![DATA_QUEUE_SIZE_MAX; 2 * usize::from(pair_count)];
        if features::has(self.device_features(), VIRTIO_NET_F_CTRL_VQ) {
            sizes.push(CONTROL_QUEUE_SIZE_MAX);
        }
        sizes
    }

    /// `struct virtio_net_config` up to `max_virtqueue_pairs` (virtio 1.2 §5.1.4).
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let status = if self.is_link_up() {
            VIRTIO_NET_S_LINK_UP
        } else {
            0
        } as u16;
        let [m0, m1, m2, m3, m4, m5] = self.mac.bytes();
        let [s0, s1] = status.to_le_bytes();
        let [p0, p1] = self.backend.queue_pair_count().to_le_bytes();
        let config = [m0, m1, m2, m3, m4, m5, s0, s1, p0, p1];
        let from = usize::try_from(offset).map_or(&[][..], |offset| config.get(offset..).unwrap_or_default());
        for (to, byte) in data.iter_mut().zip(from) {
            *to = *byte;
        }
    }

    fn config_write(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceFault> {
        let driver_features = activation.driver_features;
        let has = |bit| features::has(driver_features, bit);
        features::check(driver_features)?;
        let has_multi_queue = has(VIRTIO_NET_F_MQ);
        let pair_count = if has_multi_queue {
            self.backend.queue_pair_count()
        } else {
            1
        };
        if self.active_pair_count > pair_count {
            return Err(DeviceFault::Driver(format!(
                "{} queue pairs are in use, the driver accepted {pair_count}",
                self.active_pair_count
            )));
        }
        let refused = |error: io::Error| DeviceFault::Driver(format!("the network backend refused: {error}"));
        let offloads = features::receive_offloads(driver_features);
        self.backend.set_receive_offloads(offloads).map_err(refused)?;
        self.backend
            .set_active_pair_count(self.active_pair_count)
            .map_err(refused)?;
        self.active = Some(Active {
            queues: activation.queues,
            interrupt: activation.interrupt,
            framing: Framing {
                mergeable: has(VIRTIO_NET_F_MRG_RXBUF),
                segmentation: has(VIRTIO_NET_F_GUEST_TSO4) || has(VIRTIO_NET_F_GUEST_TSO6),
            },
            has_status: has(VIRTIO_NET_F_STATUS),
            has_multi_queue,
            control: has(VIRTIO_NET_F_CTRL_VQ).then_some(2 * pair_count),
            control_due: true,
            pairs: vec![Pair::unknown(); pair_count.into()],
            parked: false,
            faulted: false,
        });
        // The driver may have filled its queues before it was ready.
        self.watch.again();
        self.rewatch();
        Ok(())
    }

    fn event_sources(&self) -> Vec<DeviceEvent> {
        vec![DeviceEvent {
            fd: self.watch.fd(),
            token: 0,
        }]
    }

    fn process_queue(&mut self, queue_index: u16) -> Result<(), DeviceFault> {
        self.serve(|net| {
            if net.active.as_ref().and_then(|active| active.control) == Some(queue_index) {
                return net.run_control(queue_index);
            }
            let pair_index = queue_index / 2;
            if queue_index % 2 == 1 {
                return net.run_transmit(pair_index);
            }
            let waits = net.pair(pair_index).is_some_and(|pair| pair.waits_for_buffers);
            if waits && net.is_link_up() {
                return net.run_receive(pair_index);
            }
            Ok(())
        })
    }

    fn process_event(&mut self, _token: u32, paused: bool) -> Result<(), DeviceFault> {
        if paused {
            // What is ready stays so, and is found when the resumed card looks at its queues.
            if let Some(active) = &mut self.active {
                active.parked = true;
            }
            self.rewatch();
            return Ok(());
        }
        self.serve(|net| {
            net.watch
                .ready()
                .into_iter()
                .try_for_each(|ready| net.run_ready(ready))
        })
    }

    fn queues(&self) -> &[DeviceQueue] {
        self.active.as_ref().map_or(&[], |active| &active.queues)
    }

    fn in_flight_count(&self) -> usize {
        0
    }

    fn reset(&mut self) {
        self.active = None;
        self.active_pair_count = 1;
        self.rewatch();
    }

    fn save(&self) -> Result<Value, SaveError> {
        Ok(serde_json::to_value(NetStateV1 {
            link_up: self.link_up,
            active_pair_count: self.active_pair_count,
        })?)
    }

    fn restore(&mut self, state: &Value) -> Result<(), RestoreError> {
        let state = NetStateV1::deserialize(state)?;
        state.check(self.backend.queue_pair_count())?;
        let NetStateV1 {
            link_up,
            active_pair_count,
        } = state;
        self.link_up = link_up;
        self.active_pair_count = active_pair_count;
        // The backend the driver knew may have been lost, or this one may be.
        self.announce_link = true;
        Ok(())
    }

    fn inspect(&self) -> Value {
        json!({
            "kind": "net",
            "mac": self.mac.to_string(),
            "link_up": self.is_link_up(),
            "backend_lost": self.backend_lost,
            "active_pair_count": self.active_pair_count,
            "counters": self.counters,
            "backend": self.backend.inspect(),
        })
    }
}
