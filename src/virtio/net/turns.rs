//! Whose turn it is: what the queues of a ready driver wait for, and the work that kicks and packets set off.
//!
//! A queue that has more to do than one turn allows, or that must be looked at for another reason than a kick or a
//! packet, is marked *due* and served at the next [`Ready::Again`]; so no queue and no card holds the event loop.

use std::sync::Arc;

use serde::Serialize;

use super::control::{self, Command};
use super::device::Net;
use super::rx::{self, Framing, Received};
use super::tx::{self, Transmitted};
use super::watch::Ready;
use crate::guest_log::GuestLog;
use crate::net::NetBackend;
use crate::virtio::device::{DeviceFault, VirtioInterrupt};
use crate::virtio::queue_set::DeviceQueue;

/// How many packets one queue moves before it is the others' turn.
pub(super) const PACKETS_PER_TURN: usize = 64;
/// How many control commands are answered before it is the others' turn.
const COMMANDS_PER_TURN: usize = 16;

/// What exists between `DRIVER_OK` and reset.
pub(super) struct Active {
    pub queues: Vec<DeviceQueue>,
    pub interrupt: Arc<dyn VirtioInterrupt>,
    pub framing: Framing,
    pub has_status: bool,
    pub has_multi_queue: bool,
    /// The control queue's index.
    pub control: Option<u16>,
    pub control_due: bool,
    pub pairs: Vec<Pair>,
    /// Paused, or faulted: nothing is watched.
    pub parked: bool,
    /// The driver broke the rules; nothing more is done for it.
    pub faulted: bool,
}

/// What one queue pair waits for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Pair {
    /// Packets wait in the backend until the driver posts buffers.
    pub waits_for_buffers: bool,
    /// Packets wait in the transmit queue until the backend has room.
    pub waits_for_room: bool,
    pub receive_due: bool,
    pub transmit_due: bool,
}

/// What the card has done since it was made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct Counters {
    pub rx_packets: u64,
    pub rx_bytes: u64,
    /// Packets that did not fit into the posted buffers or came while the link was down.
    pub rx_dropped: u64,
    pub rx_errors: u64,
    pub tx_packets: u64,
    pub tx_bytes: u64,
    /// Packets that were too long or came while the link was down.
    pub tx_dropped: u64,
    /// Packets that the backend refused.
    pub tx_errors: u64,
}

/// What a queue needs for its turn.
pub(super) struct Port<'a> {
    pub pair_index: u16,
    pub queue: &'a mut DeviceQueue,
    pub backend: &'a mut dyn NetBackend,
    pub counters: &'a mut Counters,
    pub log: &'a GuestLog,
}

impl Pair {
    /// A pair of which nothing is known: both queues must be looked at, and no packet taken before that.
    pub(super) fn unknown() -> Self {
        Self {
            waits_for_buffers: true,
            waits_for_room: false,
            receive_due: true,
            transmit_due: true,
        }
    }
}

impl Net {
    /// Does `work` for a driver that keeps to the rules, and nothing more for one that does not.
    pub(super) fn serve(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<(), DeviceFault>,
    ) -> Result<(), DeviceFault> {
        match &mut self.active {
            Some(active) if !active.faulted => active.parked = false,
            _ => return Ok(()),
        }
        let result = work(self);
        if let (Err(_), Some(active)) = (&result, &mut self.active) {
            (active.faulted, active.parked) = (true, true);
        }
        self.rewatch();
        result
    }

    fn queue(&mut self, queue_index: u16) -> Option<&mut DeviceQueue> {
        let queues = &mut self.active.as_mut()?.queues;
        queues.iter_mut().find(|queue| queue.index() == queue_index)
    }

    pub(super) fn pair(&mut self, pair_index: u16) -> Option<&mut Pair> {
        let pair_index = Some(pair_index).filter(|index| *index < self.active_pair_count)?;
        self.active.as_mut()?.pairs.get_mut(usize::from(pair_index))
    }

