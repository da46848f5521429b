//! Resizing a guest's memory: what was asked of it, how far it is, and how that ends.
//!
//! ```text
//! resize ─ plan ─ the host's promise ─ (the pending one withdrawn) ─ setting stored ─ guest asked
//! change reported ─ look ─ reached? ─ guest asked for its total ─ told ─ Complete
//! deadline ─ why not? ─ rest withdrawn or kept
//! ```
//! A guest that is reset or started again has only its start-up size, and is asked for the setting anew; an operation
//! goes on meanwhile, and its deadline stays. Nobody polls: each look follows a report of the machine. A guest that has
//! obeyed has a second to count what it was given, and then the operation ends: the same alarm serves for that.

use std::time::{Duration, Instant};

use crate::config::ByteSize;
use crate::event::EventKind;
use crate::ids::OperationId;
use crate::memory::host::HostMemoryError;
use crate::state::State;
use crate::vm::memory::machine::{MachineMemory, Observed};
use crate::vm::memory::plan::{Plan, Span, Told, assigned_bytes};
use crate::vm::memory::way::Way;
use crate::vm::memory::{AtDeadline, MemoryOutcome, MemoryReason, MemoryStatus, ResizeError, ResizeOptions};
use crate::vm::operation::{ErrorChain, Operation, OperationKind};
use crate::vm::supervisor::Supervisor;

/// A guest that has obeyed is asked for its total again for that long, at its own pace, while it has not counted all that
/// it was given. One that leaves plugged memory offline never does, and one may not answer at all.
const COUNTING_MAX: Duration = Duration::from_secs(1);

/// The host does not have what a starting guest was given before; the reason of its event, as of a refused request.
const REFUSED_BY_HOST: &str = "host";

/// What is asked of the guest's memory.
#[derive(Default)]
pub(in crate::vm) struct MemoryWork {
    /// What the guest of the present machine told last.
    told: Option<Told>,
    told_count: u64,
    asked: Option<Asked>,
    pending: Option<Pending>,
    /// While what is asked for is not settled: what the VM's size may come to be.
    span: Option<Span>,
    /// The host did not have what the guest was to be given when it began.
    waits_for_host: bool,
    storing: Storing,
}

/// How the setting gets into the VM's directory.
#[derive(Default)]
struct Storing {
    going_on_count: u32,
    /// What was to be stored last is not.
    failed: bool,
}

/// What the guest of the present machine is asked for.
struct Asked {
    plan: Plan,
    way: Way,
}

/// The operation that waits for it.
struct Pending {
    operation: Operation<MemoryOutcome>,
    target_bytes: u64,
    plan: Plan,
    at_deadline: AtDeadline,
    began: Instant,
    deadline: Option<Instant>,
    /// What the guest had last, and since when.
    seen: Observed,
    seen_since: Instant,
    /// What the guest had told before.
    told_before: Option<Told>,
    /// The guest has obeyed and was asked for its total, after it had told so often.
    total_asked: Option<u64>,
}

/// A user asks for `target_bytes`.
///
/// # Errors
/// [`ResizeError`]; nothing has changed then.
pub fn resize(
    vm: &mut Supervisor,
    target_bytes: u64,
    options: ResizeOptions,
) -> Result<Operation<MemoryOutcome>, ResizeError> {
    vm.check_may_begin(OperationKind::ResizeMemory)?;
    let config = vm.config.clone();
    let plan = Plan::new(target_bytes, config.memory(), config.version())?;
    promise(vm, &plan).map_err(|source| ResizeError::Host {
        target: ByteSize(target_bytes),
        source,
    })?;
    let now = Instant::now();
    let deadline = now.checked_add(options.within);
    if let Some(operation) = join(vm, &plan, options.at_deadline, deadline) {
        return Ok(operation);
    }
    end(vm, MemoryReason::Withdrawn);
    let span = vm.memory.span.unwrap_or(Span::at(config.memory().assigned_bytes));
    vm.memory.span = Some(span.with(plan.requested_bytes));
    remember(vm, plan.requested_bytes);
    let operation = vm.begin_beside(OperationKind::ResizeMemory, deadline);
    vm.memory.pending = Some(Pending {
        operation: operation.clone(),
        target_bytes,
        plan,
        at_deadline: options.at_deadline,
        began: now,
        deadline,
        seen: observe(vm),
        seen_since: now,
        told_before: vm.memory.told,
        total_asked: None,
    });
    ask(vm, plan, true);
    look(vm);
    Ok(operation)
}

