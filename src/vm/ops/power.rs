//! Start, pause, resume, reset, shut down, power off, and the guest doing so by itself.
//!
//! ```text
//! start    Off ─ build (worker) ─ run vCPUs ─ Running
//! pause    Running ─ park vCPUs ─ pause units ─ all quiet ─ Paused
//! reset    Running ─ park vCPUs ─ pause units ─ all quiet ─ reset (worker) ─ resume units ─ run vCPUs
//! resume   Paused ─ resume units ─ run vCPUs ─ Running
//! end      any ─ Stopping ─ vCPUs stop ─ works done, or given up ─ tear down (worker) ─ Off
//! ```
//! A pause or reset for which something does not come to a stand in time is given up, and the guest goes on.
//! vCPUs are parked before units are paused, so that no kick arrives behind a paused unit's back; units are resumed
//! before vCPUs run, so that every interrupt is in place when the guest looks.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::event::{EndCause, EventKind, ResetCause};
use crate::state::State;
use crate::unit::{PauseTicket, PowerRequest};
use crate::vm::error::OperationError;
use crate::vm::halt::{HALT_WITHIN, Halt};
use crate::vm::mailbox::Report;
use crate::vm::operation::{OperationKind, Outcome};
use crate::vm::ops::{memory, nic, nic_remove};
use crate::vm::platform::{BuildError, Machine};
use crate::vm::supervisor::Supervisor;
use crate::vm::thread_role::ThreadRole;
use crate::vm::transition::Trigger;

/// How long a VM that ends waits for workers that wait for the host: a disk that hangs must not hold it.
const HUNG_AFTER: Duration = Duration::from_secs(10);
/// The same for letting go of a machine: the RAM of a large guest is not freed, nor what it wrote synced, in a moment.
const TEARDOWN_HANGS_AFTER: Duration = Duration::from_secs(30);

/// Off → Starting: builds the machine on a worker.
pub fn start(vm: &mut Supervisor) {
    vm.step(Trigger::Start);
    let mailbox = vm.new_generation();
    let (platform, config) = (vm.shared.platform.clone(), vm.config.clone());
    let work = move || Report::Built(platform.build(&config, mailbox));
    if let Err(error) = spawn(vm, "vm-build", work, Report::Built(Err(BuildError::Panicked))) {
        fail_start(
            vm,
            OperationError::Thread {
                what: OperationKind::Start,
                source: error,
            },
        );
    }
}

/// The worker has built the machine, or could not.
pub fn built(vm: &mut Supervisor, result: Result<Arc<dyn Machine>, BuildError>) {
    join(vm.worker.take());
    match result {
        Ok(machine) if vm.state == State::Starting => {
            nic::machine_built(vm, &*machine);
            machine.run_vcpus();
            vm.machine = Some(machine);
            vm.step(Trigger::Done);
            memory::started(vm);
            vm.end_flight(Outcome::Done);
        }
        // The power was cut meanwhile.
        Ok(machine) => {
            vm.machine = Some(machine);
            tear_down(vm);
        }
        Err(error) if vm.state == State::Starting => fail_start(vm, OperationError::Build(error)),
        Err(_) => torn_down(vm),
    }
}

fn fail_start(vm: &mut Supervisor, error: OperationError) {
    let outcome = Outcome::Failed(Arc::new(error));
    vm.publish(EventKind::Ended {
        cause: EndCause::StartFailed {
            reason: outcome.to_string(),
        },
    });
    vm.step(Trigger::Failed);
    vm.end_flight(outcome);
}

/// Running → Pausing.
pub fn pause(vm: &mut Supervisor) {
    vm.step(Trigger::Pause);
    halt(vm, None);
}

/// Paused → Resuming → Running.
pub fn resume(vm: &mut Supervisor) {
    vm.step(Trigger::Resume);
    let Some(machine) = vm.machine.clone() else { return };
    machine.resume_units();
    machine.run_vcpus();
    vm.step(Trigger::Done);
    vm.end_flight(Outcome::Done);
}

