//! Events: what happened to a VM, typed, numbered and in order.
//!
//! Every subscriber has a bounded stream of its own. A subscriber that falls behind loses events and is told how many,
//! those first that the guest can cause as often as it likes; it never slows the VM. The supervisor is the only
//! publisher, so numbers have no gaps at the source.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::ids::{Bdf, NicName, OperationId, UnitName};
use crate::state::State;

/// The number of events a stream holds before it loses the oldest of the guest's, or without such the oldest.
pub const STREAM_EVENTS_MAX: usize = 256;

/// One event of a VM.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Event {
    /// Counts from 1 in the order of publication; every event of the VM has the next number.
    pub number: u64,
    /// What happened.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What happened to a VM.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum EventKind {
    /// The VM's state changed.
    StateChanged { from: State, to: State },
    /// An operation began.
    OperationBegan {
        id: OperationId,
        operation: &'static str,
    },
    /// An operation ended; the only final event it has.
    OperationEnded {
        id: OperationId,
        operation: &'static str,
        ok: bool,
        outcome: String,
    },
    /// The guest is gone, and this is why.
    Ended { cause: EndCause },
    /// The guest was reset and boots again.
    Reset { cause: ResetCause },
    /// A driver in the guest took a device or let go of it. Of a guest that does so faster than it can be told, the
    /// last word is told.
    DriverReady { unit: UnitName, ready: bool },
    /// A driver broke the rules; its device does nothing until the driver resets it.
    DeviceNeedsReset { unit: UnitName, reason: String },
    /// The guest's memory is on its way to what was asked for; all in bytes. Told about sixteen times on a way.
    MemoryProgress {
        #[serde(rename = "requested")]
        requested_bytes: u64,
        #[serde(rename = "reached")]
        reached_bytes: u64,
    },
    /// The guest's memory is what was asked for, or will not come closer for the reason given; all in bytes.
    MemorySettled {
        #[serde(rename = "requested")]
        requested_bytes: u64,
        #[serde(rename = "reached")]
        reached_bytes: u64,
        #[serde(rename = "guest_total")]
        guest_total_bytes: Option<u64>,
        reason: &'static str,
    },
    /// The VM goes on with a configuration that its directory did not take; the next change stores it again. The VM would
    /// be opened again with what is stored.
    ConfigNotStored { reason: String },
    /// A network card was added to a running machine: the guest can see it, and the configuration holds it.
    NicAttached {
        name: NicName,
        bdf: Bdf,
        acpi_index: Option<u16>,
    },
    /// A driver in the guest has a network card.
    NicDriverReady { name: NicName },
    /// The guest was asked to let go of a network card.
    NicEjectRequested { name: NicName },
    /// A network card is gone, from machine and configuration.
    NicRemoved { name: NicName, how: NicRemoval },
    /// The guest did not let go of a network card in time; it is still there and works. The guest may let go of it
    /// later.
    NicRemoveRefused { name: NicName },
    /// The guest let go of a network card without being asked. The VM keeps it; the guest has it again after its next
    /// reset, or when it is offered.
    NicReleasedByGuest { name: NicName },
    /// A network card has another name.
    NicRenamed { from: NicName, to: NicName },
    /// The cable of a network card was plugged in or pulled out.
    NicLink { name: NicName, up: bool },
    /// This stream fell behind and lost events.
    Lost { count: u64 },
}

impl EventKind {
    /// Whether a guest can cause such events as often as it likes. They must not drive others out.
    const fn is_of_guest(&self) -> bool {
        match self {
            Self::DriverReady { .. }
            | Self::DeviceNeedsReset { .. }
            | Self::MemoryProgress { .. }
            | Self::NicDriverReady { .. } => true,
            Self::StateChanged { .. }
            | Self::OperationBegan { .. }
            | Self::OperationEnded { .. }
            | Self::Ended { .. }
            | Self::Reset { .. }
            | Self::MemorySettled { .. }
            | Self::NicAttached { .. }
            | Self::NicEjectRequested { .. }
            | Self::NicRemoved { .. }
            | Self::NicReleasedByGuest { .. }
            | Self::NicRemoveRefused { .. }
            | Self::NicRenamed { .. }
            | Self::NicLink { .. }
            | Self::ConfigNotStored { .. }
            | Self::Lost { .. } => false,
        }
    }
}

