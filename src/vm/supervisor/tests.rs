//! A supervisor that the test drives itself: message by message, deadline by deadline.

use std::sync::mpsc::channel;

use super::*;
use crate::unit::UnitListener;
use crate::vm::fake::FakePlatform;
use crate::vm::nic::AddNicOutcome;

/// A supervisor that the test drives itself, with a running machine.
fn running(platform: &FakePlatform) -> (Supervisor, Receiver<Message>) {
    let config = VmConfig::builder("test", "/boot/vmlinuz").build();
    let config = Arc::new(config.expect("the configuration is valid"));
    let (sender, receiver) = channel();
    let platform = Arc::new(platform.clone());
    let shared = Arc::new(Shared::new(config, platform));
    let mut supervisor = Supervisor::new(shared, None, sender);
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

/// Handles messages until the VM is `wanted`.
fn until(supervisor: &mut Supervisor, receiver: &Receiver<Message>, wanted: State) {
    while supervisor.state != wanted {
        supervisor.handle(receiver.recv().expect("somebody reports"));
    }
}

fn ask(supervisor: &mut Supervisor, kind: OperationKind) -> Operation {
    let request = Request { kind, within: None };
    supervisor.request(request).expect("the state allows it")
}

fn power_off(supervisor: &mut Supervisor) -> Operation {
    ask(supervisor, OperationKind::PowerOff)
}

/// A host that hangs while it adds a card.
fn hang_at_a_card(platform: &FakePlatform, supervisor: &mut Supervisor) -> Operation<AddNicOutcome> {
    platform.control().hang(true);
    let card = crate::config::NicSpec::new("lan", "tap0");
    let added = nic_add::add(supervisor, card, Duration::MAX);
    added.expect("a running vm takes cards").1
}

/// Lets the time pass that workers have.
fn workers_have_had_their_time(supervisor: &mut Supervisor) {
    assert!(supervisor.hung_at.is_some(), "their time is counted");
    supervisor.hung_at = Some(Instant::now());
    supervisor.deadline_passed();
}

#[test]
fn a_pause_for_which_not_everything_stands_is_given_up_and_the_next_one_is_not_mistaken_for_it() {
    let platform = FakePlatform::default();
    let (mut supervisor, receiver) = running(&platform);
    // First the vCPUs do not stand, then the units.
    for (hangs_from_the_start, missing) in [
        (true, "1 vcpus still run"),
        (false, "a device still waits for the host"),
    ] {
        platform.control().hang(hangs_from_the_start);
        let pausing = ask(&mut supervisor, OperationKind::Pause);
        assert_eq!(supervisor.state, State::Pausing);
        if !hangs_from_the_start {
            platform.control().hang(true);
            supervisor.handle(receiver.recv().expect("the vcpu reports"));
        }
        supervisor.halt.as_mut().expect("the halt goes on").expire();
        supervisor.deadline_passed();
        assert_eq!(supervisor.state, State::Running);
        let outcome = pausing.outcome().map(|outcome| outcome.to_string());
        assert_eq!(outcome, Some(format!("{missing} after 60 s, the guest goes on")));
    }
    // The quiet units of the second are told of now, and are nobody's.
    platform.control().hang(false);
    let pausing = ask(&mut supervisor, OperationKind::Pause);
    until(&mut supervisor, &receiver, State::Paused);
    assert!(pausing.outcome().is_some_and(|outcome| outcome.is_done()));
}

#[test]
fn a_reset_for_which_not_everything_stands_is_given_up_unless_the_guest_wants_it() {
    let platform = FakePlatform::default();
    let (mut supervisor, receiver) = running(&platform);
    platform.control().hang(true);
    let resetting = ask(&mut supervisor, OperationKind::Reset);
    supervisor.halt.as_mut().expect("the halt goes on").expire();
    supervisor.deadline_passed();
    assert_eq!((supervisor.state, supervisor.in_flight()), (State::Running, None));
    assert!(resetting.outcome().is_some_and(|outcome| !outcome.is_done()));
    platform.control().guest(crate::unit::PowerRequest::Reset);
    supervisor.handle(receiver.recv().expect("the guest asks"));
    supervisor.halt.as_mut().expect("the halt goes on").expire();
    supervisor.deadline_passed();
    assert_eq!(
        supervisor.in_flight(),
        Some(OperationKind::Reset),
        "it was given up"
    );
    platform.control().hang(false);
    while supervisor.in_flight().is_some() {
        supervisor.handle(receiver.recv().expect("the machine reports"));
    }
    assert_eq!(supervisor.state, State::Running);
}

#[test]
fn a_guest_stands_when_its_power_is_cut_whatever_the_host_is_busy_with() {
    let platform = FakePlatform::default();
    let (mut supervisor, receiver) = running(&platform);
    let adding = hang_at_a_card(&platform, &mut supervisor);
    let cut = power_off(&mut supervisor);
    assert_eq!(
        platform.control().stopped_count(),
        1,
        "the vcpus were not stopped"
    );
    assert_eq!(supervisor.state, State::Stopping, "the host is not done");
    platform.control().hang(false);
    until(&mut supervisor, &receiver, State::Off);
    assert!(cut.outcome().is_some_and(|outcome| outcome.is_done()));
    assert!(adding.outcome().is_some(), "every operation ends");
    assert_eq!(platform.control().alive_count(), 0);
}

#[test]
fn a_host_that_hangs_does_not_hold_a_vm_that_ends() {
    let platform = FakePlatform::default();
    let (mut supervisor, receiver) = running(&platform);
    let adding = hang_at_a_card(&platform, &mut supervisor);
    let cut = power_off(&mut supervisor);
    workers_have_had_their_time(&mut supervisor);
    until(&mut supervisor, &receiver, State::Off);
    assert!(cut.outcome().is_some_and(|outcome| outcome.is_done()));
    assert!(adding.outcome().is_some(), "every operation ends");
    // The machine goes with the worker that holds it, whose word nobody waits for.
    platform.control().hang(false);
    supervisor.handle(receiver.recv().expect("the worker reports in the end"));
    assert_eq!(supervisor.state, State::Off);
    assert!(supervisor.cards.all().next().is_none(), "no card is left");
}

#[test]
fn a_start_that_hangs_can_be_given_up_and_its_machine_is_not_the_next_one() {
    let platform = FakePlatform::default();
    let (mut supervisor, receiver) = running(&platform);
    let _ = power_off(&mut supervisor);
    until(&mut supervisor, &receiver, State::Off);
    platform.control().hang(true);
    let starting = ask(&mut supervisor, OperationKind::Start);
    let cut = power_off(&mut supervisor);
    assert_eq!(
        starting.outcome().map(|o| o.to_string()).as_deref(),
        Some("overtaken by power-off")
    );
    workers_have_had_their_time(&mut supervisor);
    assert_eq!(supervisor.state, State::Off);
    assert!(cut.outcome().is_some_and(|outcome| outcome.is_done()));
    platform.control().hang(false);
    supervisor.handle(receiver.recv().expect("the machine is built in the end"));
    assert!(supervisor.machine.is_none(), "it is nobody's");
    platform.control().wait_until_none_is_alive();
}

#[test]
fn a_reset_that_hangs_can_be_given_up() {
    let platform = FakePlatform::default();
    let (mut supervisor, receiver) = running(&platform);
    let resetting = ask(&mut supervisor, OperationKind::Reset);
    supervisor.handle(receiver.recv().expect("the vcpu reports"));
    platform.control().hang(true);
    supervisor.handle(receiver.recv().expect("the units report"));
    assert!(supervisor.worker.is_some(), "the machine is being reset");
    let cut = power_off(&mut supervisor);
    workers_have_had_their_time(&mut supervisor);
    until(&mut supervisor, &receiver, State::Off);
    assert!(resetting.outcome().is_some() && cut.outcome().is_some_and(|outcome| outcome.is_done()));
    platform.control().hang(false);
    platform.control().wait_until_none_is_alive();
}
