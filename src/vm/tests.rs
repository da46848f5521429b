//! The supervisor against a machine without a guest: every path through the lifecycle, and random sequences.

use proptest::prelude::*;

use super::fake::FakePlatform;
use super::operation::Outcome;
use super::platform::Machine;
use super::*;
use crate::event::{EndCause, EventKind};
use crate::unit::PowerRequest;

const SOON: Duration = Duration::from_secs(60);

fn config() -> VmConfig {
    let builder = VmConfig::builder("test", "/boot/vmlinuz").cpus(3);
    builder.build().expect("the configuration is valid")
}

fn vm() -> (Vm, FakePlatform) {
    let platform = FakePlatform::default();
    let vm = Vm::new(config(), Arc::new(platform.clone())).expect("the fake refuses nothing");
    (vm, platform)
}

fn done(operation: Result<Operation, RequestError>) {
    let outcome = operation.expect("the request is allowed").wait(SOON);
    assert!(outcome.as_ref().is_some_and(Outcome::is_done), "{outcome:?}");
}

#[test]
fn the_lifecycle_goes_round_and_events_tell_it_in_order() {
    let (vm, platform) = vm();
    let events = vm.events();
    done(vm.start());
    done(vm.pause());
    assert_eq!(vm.state(), State::Paused);
    done(vm.reset());
    assert_eq!(vm.state(), State::Paused);
    done(vm.resume());
    done(vm.power_off());
    assert_eq!((vm.state(), platform.control().alive_count()), (State::Off, 0));
    drop(vm);
    let states: Vec<_> = std::iter::from_fn(|| events.next(SOON))
        .filter_map(|event| match event.kind {
            EventKind::StateChanged { to, .. } => Some(to.as_str()),
            _ => None,
        })
        .collect();
    let expected = [
        "starting", "running", "pausing", "paused", "resuming", "running", "stopping", "off",
    ];
    assert_eq!(states, expected);
}

#[test]
fn a_refusal_names_the_state_and_what_is_in_the_way() {
    let (vm, _platform) = vm();
    let error = vm.resume().expect_err("an off vm cannot resume");
    assert_eq!(error.to_string(), "cannot resume: the vm is off");
    done(vm.start());
    let shut_down = vm
        .shut_down(Duration::MAX)
        .expect("a running vm can be shut down");
    let error = vm.pause().expect_err("the guest is shutting down");
    assert_eq!(
        error.to_string(),
        "cannot pause: shut-down is in flight and the vm is running"
    );
    done(vm.power_off());
    let outcome = shut_down.wait(SOON).expect("it was overtaken");
    assert_eq!(outcome.to_string(), "overtaken by power-off");
}

#[test]
fn shutting_down_ends_with_the_guest_or_at_the_deadline() {
    let (vm, platform) = vm();
    done(vm.start());
    let late = vm
        .shut_down(Duration::ZERO)
        .expect("a running vm can be shut down");
    assert!(matches!(late.wait(SOON), Some(Outcome::DeadlinePassed)));
    assert_eq!(vm.state(), State::Running);
    platform.control().obey_button(true);
    done(vm.shut_down(SOON));
    assert_eq!(vm.state(), State::Off);
}

#[test]
fn the_end_of_a_guest_is_told_by_its_cause() {
    let (vm, platform) = vm();
    let control = platform.control();
    let causes = [
        EndCause::GuestPowerOff,
        EndCause::GuestPanic,
        EndCause::TripleFault,
        EndCause::VcpuError {
            vcpu: 1,
            reason: "internal error".to_owned(),
        },
    ];
    for cause in causes {
        done(vm.start());
        let events = vm.events();
        match cause {
            EndCause::GuestPowerOff => control.guest(PowerRequest::PowerOff),
            EndCause::GuestPanic => control.guest(PowerRequest::Panicked),
            _ => control.vcpu_ended(cause.clone()),
        }
        let told = std::iter::from_fn(|| events.next(SOON)).find_map(|event| match event.kind {
            EventKind::Ended { cause } => Some(cause),
            _ => None,
        });
        assert_eq!(told, Some(cause));
        assert!(vm.wait_for(State::Off, SOON));
        assert_eq!(control.alive_count(), 0);
    }
}