    /// The means of queue `queue_index`; `None` when the driver left it disabled or does not use its pair.
    fn port(&mut self, queue_index: u16) -> Option<Port<'_>> {
        let pair_index = Some(queue_index / 2).filter(|index| *index < self.active_pair_count)?;
        let queues = &mut self.active.as_mut()?.queues;
        let queue = queues.iter_mut().find(|queue| queue.index() == queue_index)?;
        Some(Port {
            pair_index,
            queue,
            backend: &mut *self.backend,
            counters: &mut self.counters,
            log: &self.log,
        })
    }

    pub(super) fn run_receive(&mut self, pair_index: u16) -> Result<(), DeviceFault> {
        if !self.is_link_up() {
            if !self.backend_lost {
                rx::discard(&mut *self.backend, pair_index, &mut self.counters);
            }
            return Ok(());
        }
        let Some(framing) = self.active.as_ref().map(|active| active.framing) else {
            return Ok(());
        };
        let Some(port) = self.port(2 * pair_index) else {
            return Ok(());
        };
        let received = rx::receive(port, framing)?;
        if let Some(pair) = self.pair(pair_index) {
            pair.waits_for_buffers = received == Received::WaitForBuffers;
        }
        Ok(())
    }

    pub(super) fn run_transmit(&mut self, pair_index: u16) -> Result<(), DeviceFault> {
        let link_up = self.is_link_up();
        let Some(port) = self.port(2 * pair_index + 1) else {
            return Ok(());
        };
        let transmitted = tx::transmit(port, link_up)?;
        if let Some(pair) = self.pair(pair_index) {
            pair.waits_for_room = transmitted == Transmitted::WaitForRoom;
            pair.transmit_due = transmitted == Transmitted::TurnOver;
            if pair.transmit_due {
                self.watch.again();
            }
        }
        Ok(())
    }

    pub(super) fn run_control(&mut self, queue_index: u16) -> Result<(), DeviceFault> {
        let mut is_done = false;
        for _ in 0..COMMANDS_PER_TURN {
            let Some(queue) = self.queue(queue_index) else {
                return Ok(());
            };
            match control::next_command(queue)? {
                Some(command) => self.carry_out(queue_index, command)?,
                None if queue.enable_kicks()? => {}
                None => {
                    is_done = true;
                    break;
                }
            }
        }
        if let Some(active) = &mut self.active {
            active.control_due = !is_done;
        }
        if !is_done {
            self.watch.again();
        }
        self.queue(queue_index).map_or(Ok(()), DeviceQueue::signal)
    }

    fn carry_out(&mut self, queue_index: u16, command: Command) -> Result<(), DeviceFault> {
        let done = command.pair_count.is_some_and(|count| self.use_pairs(count));
        let queue = self.queue(queue_index);
        queue.map_or(Ok(()), |queue| control::answer(queue, command, done))
    }

    /// The driver wants to use the first `count` pairs (virtio 1.2 §5.1.6.5.5). `false` refuses.
    fn use_pairs(&mut self, count: u16) -> bool {
        let before = self.active_pair_count;
        let Some(active) = &mut self.active else {
            return false;
        };
        let is_enabled = |index| active.queues.iter().any(|queue| queue.index() == index);
        let is_possible = (1..=active.pairs.len()).contains(&usize::from(count))
            && active.has_multi_queue
            && (0..2 * count).all(is_enabled);
        if !is_possible {
            return false;
        }
        for pair in active.pairs.iter_mut().skip(before.min(count).into()) {
            *pair = Pair::unknown();
        }
        // A queue that leaves the backend looks broken to a watcher, so it is not watched from before that.
        self.active_pair_count = before.min(count);
        self.rewatch();
        let result = self.backend.set_active_pair_count(count);
        self.active_pair_count = if result.is_ok() { count } else { before };
        self.watch.again();
        if let Err(error) = &result {
            self.log
                .warn(format_args!("cannot use {count} queue pairs: {error}"));
        }
        result.is_ok()
    }

    /// Serves what is due.
    fn run_due(&mut self) -> Result<(), DeviceFault> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        if std::mem::take(&mut self.announce_link) && active.has_status {
            active.interrupt.signal_config();
        }
        if let Some(control) = active.control.filter(|_| active.control_due) {
            self.run_control(control)?;
        }
        for pair_index in 0..self.active_pair_count {
            let Some(pair) = self.pair(pair_index) else {
                break;
            };
            let receive_due = std::mem::take(&mut pair.receive_due);
            let transmit_due = pair.transmit_due;
            if receive_due {
                self.run_receive(pair_index)?;
            }
            if transmit_due {
                self.run_transmit(pair_index)?;
            }
        }
        Ok(())
    }

    pub(super) fn run_ready(&mut self, ready: Ready) -> Result<(), DeviceFault> {
        match ready {
            Ready::Again => self.run_due(),
            Ready::Pair { lost: true, .. } => {
                self.backend_is_lost();
                Ok(())
            }
            Ready::Pair {
                pair_index,
                readable,
                writable,
                lost: false,
            } => {
                if readable {
                    self.run_receive(pair_index)?;
                }
                if writable {
                    self.run_transmit(pair_index)?;
                }
                Ok(())
            }
        }
    }
}
