//! The supervisor: the one thread that owns a VM.
//!
//! It takes one message after another, asks the pure table what it means, calls one function of `ops`, and publishes.
//! It never waits for the guest, a disk or a vCPU: long work goes to a worker thread or to the vCPUs themselves, and
//! their report comes back through the mailbox. Between messages it sleeps.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::config::{StateDir, VmConfig};
use crate::event::{EndCause, EventKind, ResetCause};
use crate::event_loop::panic_words;
use crate::ids::OperationId;
use crate::state::State;
use crate::vm::cards::Cards;
use crate::vm::error::RequestError;
use crate::vm::guest_events::GuestEvents;
use crate::vm::halt::Halt;
use crate::vm::mailbox::{Mailbox, Message, Notice, Notices, Report, Request};
use crate::vm::operation::{Ended, Operation, OperationKind, Outcome};
use crate::vm::ops::memory::MemoryWork;
use crate::vm::ops::{self, memory, nic_add, nic_remove, power};
use crate::vm::platform::Machine;
use crate::vm::shared::Shared;
use crate::vm::thread_role::ThreadRole;
use crate::vm::transition::{Next, Trigger, may_begin, next};
use crate::vm::work::Works;

/// Everything the supervisor owns.
pub(super) struct Supervisor {
    pub(super) shared: Arc<Shared>,
    pub(super) config: Arc<VmConfig>,
    pub(super) state: State,
    /// Where the VM rests when nothing is in flight: Running or Paused.
    pub(super) rest: State,
    pub(super) flight: Option<Flight>,
    pub(super) machine: Option<Arc<dyn Machine>>,
    /// The vCPUs and units are being brought to a stand, and this is what for.
    pub(super) halt: Option<Halt>,
    /// Builds, resets or tears down the machine.
    pub(super) worker: Option<JoinHandle<()>>,
    /// Everything else that waits for the host or a disk.
    pub(super) works: Works,
    /// The directory that keeps the configuration; locked for as long as the supervisor lives.
    pub(super) state_dir: Option<Arc<StateDir>>,
    /// What is asked of the guest's memory.
    pub(super) memory: MemoryWork,
    /// The network cards of the machine.
    pub(super) cards: Cards,
    /// When which operation that goes on beside others has had its time.
    deadlines: BTreeSet<(Instant, OperationId)>,
    pub(super) end_cause: Option<EndCause>,
    /// Counts the halts.
    pub(super) last_halt: u64,
    /// When workers are not waited for any more, of a machine that ends or a VM that goes.
    pub(super) hung_at: Option<Instant>,
    sender: Sender<Message>,
    generation: u64,
    /// What the guest of this generation has said.
    notices: Arc<Notices>,
    /// What of that is told to the VM's owner, at a bearable pace.
    guest_events: GuestEvents,
    last_operation: u64,
    handles_gone: bool,
}

/// The operation in flight.
pub(super) struct Flight {
    pub operation: Operation,
    pub deadline: Option<Instant>,
}

impl Supervisor {
    pub(super) fn new(shared: Arc<Shared>, state_dir: Option<StateDir>, sender: Sender<Message>) -> Self {
        Self {
            config: shared.config(),
            shared,
            state: State::Off,
            rest: State::Running,
            flight: None,
            machine: None,
            halt: None,
            worker: None,
            works: Works::new(sender.clone()),
            state_dir: state_dir.map(Arc::new),
            memory: MemoryWork::default(),
            cards: Cards::default(),
            deadlines: BTreeSet::new(),
            end_cause: None,
            last_halt: 0,
            hung_at: None,
            sender,
            generation: 0,
            notices: Arc::default(),
            guest_events: GuestEvents::default(),
            last_operation: 0,
            handles_gone: false,
        }
    }