/// What memory the VM has. Asks the guest for its total, so that a later call knows it.
pub fn status(vm: &Supervisor) -> MemoryStatus {
    let memory = *vm.config.memory();
    let machine = vm.machine.as_ref().map(|machine| machine.memory());
    let now = machine.map(|machine| machine.observe());
    if vm.state == State::Running {
        // Without a driver nothing is known.
        machine.map(MachineMemory::ask_guest_total);
    }
    MemoryStatus {
        startup_bytes: memory.startup_bytes,
        maximum_bytes: memory.maximum_bytes,
        requested_bytes: memory.assigned_bytes,
        assigned_bytes: now.map_or(0, |now| assigned_bytes(memory.startup_bytes, &now)),
        guest_total_bytes: now.and_then(|now| now.guest_total_bytes),
        resident_bytes: machine.map_or(0, |machine| machine.resident_bytes()),
        stored: vm.memory.storing.going_on_count == 0 && !vm.memory.storing.failed,
    }
}

/// A guest begins with its start-up size, after a start or a reset: it is asked for the setting. What the host does not
/// have then it is asked for when another VM gives something back.
pub fn started(vm: &mut Supervisor) {
    let config = vm.config.clone();
    let plan = match Plan::new(config.memory().assigned_bytes, config.memory(), config.version()) {
        Ok(plan) => plan,
        // A configuration holds a possible size; the guest keeps its start-up size otherwise.
        Err(error) => return log::error!("vm {}: {error}", config.name()),
    };
    if let Err(error) = promise(vm, &plan) {
        if std::mem::replace(&mut vm.memory.waits_for_host, true) {
            return;
        }
        log::warn!("vm {}: the guest keeps its start-up size: {error}", config.name());
        return vm.publish(EventKind::MemorySettled {
            requested_bytes: plan.requested_bytes,
            reached_bytes: config.memory().startup_bytes,
            guest_total_bytes: None,
            reason: REFUSED_BY_HOST,
        });
    }
    ask(vm, plan, false);
    look(vm);
}

/// The host may have what it refused before.
pub fn host_freed(vm: &mut Supervisor) {
    if vm.memory.waits_for_host && vm.state != State::Stopping {
        started(vm);
    }
}

/// The machine reports a change.
pub fn look(vm: &mut Supervisor) {
    let Some(machine) = vm.machine.clone().filter(|_| vm.state != State::Stopping) else {
        // Of a VM that is off, the setting is all there is to change.
        return match vm.memory.storing {
            Storing {
                going_on_count: 0,
                failed: false,
            } => end(vm, MemoryReason::Stored),
            Storing {
                going_on_count: 0,
                failed: true,
            } => end(vm, MemoryReason::NotStored),
            Storing {
                going_on_count: _, ..
            } => {}
        };
    };
    let now = machine.memory().observe();
    tell(vm, &now);
    listen(vm, &now);
    let Some(plan) = vm.memory.asked.as_ref().map(|asked| asked.plan) else {
        return;
    };
    let startup_bytes = vm.config.memory().startup_bytes;
    let held_bytes = assigned_bytes(startup_bytes, &now).max(plan.requested_bytes);
    // What the guest gave back may be promised to others. What it took back from its balloon it has, promised or not.
    let _ = machine.memory().promise(held_bytes, true);
    // A guest that did its first step is asked for the next one.
    machine.memory().request(&plan.step(&now), false);
    let (running, told) = (vm.state == State::Running, vm.memory.told);
    let Some(pending) = &mut vm.memory.pending else {
        if plan.is_reached(&now) {
            settle(vm, &now);
        }
        return;
    };
    pending.see(&now);
    if !plan.is_reached(&now) {
        pending.total_asked = None;
        return;
    }
    let is_told = match pending.total_asked {
        Some(count) if now.told_count == count => return,
        Some(_) => pending.is_credible(told),
        None => false,
    };
    // A guest that stands still tells nothing.
    if !is_told && running && machine.memory().ask_guest_total() {
        if pending.total_asked.replace(now.told_count).is_none() {
            let (id, deadline) = (pending.operation.id(), pending.counting_end());
            vm.put_off(id, Some(deadline));
        }
        return;
    }
    end(vm, MemoryReason::Complete);
}