#[test]
fn a_failed_start_leaves_the_vm_off_and_a_failed_reset_switches_it_off() {
    let (vm, platform) = vm();
    platform.control().refuse(true, false);
    let outcome = vm
        .start()
        .expect("an off vm can be started")
        .wait(SOON)
        .expect("it fails at once");
    let text = outcome.to_string();
    assert!(
        text.starts_with("the vm could not be started: the host refused guest memory: "),
        "{text}"
    );
    assert_eq!(vm.state(), State::Off);
    platform.control().refuse(false, true);
    done(vm.start());
    let outcome = vm
        .reset()
        .expect("a running vm can be reset")
        .wait(SOON)
        .expect("it fails at once");
    assert!(
        outcome
            .to_string()
            .starts_with("the vm could not be reset and was switched off: ")
    );
    assert!(vm.wait_for(State::Off, SOON));
}

/// A platform whose host devices have a defect.
struct PanickingPlatform;

impl Platform for PanickingPlatform {
    fn check(&self, _config: &VmConfig) -> Result<(), BuildError> {
        Ok(())
    }

    fn build(&self, _config: &VmConfig, _mailbox: Mailbox) -> Result<Arc<dyn Machine>, BuildError> {
        panic!("the embedder's host devices panic")
    }
}

#[test]
fn a_guest_that_falls_over_while_it_is_reset_is_reset() {
    let (vm, platform) = vm();
    done(vm.start());
    let events = vm.events();
    platform.control().guest(PowerRequest::Reset);
    platform.control().vcpu_ended(EndCause::TripleFault);
    let mut told = std::iter::from_fn(|| events.next(SOON));
    assert!(told.any(|event| matches!(event.kind, EventKind::Reset { .. })));
    assert!(vm.wait_for(State::Running, SOON));
    // Without a reset on its way it is the end.
    platform.control().vcpu_ended(EndCause::TripleFault);
    let cause = told.find_map(|event| match event.kind {
        EventKind::Ended { cause } => Some(cause),
        _ => None,
    });
    assert_eq!(cause, Some(EndCause::TripleFault));
}

#[test]
fn a_panic_on_the_supervisors_thread_ends_the_guest_by_name_and_nothing_else() {
    let (vm, platform) = vm();
    done(vm.start());
    let events = vm.events();
    platform.control().panic_when_inspected(true);
    assert_eq!(vm.inspect().expect_err("there is no answer"), RequestError::Gone);
    let ended = std::iter::from_fn(|| events.next(SOON)).find_map(|event| match event.kind {
        EventKind::Ended { cause } => Some(cause),
        _ => None,
    });
    let reason = "the device panics, as the test wants".to_owned();
    assert_eq!(ended, Some(EndCause::DeviceError { reason }));
    assert!(vm.wait_for(State::Off, SOON));
    platform.control().panic_when_inspected(false);
    done(vm.start());
    assert!(vm.inspect().is_ok());
}

#[test]
fn a_panic_in_a_build_fails_the_start_and_the_vm_can_still_be_dropped() {
    let vm = Vm::new(config(), Arc::new(PanickingPlatform)).expect("nothing is built yet");
    let start = vm.start().expect("an off vm can be started");
    let outcome = start.wait(SOON).expect("the panic ends the start");
    let expected = "the vm could not be started: the thread that prepares the machine panicked";
    assert_eq!(outcome.to_string(), expected);
    assert_eq!(vm.state(), State::Off);
}

/// A platform whose host devices hold the last handle of their own VM.
struct HoldingPlatform(std::sync::Mutex<std::sync::mpsc::Receiver<Vm>>);

impl Platform for HoldingPlatform {
    fn check(&self, _config: &VmConfig) -> Result<(), BuildError> {
        Ok(())
    }

    fn build(&self, _config: &VmConfig, _mailbox: Mailbox) -> Result<Arc<dyn Machine>, BuildError> {
        let handle = self.0.lock().expect("no panic while locked").recv();
        drop(handle.expect("the test hands it over"));
        let source = io::Error::from_raw_os_error(libc::ENOMEM);
        Err(BuildError::Host {
            what: "memory",
            source,
        })
    }
}

/// A platform whose host never answers.
struct HungPlatform(std::sync::Mutex<std::sync::mpsc::Receiver<()>>);

impl Platform for HungPlatform {
    fn check(&self, _config: &VmConfig) -> Result<(), BuildError> {
        Ok(())
    }

    fn build(&self, _config: &VmConfig, _mailbox: Mailbox) -> Result<Arc<dyn Machine>, BuildError> {
        // Until the test is over.
        let _ = self.0.lock().expect("no panic while locked").recv();
        Err(BuildError::Panicked)
    }
}

