//! Host ends: what is watched, what happens at them, and how they come and go.
//!
//! The device's descriptor is readable exactly as long as something here can go on, so a loop that is idle stays so.

use std::os::fd::AsRawFd;

use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use super::device::{BELL, Console, PORTS_MAX, receive_queue};
use crate::virtio::device::DeviceFault;

impl Console {
    /// Something happened at the host end of port `port_index`.
    fn host_event(&mut self, port_index: usize, events: EventSet) -> Result<(), DeviceFault> {
        let Some(port) = self.ports.get_mut(port_index) else {
            return Ok(());
        };
        let hung_up = EventSet::HANG_UP | EventSet::READ_HANG_UP | EventSet::ERROR;
        if events.intersects(hung_up) {
            port.hang_up(self.multiport);
        }
        if port.transmit_blocked && events.intersects(EventSet::OUT | EventSet::HANG_UP | EventSet::ERROR) {
            port.transmit_blocked = false;
            self.transmit(port_index)?;
        }
        if events.intersects(EventSet::IN | hung_up) {
            self.receive(port_index)?;
        }
        Ok(())
    }

    /// Serves everything that the epoll instance reports and the queues with work left.
    pub(super) fn host_events(&mut self) -> Result<(), DeviceFault> {
        let mut events = [EpollEvent::default(); PORTS_MAX + 1];
        let count = self.epoll.wait(0, &mut events).unwrap_or_else(|error| {
            self.log.warn(format_args!("cannot ask for events: {error}"));
            0
        });
        for event in &events[..count] {
            if event.data() == BELL {
                self.door.answer();
            } else {
                let set = EventSet::from_bits_truncate(event.events());
                self.host_event(event.data() as usize, set)?;
            }
        }
        let unfinished = std::mem::take(&mut self.unfinished);
        let queue_count = receive_queue(self.ports.len());
        (0..queue_count)
            .filter(|queue_index| unfinished & (1 << queue_index) != 0)
            .try_for_each(|queue_index| self.serve(queue_index))
    }

    /// Brings host ends, what the driver knows of them, and what is watched up to date, in this order: a host end
    /// that takes another's place is taken up only after the driver was told that the former one is closed.
    pub(super) fn settle(&mut self) -> Result<(), DeviceFault> {
        for port_index in 0..self.ports.len() {
            let port = &mut self.ports[port_index];
            if port.host.is_some() && (port.host_gone || self.door.has_waiting(port_index)) {
                self.let_go(port_index);
            }
        }
        self.send_control()?;
        for (port_index, port) in self.ports.iter_mut().enumerate() {
            if port.host.is_none() && !port.dialogue.told_open {
                port.host = self.door.take(port_index);
            }
        }
        self.send_control()?;
        (0..self.ports.len()).for_each(|port_index| self.watch(port_index));
        Ok(())
    }

    /// Closes the host end of port `port_index`.
    fn let_go(&mut self, port_index: usize) {
        self.set_watch(port_index, None);
        let port = &mut self.ports[port_index];
        port.host = None;
        port.host_gone = false;
        port.host_hung_up = false;
        port.watched = None;
        port.abandon_chain();
        if std::mem::take(&mut port.transmit_blocked) {
            self.call_again(receive_queue(port_index) + 1);
        }
    }

    fn watch(&mut self, port_index: usize) {
        let interest = self.ports[port_index].interest(self.multiport);
        self.set_watch(port_index, interest);
    }

    fn set_watch(&mut self, port_index: usize, interest: Option<EventSet>) {
        let port = &mut self.ports[port_index];
        let Some(host) = &port.host else { return };
        let operation = match (port.watched, interest) {
            (before, now) if before == now => return,
            (None, _) => ControlOperation::Add,
            (Some(_), Some(_)) => ControlOperation::Modify,
            (Some(_), None) => ControlOperation::Delete,
        };
        let event = EpollEvent::new(interest.unwrap_or_else(EventSet::empty), port_index as u64);
        match self.epoll.ctl(operation, host.as_raw_fd(), event) {
            Ok(()) => port.watched = interest,
            Err(error) => {
                let name = &port.name;
                self.log.warn(format_args!("cannot watch port {name}: {error}"));
            }
        }
    }

    pub(super) fn unwatch(&mut self) {
        (0..self.ports.len()).for_each(|port_index| self.set_watch(port_index, None));
    }
}