/// Brings the machine to a stand for a reset; a paused machine stands already.
pub fn reset(vm: &mut Supervisor, cause: ResetCause) {
    if vm.state == State::Paused {
        let number = new_halt(vm, 0, Some(cause));
        units_quiet(vm, number);
    } else {
        halt(vm, Some(cause));
    }
}

/// Asks the guest to shut itself down; the operation ends when the guest is off or its deadline passes.
pub fn shut_down(vm: &mut Supervisor) {
    if let Some(machine) = &vm.machine {
        machine.press_power_button();
    }
}

/// Cuts the power. Called in Off too, when the last handle goes: then it does nothing.
pub fn power_off(vm: &mut Supervisor, cause: EndCause) {
    end(vm, Trigger::PowerOff, cause);
}

/// The guest is gone by itself.
pub fn guest_off(vm: &mut Supervisor, cause: EndCause) {
    end(vm, Trigger::GuestOff, cause);
}

/// A part of the machine reports that the guest cannot go on.
pub fn guest_ended(vm: &mut Supervisor, cause: EndCause) {
    let resets = vm.halt.as_ref().is_some_and(|halt| halt.reset.is_some());
    // A guest that has asked for a reset may fall over anything until its vCPUs stand.
    if cause == EndCause::TripleFault && resets {
        return;
    }
    guest_off(vm, cause);
}

/// The guest asks the platform for something.
pub fn guest_request(vm: &mut Supervisor, request: PowerRequest) {
    match request {
        PowerRequest::PowerOff => guest_off(vm, EndCause::GuestPowerOff),
        PowerRequest::Panicked => guest_off(vm, EndCause::GuestPanic),
        PowerRequest::Reset => guest_reset(vm),
    }
}

fn guest_reset(vm: &mut Supervisor) {
    match &mut vm.halt {
        // A pause is on its way: the reset is done when everything stands.
        Some(halt) => halt.reset = halt.reset.or(Some(ResetCause::Guest)),
        None if vm.state == State::Running => {
            vm.end_flight(Outcome::Overtaken {
                by: "a reset by the guest",
            });
            let _ = vm.begin(OperationKind::Reset, None);
            halt(vm, Some(ResetCause::Guest));
        }
        None => {}
    }
}

fn halt(vm: &mut Supervisor, reset: Option<ResetCause>) {
    let Some(machine) = vm.machine.clone() else { return };
    new_halt(vm, machine.vcpu_count(), reset);
    machine.park_vcpus();
}

fn new_halt(vm: &mut Supervisor, vcpu_count: u32, reset: Option<ResetCause>) -> u64 {
    vm.last_halt += 1;
    vm.halt = Some(Halt::new(vm.last_halt, vcpu_count, reset));
    vm.last_halt
}

/// Something does not come to a stand: the guest goes on, and who asked for the stand is told.
pub fn give_up_halt(vm: &mut Supervisor) {
    let (Some(halt), Some(machine)) = (vm.halt.take(), vm.machine.clone()) else {
        return;
    };
    let error = OperationError::NotStanding {
        missing: halt.missing(),
        within_seconds: HALT_WITHIN.as_secs(),
    };
    // From Pausing by way of Resuming; a reset has not left Running.
    vm.step(Trigger::Failed);
    machine.resume_units();
    machine.run_vcpus();
    if vm.state == State::Resuming {
        vm.step(Trigger::Done);
    }
    vm.end_flight(Outcome::Failed(Arc::new(error)));
}

/// One more vCPU stands still; with the last one the units' turn has come.
pub fn vcpu_parked(vm: &mut Supervisor, vcpu: u32) {
    let (Some(halt), Some(machine)) = (&mut vm.halt, &vm.machine) else {
        return;
    };
    if halt.vcpu_stands(vcpu) {
        let (number, machine) = (halt.number, machine.clone());
        let mailbox = vm.mailbox();
        let tell = move || mailbox.report(Report::UnitsQuiet { halt: number });
        machine.pause_units(PauseTicket::new(tell));
    }
}

