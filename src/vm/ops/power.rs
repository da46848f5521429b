//! Start, pause, resume, reset, shut down, power off, and the guest doing so by itself.
//!
//! ```text
//! start    Off ─ build (worker) ─ run vCPUs ─ Running
//! pause    Running ─ park vCPUs ─ pause units ─ all quiet ─ Paused
//! reset    Running ─ park vCPUs ─ pause units ─ all quiet ─ reset (worker) ─ resume units ─ run vCPUs
//! resume   Paused ─ resume units ─ run vCPUs ─ Running
//! end      any ─ Stopping ─ tear down (worker) ─ Off
//! ```
//! vCPUs are parked before units are paused, so that no kick arrives behind a paused unit's back; units are resumed
//! before vCPUs run, so that every interrupt is in place when the guest looks.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::event::{EndCause, EventKind, ResetCause};
use crate::state::State;
use crate::unit::{PauseTicket, PowerRequest};
use crate::vm::error::OperationError;
use crate::vm::mailbox::Report;
use crate::vm::operation::{OperationKind, Outcome};
use crate::vm::ops::{memory, nic};
use crate::vm::platform::{BuildError, Machine};
use crate::vm::supervisor::{Halt, Supervisor};
use crate::vm::transition::Trigger;

/// Off → Starting: builds the machine on a worker.
pub fn start(vm: &mut Supervisor) {
    vm.step(Trigger::Start);
    let mailbox = vm.new_generation();
    let (platform, config) = (vm.platform.clone(), vm.config.clone());
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
        vm.halt = Some(Halt {
            running_vcpu_count: 0,
            reset: Some(cause),
        });
        units_quiet(vm);
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
    let Some(machine) = &vm.machine else { return };
    vm.halt = Some(Halt {
        running_vcpu_count: machine.vcpu_count(),
        reset,
    });
    machine.park_vcpus();
}

/// One more vCPU stands still; with the last one the units' turn has come.
pub fn vcpu_parked(vm: &mut Supervisor) {
    let (Some(halt), Some(machine)) = (&mut vm.halt, &vm.machine) else {
        return;
    };
    halt.running_vcpu_count = halt.running_vcpu_count.saturating_sub(1);
    if halt.running_vcpu_count == 0 {
        let mailbox = vm.mailbox();
        machine.pause_units(PauseTicket::new(move || mailbox.report(Report::UnitsQuiet)));
    }
}

/// Everything stands.
pub fn units_quiet(vm: &mut Supervisor) {
    let Some(halt) = vm.halt else { return };
    let Some(machine) = vm.machine.clone() else { return };
    if halt.reset.is_none() {
        return stand(vm);
    }
    let going = nic::going_with_reset(vm);
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
            let cause = vm.halt.and_then(|halt| halt.reset).unwrap_or(ResetCause::Host);
            vm.publish(EventKind::Reset { cause });
            memory::started(vm);
            nic::gone_with_reset(vm);
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
    tear_down_unless_held(vm);
}

/// Tears the machine down unless a worker holds it still: the last of them to report comes back here.
pub fn tear_down_unless_held(vm: &mut Supervisor) {
    if vm.state == State::Stopping && vm.worker.is_none() && vm.works.is_empty() {
        tear_down(vm);
    }
}

fn tear_down(vm: &mut Supervisor) {
    vm.halt = None;
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
    if spawn(vm, "vm-teardown", work, Report::TornDown).is_err() {
        torn_down(vm);
    }
}

/// Nothing of the machine is left.
pub fn torn_down(vm: &mut Supervisor) {
    join(vm.worker.take());
    if let Some(cause) = vm.end_cause.take() {
        vm.publish(EventKind::Ended { cause });
    }
    nic::guest_ended(vm);
    vm.step(Trigger::Done);
    vm.end_flight(Outcome::Done);
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
        shared.own_thread();
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