    /// Serves the mailbox until the last handle is gone and nothing of the VM is left.
    pub(super) fn run(mut self, mailbox: &Receiver<Message>) {
        self.shared.own_thread(ThreadRole::Supervisor);
        while !(self.handles_gone && self.state == State::Off && self.works.is_empty()) {
            match self.receive(mailbox) {
                Ok(message) => self.survive(|vm| vm.handle(message)),
                Err(RecvTimeoutError::Timeout) => self.survive(Self::deadline_passed),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let mut events = self.shared.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.close();
    }

    /// Does `act`, which may call code of the embedder's. A panic in it ends the guest by name, and whoever waits for an
    /// answer to it is told that there is none.
    fn survive(&mut self, act: impl FnOnce(&mut Self)) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| act(self))) {
            let reason = panic_words(&*panic);
            log::error!("a device of the vm panicked on the supervisor's thread: {reason}");
            power::guest_off(self, EndCause::DeviceError { reason });
        }
    }

    fn receive(&self, mailbox: &Receiver<Message>) -> Result<Message, RecvTimeoutError> {
        match self.next_deadline() {
            Some(deadline) => match deadline.saturating_duration_since(Instant::now()) {
                // A guest that talks without a pause must not put its deadline off.
                Duration::ZERO => Err(RecvTimeoutError::Timeout),
                left => mailbox.recv_timeout(left),
            },
            None => mailbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let in_flight = self.flight.as_ref().and_then(|flight| flight.deadline);
        let beside = self.deadlines.first().map(|(deadline, _)| *deadline);
        let held = self.guest_events.due();
        let halted = self.halt.as_ref().and_then(Halt::deadline);
        let all = in_flight.into_iter().chain(beside).chain(self.hung_at);
        all.chain(held).chain(halted).min()
    }

    pub(super) fn handle(&mut self, message: Message) {
        match message {
            Message::Request { request, reply } => {
                let answer = self.request(request);
                // A caller that went away meanwhile loses only the answer.
                let _ = reply.send(answer);
            }
            Message::Query(question) => question(self),
            Message::Act(act) => act(self),
            Message::Report { generation, report } if generation == self.generation => self.report(report),
            Message::Report { report, .. } => power::reported_too_late(self, report),
            Message::HandlesGone => {
                self.handles_gone = true;
                if self.state == State::Off {
                    power::wait_for_workers(self);
                }
                power::power_off(self, EndCause::HostPowerOff);
            }
        }
    }

    fn request(&mut self, request: Request) -> Result<Operation, RequestError> {
        let Request { kind, within } = request;
        self.check_may_begin(kind)?;
        let operation = self.begin(kind, within.and_then(|within| Instant::now().checked_add(within)));
        match kind {
            OperationKind::Start => power::start(self),
            OperationKind::Pause => power::pause(self),
            OperationKind::Resume => power::resume(self),
            OperationKind::Reset => power::reset(self, ResetCause::Host),
            OperationKind::ShutDown => power::shut_down(self),
            OperationKind::PowerOff => power::power_off(self, EndCause::HostPowerOff),
            OperationKind::ResizeMemory
            | OperationKind::AddNic
            | OperationKind::RemoveNic
            | OperationKind::ChangeNic => {
                unreachable!("these have requests of their own, with typed answers")
            }
        }
        Ok(operation)
    }

    /// Asks the table whether `kind` may begin now.
    pub(super) fn check_may_begin(&self, kind: OperationKind) -> Result<(), RequestError> {
        let (state, in_flight) = (self.state, self.in_flight());
        if may_begin(kind, state, in_flight) {
            return Ok(());
        }
        Err(match in_flight {
            Some(in_flight) => RequestError::Busy {
                request: kind,
                in_flight,
                state,
            },
            None => RequestError::State { request: kind, state },
        })
    }

    fn report(&mut self, report: Report) {
        match report {
            Report::Built(result) => power::built(self, result),
            Report::VcpuParked { vcpu } => power::vcpu_parked(self, vcpu),
            Report::Ended { cause } => power::guest_ended(self, cause),
            Report::UnitsQuiet { halt } => power::units_quiet(self, halt),
            Report::ResetDone(result) => power::reset_done(self, result),
            Report::TornDown => power::torn_down(self),
            Report::Noticed => self
                .notices
                .take()
                .into_iter()
                .for_each(|notice| self.notice(notice)),
        }
    }

    fn notice(&mut self, notice: Notice) {
        match notice {
            Notice::Power(request) => power::guest_request(self, request),
            Notice::Memory => memory::look(self),
            Notice::HostMemory => memory::host_freed(self),
            Notice::DriverReady { unit, ready } => {
                nic_add::driver_ready(self, &unit, ready);
                self.tell_of_guest(EventKind::DriverReady { unit, ready });
            }
            Notice::Ejected { bdf, asked } => nic_remove::ejected(self, bdf, asked),
            Notice::NeedsReset { unit, reason } => {
                nic_add::driver_ready(self, &unit, false);
                self.tell_of_guest(EventKind::DeviceNeedsReset { unit, reason });
            }
        }
    }

    /// Publishes what the guest can do as often as it likes, now or when its time has come.
    fn tell_of_guest(&mut self, kind: EventKind) {
        if let Some(kind) = self.guest_events.admit(Instant::now(), kind) {
            self.publish(kind);
        }
    }

    fn deadline_passed(&mut self) {
        let now = Instant::now();
        let in_flight = self.flight.as_ref().and_then(|flight| flight.deadline);
        if in_flight.is_some_and(|deadline| deadline <= now) {
            // Only operations that wait for the guest have a deadline, and nothing of them is undone.
            self.end_flight(Outcome::DeadlinePassed);
        }
        while let Some(kind) = self.guest_events.next_due(now) {
            self.publish(kind);
        }
        let halted = self.halt.as_ref().and_then(Halt::deadline);
        if halted.is_some_and(|deadline| deadline <= now) {
            power::give_up_halt(self);
        }
        if self.hung_at.is_some_and(|deadline| deadline <= now) {
            power::workers_hang(self);
        }
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= now
        {
            self.deadlines.pop_first();
            ops::deadline_passed(self, id);
        }
    }

    /// Numbers an operation that goes on beside others. Its kind says what to do when `deadline` has passed.
    pub(super) fn begin_beside<O: Ended>(
        &mut self,
        kind: OperationKind,
        deadline: Option<Instant>,
    ) -> Operation<O> {
        let id = self.next_operation(kind);
        self.deadlines.extend(deadline.map(|deadline| (deadline, id)));
        Operation::begin(id, kind)
    }

    /// Gives an operation that goes on beside others until `deadline`.
    pub(super) fn put_off(&mut self, id: OperationId, deadline: Option<Instant>) {
        self.deadlines.retain(|(_, other)| *other != id);
        self.deadlines.extend(deadline.map(|deadline| (deadline, id)));
    }

    /// Ends an operation that goes on beside others: first the event, then the waiting callers.
    pub(super) fn end_beside<O: Ended>(&mut self, operation: &Operation<O>, outcome: O) {
        self.put_off(operation.id(), None);
        self.publish_end(operation, &outcome);
        operation.end(outcome);
    }

    fn next_operation(&mut self, kind: OperationKind) -> OperationId {
        self.last_operation += 1;
        let id = OperationId(self.last_operation);
        self.publish(EventKind::OperationBegan {
            id,
            operation: kind.as_str(),
        });
        id
    }

    fn publish_end<O: Ended>(&self, operation: &Operation<O>, outcome: &O) {
        self.publish(EventKind::OperationEnded {
            id: operation.id(),
            operation: operation.kind().as_str(),
            ok: outcome.is_done(),
            outcome: outcome.to_string(),
        });
    }

    /// Whether nobody has a handle any more.
    pub(super) fn handles_gone(&self) -> bool {
        self.handles_gone
    }

    /// The kind of the operation in flight.
    pub(super) fn in_flight(&self) -> Option<OperationKind> {
        self.flight.as_ref().map(|flight| flight.operation.kind())
    }

    /// Begins an operation; the one in flight is overtaken by it.
    pub(super) fn begin(&mut self, kind: OperationKind, deadline: Option<Instant>) -> Operation {
        self.end_flight(Outcome::Overtaken { by: kind.as_str() });
        self.shared.set_operation(Some(kind));
        let operation = Operation::begin(self.next_operation(kind), kind);
        self.flight = Some(Flight {
            operation: operation.clone(),
            deadline,
        });
        operation
    }

    /// Ends the operation in flight, if there is one: first the event, then the waiting callers.
    pub(super) fn end_flight(&mut self, outcome: Outcome) {
        if let Some(Flight { operation, .. }) = self.flight.take() {
            self.shared.set_operation(None);
            self.publish_end(&operation, &outcome);
            operation.end(outcome);
        }
    }

    /// Moves as the table says; `false` when the trigger means nothing in this state.
    pub(super) fn step(&mut self, trigger: Trigger) -> bool {
        let to = match next(self.state, trigger) {
            Next::To(state) => state,
            Next::Rest => self.rest,
            Next::Stay => return true,
            Next::Refused | Next::Ignored => return false,
        };
        let from = std::mem::replace(&mut self.state, to);
        if matches!(to, State::Running | State::Paused) {
            self.rest = to;
        }
        self.shared.set_state(to);
        self.publish(EventKind::StateChanged { from, to });
        true
    }

    pub(super) fn publish(&self, kind: EventKind) {
        self.shared
            .events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .publish(kind);
    }

    /// Begins a new generation of the machine; reports of older ones are ignored from now on.
    pub(super) fn new_generation(&mut self) -> Mailbox {
        self.generation += 1;
        self.notices = Arc::default();
        self.guest_events = GuestEvents::default();
        self.mailbox()
    }

    /// The mailbox for the present generation.
    pub(super) fn mailbox(&self) -> Mailbox {
        Mailbox::new(
            self.sender.clone(),
            self.generation,
            self.notices.clone(),
            Arc::downgrade(&self.shared),
        )
    }
}

#[cfg(test)]
mod tests;
