//! The supervisor: the one thread that owns a VM.
//!
//! It takes one message after another, asks the pure table what it means, calls one function of `ops`, and publishes.
//! It never waits for the guest, a disk or a vCPU: long work goes to a worker thread or to the vCPUs themselves, and
//! their report comes back through the mailbox. Between messages it sleeps.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::config::{StateDir, VmConfig};
use crate::event::{EndCause, EventKind, ResetCause};
use crate::ids::OperationId;
use crate::state::State;
use crate::vm::cards::Cards;
use crate::vm::error::RequestError;
use crate::vm::mailbox::{Mailbox, Message, Notice, Notices, Report, Request};
use crate::vm::operation::{Ended, Operation, OperationKind, Outcome};
use crate::vm::ops::memory::MemoryWork;
use crate::vm::ops::{self, memory, nic, power};
use crate::vm::platform::{Machine, Platform};
use crate::vm::shared::Shared;
use crate::vm::transition::{Next, Trigger, may_begin, next};
use crate::vm::work::Works;

/// Everything the supervisor owns.
pub(super) struct Supervisor {
    pub(super) shared: Arc<Shared>,
    pub(super) platform: Arc<dyn Platform>,
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
    sender: Sender<Message>,
    generation: u64,
    /// What the guest of this generation has said.
    notices: Arc<Notices>,
    last_operation: u64,
    handles_gone: bool,
}

/// The operation in flight.
pub(super) struct Flight {
    pub operation: Operation,
    pub deadline: Option<Instant>,
}

/// Why the machine is being brought to a stand.
#[derive(Debug, Clone, Copy)]
pub(super) struct Halt {
    /// vCPUs that have not reported yet.
    pub running_vcpu_count: u32,
    /// Whether a reset is to be done while everything stands.
    pub reset: Option<ResetCause>,
}

impl Supervisor {
    pub(super) fn new(
        shared: Arc<Shared>,
        platform: Arc<dyn Platform>,
        state_dir: Option<StateDir>,
        sender: Sender<Message>,
    ) -> Self {
        Self {
            config: shared.config(),
            shared,
            platform,
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
            sender,
            generation: 0,
            notices: Arc::default(),
            last_operation: 0,
            handles_gone: false,
        }
    }

    /// Serves the mailbox until the last handle is gone and nothing of the VM is left.
    pub(super) fn run(mut self, mailbox: &Receiver<Message>) {
        self.shared.own_thread();
        while !(self.handles_gone && self.state == State::Off && self.works.is_empty()) {
            match self.receive(mailbox) {
                Ok(message) => self.handle(message),
                Err(RecvTimeoutError::Timeout) => self.deadline_passed(),
                Err(RecvTimeoutError::Disconnected) => break,
            }
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
        in_flight.into_iter().chain(beside).min()
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Request { request, reply } => {
                let answer = self.request(request);
                // A caller that went away meanwhile loses only the answer.
                let _ = reply.send(answer);
            }
            Message::Query(question) => question(self),
            Message::Act(act) => act(self),
            Message::Report { generation, report } if generation == self.generation => self.report(report),
            Message::Report { .. } => {}
            Message::HandlesGone => {
                self.handles_gone = true;
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
            Report::VcpuParked => power::vcpu_parked(self),
            Report::Ended { cause } => power::guest_off(self, cause),
            Report::UnitsQuiet => power::units_quiet(self),
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
                nic::driver_ready(self, &unit, ready);
                self.publish(EventKind::DriverReady { unit, ready });
            }
            Notice::Ejected { bdf } => nic::ejected(self, bdf),
            Notice::NeedsReset { unit, reason } => {
                self.publish(EventKind::DeviceNeedsReset { unit, reason });
            }
        }
    }

    fn deadline_passed(&mut self) {
        let now = Instant::now();
        let in_flight = self.flight.as_ref().and_then(|flight| flight.deadline);
        if in_flight.is_some_and(|deadline| deadline <= now) {
            // Only operations that wait for the guest have a deadline, and nothing of them is undone.
            self.end_flight(Outcome::DeadlinePassed);
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
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::unit::UnitListener;
    use crate::vm::fake::FakePlatform;

    /// A supervisor that the test drives itself, with a running machine.
    fn running(platform: &FakePlatform) -> (Supervisor, Receiver<Message>) {
        let config = VmConfig::builder("test", "/boot/vmlinuz").build();
        let config = Arc::new(config.expect("the configuration is valid"));
        let (sender, receiver) = channel();
        let platform = Arc::new(platform.clone());
        let mut supervisor = Supervisor::new(Arc::new(Shared::new(config)), platform, None, sender);
        let start = Request {
            kind: OperationKind::Start,
            within: None,
        };
        drop(supervisor.request(start).expect("an off vm can be started"));
        supervisor.handle(receiver.recv().expect("the worker reports"));
        assert_eq!(supervisor.state, State::Running);
        (supervisor, receiver)
    }

    fn shut_down(supervisor: &mut Supervisor, within: Duration) -> Operation {
        let request = Request {
            kind: OperationKind::ShutDown,
            within: Some(within),
        };
        supervisor
            .request(request)
            .expect("a running vm can be shut down")
    }

    #[test]
    fn a_guest_that_talks_all_the_time_does_not_put_its_deadline_off() {
        let (mut supervisor, receiver) = running(&FakePlatform::default());
        drop(shut_down(&mut supervisor, Duration::ZERO));
        let unit = crate::ids::UnitName::new("rng").expect("a short name");
        supervisor.mailbox().driver_ready(&unit, true);
        let received = supervisor.receive(&receiver);
        assert!(matches!(received, Err(RecvTimeoutError::Timeout)), "a message");
    }

    #[test]
    fn a_guest_that_has_obeyed_has_no_deadline_any_more() {
        let platform = FakePlatform::default();
        platform.control().obey_button(true);
        let (mut supervisor, receiver) = running(&platform);
        let operation = shut_down(&mut supervisor, Duration::from_secs(3600));
        supervisor.handle(receiver.recv().expect("the guest obeys"));
        assert_eq!(supervisor.state, State::Stopping);
        let deadline = supervisor.flight.as_ref().map(|flight| flight.deadline);
        assert_eq!(deadline, Some(None), "the operation goes on, without a deadline");
        supervisor.handle(receiver.recv().expect("the machine is torn down"));
        assert!(operation.outcome().is_some_and(|outcome| outcome.is_done()));
    }
}