/// How a network card went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NicRemoval {
    /// The guest let go of it in time.
    Released,
    /// The guest let go of it when nobody waited any more.
    ReleasedLate,
    /// It was taken from the guest.
    Forced,
    /// The guest had been asked for it and was reset.
    Reset,
    /// The guest had been asked for it and ended.
    GuestEnded,
    /// The VM was off.
    Off,
}

impl NicRemoval {
    /// The manner in words.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Released => "the guest let go of it",
            Self::ReleasedLate => "the guest let go of it late",
            Self::Forced => "by force",
            Self::Reset => "with the reset of the guest",
            Self::GuestEnded => "with the end of the guest",
            Self::Off => "while the vm is off",
        }
    }
}

/// Why a guest ended. Only [`EndCause::GuestPowerOff`] and [`EndCause::HostPowerOff`] are orderly.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndCause {
    /// The guest switched itself off (ACPI S5).
    GuestPowerOff,
    /// The host cut the power (`power_off`, or the last handle was dropped).
    HostPowerOff,
    /// A vCPU met a fault that it could not handle, which resets a real machine.
    TripleFault,
    /// The guest's kernel reported its own panic (pvpanic).
    GuestPanic,
    /// The host's KVM could not go on with a vCPU.
    VcpuError { vcpu: u32, reason: String },
    /// A device, or the embedder's code behind it, panicked where all devices are served.
    DeviceError { reason: String },
    /// The VM could not be started.
    StartFailed { reason: String },
}

/// Why a guest was reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResetCause {
    /// The guest asked for it (i8042, ACPI reset register).
    Guest,
    /// The host asked for it (`reset`).
    Host,
}

/// The publishing end; owned by the supervisor.
#[derive(Default)]
pub struct EventLog {
    last_number: u64,
    streams: Vec<Weak<Shared>>,
}

/// A subscriber's bounded view of a VM's events, from the moment of subscription.
pub struct EventStream {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    buffer: Mutex<Buffer>,
    arrived: Condvar,
}

#[derive(Default)]
struct Buffer {
    events: VecDeque<Event>,
    lost_count: u64,
    /// The number of the last that was lost.
    lost_number: u64,
    closed: bool,
}

impl EventLog {
    /// Adds a subscriber that sees everything published from now on.
    pub fn subscribe(&mut self) -> EventStream {
        let shared = Arc::new(Shared::default());
        // Where nothing happens, subscribers still come and go.
        self.streams.retain(|stream| stream.strong_count() > 0);
        self.streams.push(Arc::downgrade(&shared));
        EventStream { shared }
    }

    /// Publishes `kind` to every subscriber.
    pub fn publish(&mut self, kind: EventKind) {
        self.last_number += 1;
        let event = Event {
            number: self.last_number,
            kind,
        };
        self.streams.retain(|stream| match stream.upgrade() {
            Some(stream) => {
                stream.push(event.clone());
                true
            }
            None => false,
        });
    }

    /// Nothing is published any more. A thread that a hung host holds may hold this too, and nobody shall wait for it.
    pub fn close(&mut self) {
        for stream in std::mem::take(&mut self.streams).iter().filter_map(Weak::upgrade) {
            stream.lock().closed = true;
            stream.arrived.notify_all();
        }
    }
}

impl Drop for EventLog {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, event: Event) {
        let mut buffer = self.lock();
        if buffer.events.len() == STREAM_EVENTS_MAX {
            let of_guest = buffer.events.iter().position(|event| event.kind.is_of_guest());
            if let Some(lost) = buffer.events.remove(of_guest.unwrap_or(0)) {
                buffer.lost_count += 1;
                buffer.lost_number = buffer.lost_number.max(lost.number);
            }
        }
        buffer.events.push_back(event);
        self.arrived.notify_all();
    }
}