/// The deadline of operation `id` has passed, or its guest has had the time to count what it was given.
pub fn deadline_passed(vm: &mut Supervisor, id: OperationId) {
    let now = observe(vm);
    let (running, is_off) = (vm.state == State::Running, vm.machine.is_none());
    let pending = vm.memory.pending.as_mut();
    let Some(pending) = pending.filter(|pending| pending.operation.id() == id) else {
        return;
    };
    let reason = if is_off {
        // Its directory may still take it.
        MemoryReason::Deadline
    } else if pending.plan.is_reached(&now) {
        // Only its total the guest did not tell.
        MemoryReason::Complete
    } else if pending.deadline.is_none_or(|deadline| deadline > Instant::now()) {
        // It had obeyed, and does so no more: it has its time as before.
        pending.total_asked = None;
        let deadline = pending.deadline;
        return vm.put_off(id, deadline);
    } else if running {
        pending.shortfall(&now)
    } else {
        // A guest that stands still refuses nothing.
        MemoryReason::Deadline
    };
    let at_deadline = pending.at_deadline;
    if reason != MemoryReason::Complete && !is_off && at_deadline == AtDeadline::Withdraw {
        withdraw(vm, &now);
    }
    end(vm, reason);
    // What is asked for no more is not promised any more.
    look(vm);
}

/// Asks no more of the guest than it has now, or than the VM had before.
fn withdraw(vm: &mut Supervisor, now: &Observed) {
    let config = vm.config.clone();
    let memory = config.memory();
    let reached_bytes = assigned_bytes(memory.startup_bytes, now);
    let span = vm.memory.span.take().unwrap_or(Span::at(memory.assigned_bytes));
    let kept_bytes = span
        .closest(reached_bytes)
        .clamp(memory.minimum_bytes, memory.maximum_bytes);
    let plan = match Plan::new(kept_bytes, memory, config.version()) {
        Ok(plan) if kept_bytes != reached_bytes => plan,
        // The guest may have blocks and a balloon at once; it keeps both.
        Ok(_) | Err(_) => Plan::as_is(memory.startup_bytes, now),
    };
    remember(vm, kept_bytes);
    ask(vm, plan, false);
}

/// The guest is gone. What was asked for stays the VM's setting.
pub fn guest_ended(vm: &mut Supervisor) {
    end(vm, MemoryReason::GuestEnded);
    vm.memory = MemoryWork {
        storing: std::mem::take(&mut vm.memory.storing),
        ..MemoryWork::default()
    };
}

/// Lets a caller that asks for the same share the pending operation.
fn join(
    vm: &mut Supervisor,
    plan: &Plan,
    at_deadline: AtDeadline,
    deadline: Option<Instant>,
) -> Option<Operation<MemoryOutcome>> {
    let pending = vm
        .memory
        .pending
        .as_mut()
        .filter(|pending| pending.plan == *plan)?;
    pending.at_deadline = at_deadline;
    // No deadline is later than any.
    pending.deadline = match (pending.deadline, deadline) {
        (Some(old), Some(new)) => Some(old.max(new)),
        (None, _) | (_, None) => None,
    };
    let operation = pending.operation.clone();
    // A guest that has obeyed and counts has its second all the same.
    if pending.total_asked.is_none() {
        let deadline = pending.deadline;
        vm.put_off(operation.id(), deadline);
    }
    if let Some(machine) = &vm.machine {
        let memory = machine.memory();
        memory.request(&plan.step(&memory.observe()), true);
    }
    Some(operation)
}

/// Has the host promise what `plan` needs, unless over-commit is allowed.
fn promise(vm: &Supervisor, plan: &Plan) -> Result<(), HostMemoryError> {
    match &vm.machine {
        Some(machine) => {
            let overcommit = vm.config.memory().overcommit;
            let held_bytes = assigned_bytes(vm.config.memory().startup_bytes, &machine.memory().observe());
            machine
                .memory()
                .promise(plan.requested_bytes.max(held_bytes), overcommit)
        }
        None => Ok(()),
    }
}

/// Makes `requested_bytes` the setting.
fn remember(vm: &mut Supervisor, requested_bytes: u64) {
    if vm.config.memory().assigned_bytes == requested_bytes && !vm.memory.storing.failed {
        return;
    }
    let config = match vm.config.with_assigned_memory(requested_bytes) {
        Ok(config) => config,
        Err(error) => return log::error!("vm {}: {error}", vm.config.name()),
    };
    vm.memory.storing.going_on_count += 1;
    vm.change_config(config, |vm, stored| {
        vm.memory.storing.going_on_count -= 1;
        vm.memory.storing.failed = stored.is_err();
        if let Err(error) = stored {
            let reason = ErrorChain(&error).to_string();
            log::error!(
                "vm {}: the size of its memory is not stored: {reason}",
                vm.config.name()
            );
            vm.publish(EventKind::ConfigNotStored { reason });
        }
        if vm.machine.is_none() {
            look(vm);
        }
    });
}

/// Asks the guest for `plan`; one that was asked for the same before tries again if this `insists`.
fn ask(vm: &mut Supervisor, plan: Plan, insists: bool) {
    let Some(machine) = &vm.machine else { return };
    let now = machine.memory().observe();
    let from_bytes = assigned_bytes(vm.config.memory().startup_bytes, &now);
    machine.memory().request(&plan.step(&now), insists);
    vm.memory.waits_for_host = false;
    let way = Way::new(from_bytes, plan.requested_bytes, plan.is_reached(&now));
    vm.memory.asked = Some(Asked { plan, way });
}