/// Everything stands.
pub fn units_quiet(vm: &mut Supervisor, number: u64) {
    let (Some(halt), Some(machine)) = (&mut vm.halt, vm.machine.clone()) else {
        return;
    };
    if !halt.units_are_quiet(number) {
        return;
    }
    if halt.reset.is_none() {
        return stand(vm);
    }
    let going = nic_remove::going_with_reset(vm);
    let work = move || {
        // Before the guest looks for its cards again.
        for unit in going {
            machine.remove_device(&unit);
        }
        Report::ResetDone(machine.reset())
    };
    if let Err(source) = spawn(vm, "vm-reset", work, Report::ResetDone(Err(BuildError::Panicked))) {
        fail_reset(
            vm,
            OperationError::Thread {
                what: OperationKind::Reset,
                source,
            },
        );
    }
}

/// The worker has reset the machine, or could not.
pub fn reset_done(vm: &mut Supervisor, result: Result<(), BuildError>) {
    join(vm.worker.take());
    match (result, vm.state) {
        (_, State::Stopping) => tear_down_unless_held(vm),
        (Err(error), _) => fail_reset(vm, OperationError::Reset(error)),
        (Ok(()), _) => {
            let cause = vm
                .halt
                .as_ref()
                .and_then(|halt| halt.reset)
                .unwrap_or(ResetCause::Host);
            vm.publish(EventKind::Reset { cause });
            memory::started(vm);
            nic_remove::gone_with_reset(vm);
            stand(vm);
        }
    }
}

fn fail_reset(vm: &mut Supervisor, error: OperationError) {
    let outcome = Outcome::Failed(Arc::new(error));
    let reason = outcome.to_string();
    vm.end_flight(outcome);
    power_off(vm, EndCause::StartFailed { reason });
}

/// Everything stands and is as it should be: stay so, or go on.
fn stand(vm: &mut Supervisor) {
    vm.halt = None;
    match vm.state {
        State::Pausing => {
            vm.step(Trigger::Done);
        }
        State::Running => {
            if let Some(machine) = &vm.machine {
                machine.resume_units();
                machine.run_vcpus();
            }
        }
        // A paused machine was reset: it stays paused.
        State::Paused => {}
        State::Off
        | State::Starting
        | State::PausedCritical
        | State::Resuming
        | State::Saving
        | State::Saved
        | State::Stopping => return,
    }
    vm.end_flight(Outcome::Done);
}

fn end(vm: &mut Supervisor, trigger: Trigger, cause: EndCause) {
    let was = vm.state;
    if was == State::Stopping || !vm.step(trigger) {
        return;
    }
    vm.end_cause = Some(cause);
    memory::guest_ended(vm);
    match &mut vm.flight {
        None => {}
        Some(flight) if flight.operation.kind() == OperationKind::PowerOff => {}
        // The guest did what it was asked to, in time: the rest is not its doing.
        Some(flight)
            if flight.operation.kind() == OperationKind::ShutDown
                && vm.end_cause == Some(EndCause::GuestPowerOff) =>
        {
            flight.deadline = None;
        }
        Some(_) => vm.end_flight(Outcome::Overtaken {
            by: "the end of the guest",
        }),
    }
    vm.halt = None;
    if let Some(machine) = &vm.machine {
        // The guest does nothing any more, however long the rest takes.
        machine.tear_down();
    }
    wait_for_workers(vm);
    tear_down_unless_held(vm);
}

/// Gives the workers their time from now.
pub fn wait_for_workers(vm: &mut Supervisor) {
    vm.hung_at = Instant::now().checked_add(HUNG_AFTER);
}

