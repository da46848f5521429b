//! What a card waits for: one epoll descriptor that holds just the backend's descriptors of interest.
//!
//! The event loop watches the epoll descriptor and nothing else of the card. A backend whose packets nobody can take
//! now (no buffers, card paused) is taken out, so that its readiness wakes nobody.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::guest_log::GuestLog;
use crate::net::NetBackend;

/// How many ready descriptors one look takes; the others are still ready at the next.
const READY_COUNT_MAX: usize = 16;

/// What was found ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ready {
    /// The card itself asked to be called again.
    Again,
    /// The descriptor of a queue pair.
    Pair {
        pair_index: u16,
        readable: bool,
        writable: bool,
        lost: bool,
    },
}

/// The descriptors that the card waits for now.
pub(super) struct Watch {
    epoll: Epoll,
    again: EventFd,
    /// What the epoll descriptor holds for each pair, and for `again` behind them.
    armed: Vec<EventSet>,
    /// The guest decides how often something else is waited for.
    log: GuestLog,
}

impl Watch {
    /// Watches nothing yet.
    ///
    /// # Errors
    /// The host's error when it has no more descriptors.
    pub(super) fn new(pair_count: u16) -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new()?,
            again: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            armed: vec![EventSet::empty(); usize::from(pair_count) + 1],
            log: GuestLog::new("network card"),
        })
    }

    /// The descriptor that is readable while something watched is ready.
    pub(super) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Makes [`Ready::Again`] ready once.
    pub(super) fn again(&self) {
        // Only a full counter can refuse, and then it is ready already.
        let _ = self.again.write(1);
    }

    /// Waits for `wanted` of each pair and for `again` from now on.
    pub(super) fn set(&mut self, backend: &dyn NetBackend, wanted: impl Fn(u16) -> EventSet) {
        for pair_index in 0..backend.queue_pair_count() {
            let fd = backend.readiness(pair_index).as_raw_fd();
            self.arm(pair_index.into(), fd, wanted(pair_index));
        }
        self.arm(self.armed.len() - 1, self.again.as_raw_fd(), EventSet::IN);
    }

    /// Waits for nothing.
    pub(super) fn clear(&mut self, backend: &dyn NetBackend) {
        for pair_index in 0..backend.queue_pair_count() {
            let fd = backend.readiness(pair_index).as_raw_fd();
            self.arm(pair_index.into(), fd, EventSet::empty());
        }
        self.arm(self.armed.len() - 1, self.again.as_raw_fd(), EventSet::empty());
    }

    fn arm(&mut self, index: usize, fd: RawFd, wanted: EventSet) {
        let armed = self.armed[index];
        if armed == wanted {
            return;
        }
        let operation = match (armed.is_empty(), wanted.is_empty()) {
            (true, _) => ControlOperation::Add,
            (_, true) => ControlOperation::Delete,
            _ => ControlOperation::Modify,
        };
        let event = EpollEvent::new(wanted, index as u64);
        match self.epoll.ctl(operation, fd, event) {
            Ok(()) => self.armed[index] = wanted,
            Err(error) => self
                .log
                .warn(format_args!("cannot watch descriptor {fd}: {error}")),
        }
    }

    /// What is ready now, without waiting.
    pub(super) fn ready(&self) -> Vec<Ready> {
        let mut events = [EpollEvent::default(); READY_COUNT_MAX];
        // An interrupted look (EINTR) is repeated, because what is ready stays so.
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        events[..count].iter().map(|event| self.decode(event)).collect()
    }

    fn decode(&self, event: &EpollEvent) -> Ready {
        if event.data() == self.armed.len() as u64 - 1 {
            let _ = self.again.read();
            return Ready::Again;
        }
        let events = EventSet::from_bits_truncate(event.events());
        Ready::Pair {
            pair_index: event.data() as u16,
            readable: events.contains(EventSet::IN),
            writable: events.contains(EventSet::OUT),
            lost: events.intersects(EventSet::ERROR | EventSet::HANG_UP),
        }
    }
}