#[test]
fn a_host_that_hangs_holds_neither_the_last_handle_nor_an_event_stream() {
    let (sender, receiver) = channel();
    let platform = HungPlatform(std::sync::Mutex::new(receiver));
    let vm = Vm::new(config(), Arc::new(platform)).expect("nothing is built yet");
    let events = vm.events();
    drop(vm.start().expect("an off vm can be started"));
    drop(vm);
    while events.next(SOON).is_some() {}
    assert!(events.is_closed(), "it waits for the host");
    drop(sender);
}

#[test]
fn the_last_handle_may_go_on_a_worker_of_its_own_vm() {
    let (sender, receiver) = channel();
    let platform = HoldingPlatform(std::sync::Mutex::new(receiver));
    let vm = Vm::new(config(), Arc::new(platform)).expect("nothing is built yet");
    let events = vm.events();
    drop(vm.start().expect("an off vm can be started"));
    sender.send(vm).expect("the worker waits for it");
    while events.next(SOON).is_some() {}
    assert!(events.is_closed(), "the vm is not gone");
}

#[test]
fn dropping_the_last_handle_stops_the_vm() {
    let (vm, platform) = vm();
    done(vm.start());
    let other = vm.clone();
    drop(vm);
    assert_eq!(platform.control().alive_count(), 1);
    let events = other.events();
    drop(other);
    assert_eq!(platform.control().alive_count(), 0);
    let ended = std::iter::from_fn(|| events.next(SOON)).any(|event| {
        event.kind
            == EventKind::Ended {
                cause: EndCause::HostPowerOff,
            }
    });
    assert!(ended && events.is_closed());
}

/// Plays `step` and, where a request was accepted, keeps the operation.
fn play(vm: &Vm, platform: &FakePlatform, step: u8, operations: &mut Vec<Operation>) {
    let control = platform.control();
    let request = match step {
        0 => vm.start(),
        1 => vm.pause(),
        2 => vm.resume(),
        3 => vm.reset(),
        4 => vm.shut_down(Duration::ZERO),
        5 => vm.shut_down(SOON),
        6 => vm.power_off(),
        7 => return control.guest(PowerRequest::Reset),
        8 => return control.guest(PowerRequest::PowerOff),
        9 => return control.vcpu_ended(EndCause::TripleFault),
        10 => return control.refuse(true, true),
        11 => return control.refuse(false, false),
        12 | 13 => return control.hang(step == 12),
        _ => return control.obey_button(step.is_multiple_of(2)),
    };
    operations.extend(request.ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_is_asked_every_operation_ends_once_and_power_off_ends_in_off(
        steps in prop::collection::vec(0u8..16, 0..40),
    ) {
        let (vm, platform) = vm();
        let events = vm.events();
        let mut operations = Vec::new();
        for step in steps {
            play(&vm, &platform, step, &mut operations);
        }
        platform.control().hang(false);
        operations.extend(vm.power_off().ok());
        prop_assert!(vm.wait_for(State::Off, SOON), "{}", vm.state());
        vm.status().expect("the supervisor lives");
        for operation in &operations {
            prop_assert!(operation.wait(SOON).is_some(), "{operation:?} has no outcome");
        }
        drop(vm);
        prop_assert_eq!(platform.control().alive_count(), 0);
        check_events(&events)?;
    }
}

/// Numbers have no gap, every move is in the table, and begun operations end exactly once.
fn check_events(events: &EventStream) -> Result<(), TestCaseError> {
    use super::transition::{Next, Trigger, next};
    let (mut last, mut at, mut open) = (0, State::Off, std::collections::BTreeSet::new());
    while let Some(event) = events.next(SOON) {
        prop_assert_eq!(event.number, last + 1);
        last = event.number;
        match event.kind {
            EventKind::StateChanged { from, to } => {
                prop_assert_eq!(from, at);
                let legal = Trigger::ALL
                    .iter()
                    .any(|trigger| next(from, *trigger) == Next::To(to));
                prop_assert!(legal, "{} to {}", from, to);
                at = to;
            }
            EventKind::OperationBegan { id, .. } => prop_assert!(open.insert(id)),
            EventKind::OperationEnded { id, .. } => prop_assert!(open.remove(&id)),
            _ => {}
        }
    }
    prop_assert_eq!((at, open.len()), (State::Off, 0));
    Ok(())
}