impl Buffer {
    fn take(&mut self) -> Option<Event> {
        let next = self.events.front().map(|next| next.number);
        if self.lost_count > 0 && next.is_none_or(|next| next > self.lost_number) {
            let count = std::mem::take(&mut self.lost_count);
            return Some(Event {
                number: self.lost_number,
                kind: EventKind::Lost { count },
            });
        }
        self.events.pop_front()
    }
}

impl EventStream {
    /// The next event, waiting for it at most `within`. `None` when none came in time, or none can come any more
    /// because the VM is gone ([`EventStream::is_closed`]).
    ///
    /// In the place of the last of those that were lost there is one [`EventKind::Lost`], with its number.
    pub fn next(&self, within: Duration) -> Option<Event> {
        let deadline = Instant::now().checked_add(within);
        let mut buffer = self.shared.lock();
        loop {
            if let Some(event) = buffer.take() {
                return Some(event);
            }
            if buffer.closed {
                return None;
            }
            buffer = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => return None,
                Some(left) => {
                    let waited = self.shared.arrived.wait_timeout(buffer, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self
                    .shared
                    .arrived
                    .wait(buffer)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Whether the VM is gone; what the stream still holds can be read.
    pub fn is_closed(&self) -> bool {
        self.shared.lock().closed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready(index: usize) -> EventKind {
        let unit = UnitName::new(format!("unit-{index}")).expect("a short name");
        EventKind::DriverReady { unit, ready: true }
    }

    #[test]
    fn a_stream_that_falls_behind_says_how_much_it_lost() {
        let mut log = EventLog::default();
        let stream = log.subscribe();
        (0..STREAM_EVENTS_MAX + 3).for_each(|index| log.publish(ready(index)));
        let lost = stream.next(Duration::ZERO).expect("events are waiting");
        assert_eq!((lost.number, lost.kind), (3, EventKind::Lost { count: 3 }));
        assert_eq!(stream.next(Duration::ZERO).map(|event| event.number), Some(4));
    }

    #[test]
    fn what_a_guest_can_repeat_does_not_drive_out_what_happens_once() {
        let mut log = EventLog::default();
        let stream = log.subscribe();
        let cause = ResetCause::Host;
        log.publish(EventKind::Reset { cause });
        (0..10 * STREAM_EVENTS_MAX).for_each(|index| log.publish(ready(index)));
        log.publish(EventKind::Reset { cause });
        let told: Vec<_> = std::iter::from_fn(|| stream.next(Duration::ZERO)).collect();
        assert!(told.is_sorted_by_key(|event| event.number));
        let resets = told
            .iter()
            .filter(|event| event.kind == EventKind::Reset { cause });
        assert_eq!(resets.count(), 2);
        let lost = told.iter().find_map(|event| match event.kind {
            EventKind::Lost { count } => Some((event.number, count)),
            _ => None,
        });
        let lost_count = (9 * STREAM_EVENTS_MAX + 2) as u64;
        assert_eq!(lost, Some((lost_count + 1, lost_count)));
    }

    #[test]
    fn a_stream_ends_with_its_vm_and_keeps_what_it_has() {
        let mut log = EventLog::default();
        let stream = log.subscribe();
        log.publish(ready(1));
        drop(log);
        assert!(stream.is_closed());
        assert_eq!(stream.next(Duration::MAX).map(|event| event.number), Some(1));
        assert_eq!(stream.next(Duration::MAX), None);
    }

    #[test]
    fn a_dropped_stream_costs_nothing() {
        let mut log = EventLog::default();
        for _ in 0..100 {
            drop(log.subscribe());
        }
        assert_eq!(log.streams.len(), 1, "nothing was published yet");
        log.publish(ready(1));
        assert!(log.streams.is_empty());
    }
}