fn observe(vm: &Supervisor) -> Observed {
    let machine = vm.machine.as_ref();
    machine.map_or_else(Observed::default, |machine| machine.memory().observe())
}

/// Tells of progress, if it is worth it.
fn tell(vm: &mut Supervisor, now: &Observed) {
    let reached_bytes = assigned_bytes(vm.config.memory().startup_bytes, now);
    let Some(asked) = &mut vm.memory.asked else { return };
    let requested_bytes = asked.plan.requested_bytes;
    if asked.way.is_news(reached_bytes, Instant::now()) {
        vm.publish(EventKind::MemoryProgress {
            requested_bytes,
            reached_bytes,
        });
    }
}

/// Takes note of what the guest told.
fn listen(vm: &mut Supervisor, now: &Observed) {
    if now.told_count == vm.memory.told_count {
        return;
    }
    vm.memory.told_count = now.told_count;
    vm.memory.told = now.guest_total_bytes.map(|total_bytes| Told {
        assigned_bytes: assigned_bytes(vm.config.memory().startup_bytes, now),
        total_bytes,
    });
}

/// Tells once that the guest has obeyed, without an operation that waits for it.
fn settle(vm: &mut Supervisor, now: &Observed) {
    vm.memory.span = None;
    let asked = vm.memory.asked.as_mut();
    let Some(requested_bytes) =
        asked.and_then(|asked| asked.way.settle().then_some(asked.plan.requested_bytes))
    else {
        return;
    };
    vm.publish(EventKind::MemorySettled {
        requested_bytes,
        reached_bytes: requested_bytes,
        guest_total_bytes: now.guest_total_bytes,
        reason: MemoryReason::Complete.as_str(),
    });
}

/// Ends the pending operation, if there is one.
fn end(vm: &mut Supervisor, reason: MemoryReason) {
    let Some(pending) = vm.memory.pending.take() else {
        return;
    };
    let now = observe(vm);
    let requested_bytes = pending.plan.requested_bytes;
    let reached_bytes = match &vm.machine {
        Some(_) => assigned_bytes(vm.config.memory().startup_bytes, &now),
        // A guest that is not there has nothing.
        None => 0,
    };
    let guest_total_bytes = now.guest_total_bytes;
    match reason {
        MemoryReason::Withdrawn | MemoryReason::GuestEnded => {}
        MemoryReason::Complete
        | MemoryReason::Stored
        | MemoryReason::NotStored
        | MemoryReason::GuestRefused
        | MemoryReason::Host
        | MemoryReason::DriverAbsent
        | MemoryReason::Deadline => {
            if matches!(reason, MemoryReason::Complete | MemoryReason::Stored) {
                vm.memory.span = None;
                let _ = vm.memory.asked.as_mut().map(|asked| asked.way.settle());
            }
            vm.publish(EventKind::MemorySettled {
                requested_bytes,
                reached_bytes,
                guest_total_bytes,
                reason: reason.as_str(),
            });
        }
    }
    let outcome = MemoryOutcome {
        target_bytes: pending.target_bytes,
        requested_bytes,
        reached_bytes,
        guest_total_bytes,
        reason,
    };
    vm.end_beside(&pending.operation, outcome);
}

impl Pending {
    /// Takes note of what the guest has now.
    fn see(&mut self, now: &Observed) {
        let moved = (now.plugged_bytes, now.ballooned_bytes);
        if moved != (self.seen.plugged_bytes, self.seen.ballooned_bytes) {
            self.seen_since = Instant::now();
        }
        self.seen = *now;
    }

    /// When a guest that has obeyed now has had the time to count what it was given.
    fn counting_end(&self) -> Instant {
        let end = Instant::now() + COUNTING_MAX;
        self.deadline.map_or(end, |deadline| deadline.min(end))
    }

    /// Whether the guest has counted in `told` what it was given; of one that never told before nothing is known.
    fn is_credible(&self, told: Option<Told>) -> bool {
        match (&self.told_before, &told) {
            (Some(before), Some(told)) => told.has_counted_all(before),
            (None, _) | (_, None) => true,
        }
    }

    fn shortfall(&self, now: &Observed) -> MemoryReason {
        let end = self.deadline.unwrap_or_else(Instant::now);
        let within = end.saturating_duration_since(self.began);
        let still_for: Duration = end.saturating_duration_since(self.seen_since);
        self.plan.shortfall(now, within, still_for)
    }
}