/// The workers have had their time: what they hold goes when the host answers them, and the VM goes on without.
pub fn workers_hang(vm: &mut Supervisor) {
    vm.hung_at = None;
    if vm.state == State::Stopping {
        if vm.worker.take().is_some() {
            log::error!("the worker that has the vm's machine hangs: nobody waits for it any more");
            // Its report is one of the past from now on.
            let _ = vm.new_generation();
        }
        let machine = vm.machine.take();
        vm.give_up_works();
        vm.machine = machine;
        tear_down(vm);
    } else if vm.handles_gone() {
        vm.give_up_works();
        // What one of them meant to store may have to be taken back.
        if !vm.works.is_empty() {
            wait_for_workers(vm);
        }
    }
}

/// A worker has done what nobody waits for any more.
pub fn reported_too_late(vm: &Supervisor, report: Report) {
    // Letting go of a machine waits for threads, which the supervisor must not do.
    if let Report::Built(Ok(machine)) = report {
        let shared = vm.shared.clone();
        let work = move || {
            shared.own_thread(ThreadRole::Worker);
            drop(machine);
        };
        let worker = std::thread::Builder::new().name("vm-teardown".to_owned());
        if let Err(error) = worker.spawn(work) {
            log::error!("a machine that was built too late went on the supervisor's thread: {error}");
        }
    }
}

/// Tears the machine down unless a worker holds it still: the last of them to report comes back here.
pub fn tear_down_unless_held(vm: &mut Supervisor) {
    if vm.state == State::Stopping && vm.worker.is_none() && vm.works.is_empty() {
        tear_down(vm);
    }
}

fn tear_down(vm: &mut Supervisor) {
    vm.hung_at = None;
    let Some(machine) = vm.machine.take() else {
        return torn_down(vm);
    };
    // The worker alone holds the machine: letting go of it waits for threads, which the supervisor must not do.
    let work = move || {
        machine.tear_down();
        drop(machine);
        Report::TornDown
    };
    // Without a thread the machine goes here, with the closure: slower, but the VM ends.
    match spawn(vm, "vm-teardown", work, Report::TornDown) {
        // Closing a disk waits for what the host has not written to it yet.
        Ok(()) => vm.hung_at = Instant::now().checked_add(TEARDOWN_HANGS_AFTER),
        Err(_) => torn_down(vm),
    }
}

/// Nothing of the machine is left.
pub fn torn_down(vm: &mut Supervisor) {
    vm.hung_at = None;
    join(vm.worker.take());
    if let Some(cause) = vm.end_cause.take() {
        vm.publish(EventKind::Ended { cause });
    }
    nic::guest_ended(vm);
    vm.step(Trigger::Done);
    vm.end_flight(Outcome::Done);
    if vm.handles_gone() {
        // The configuration may still be on its way to its directory.
        wait_for_workers(vm);
    }
}

/// Starts a worker that sends the report of `work`, or `panicked` if it panics: it runs code of the embedder's, and
/// the supervisor waits for a report.
fn spawn(
    vm: &mut Supervisor,
    name: &str,
    work: impl FnOnce() -> Report + Send + 'static,
    panicked: Report,
) -> std::io::Result<()> {
    let mailbox = vm.mailbox();
    let shared = vm.shared.clone();
    let work = move || {
        shared.own_thread(ThreadRole::Worker);
        // What the panic left half done is not looked at again: the machine is torn down.
        mailbox.report(catch_unwind(AssertUnwindSafe(work)).unwrap_or(panicked));
    };
    vm.worker = Some(std::thread::Builder::new().name(name.to_owned()).spawn(work)?);
    Ok(())
}

/// Joins a worker that has reported: it ends at once.
fn join(worker: Option<JoinHandle<()>>) {
    if worker.is_some_and(|worker| worker.join().is_err()) {
        log::error!("a worker of the vm panicked after its report");
    }
}
