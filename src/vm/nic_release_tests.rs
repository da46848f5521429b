//! Cards that a guest lets go of when nobody asked, or late; and what is undone, against a machine without a guest.

use std::sync::mpsc::{Receiver, channel};

use super::error::NicRequestError;
use super::fake::FakePlatform;
use super::mailbox::Message;
use super::nic::{AddNicOutcome, NicState, RemoveNicOutcome};
use super::nic_tests::{SOON, add, name, names, remove, removed, spec, started, told, wait_until};
use super::operation::{Ended, Outcome};
use super::ops::{nic_add, nic_change, nic_remove, power};
use super::supervisor::Supervisor;
use super::*;
use crate::config::NicSpec;
use crate::event::NicRemoval;

fn state_of(vm: &Vm, index: usize) -> Option<NicState> {
    vm.nics().expect("it lives")[index].state
}

#[test]
fn a_card_that_the_guest_lets_go_of_unasked_is_kept_told_of_and_offered_again() {
    let (vm, platform) = started(true);
    let (control, nic) = (platform.control(), vm.config().nics()[0].clone());
    let events = vm.events();
    control.eject(nic.bdf);
    assert_eq!(told(&events, "nic-released-by-guest"), ["nic-released-by-guest"]);
    assert_eq!(state_of(&vm, 0), Some(NicState::Released));
    assert_eq!(
        (names(vm.config().nics()), control.nics().len()),
        (vec!["lan".to_owned()], 1)
    );
    vm.offer_nic(&name("lan")).expect("it is kept");
    assert_eq!(told(&events, "nic-driver-ready"), ["nic-driver-ready"]);
    assert_eq!(state_of(&vm, 0), Some(NicState::DriverReady));

    // A reset offers it too; removed while it is released, it goes at once.
    control.eject(nic.bdf);
    told(&events, "nic-released-by-guest");
    let reset = vm.reset().expect("a running vm can be reset");
    assert!(reset.wait(SOON).is_some_and(|outcome| outcome.is_done()));
    assert_ne!(state_of(&vm, 0), Some(NicState::Released));
    control.eject(nic.bdf);
    told(&events, "nic-released-by-guest");
    removed(&remove(&vm, "lan", SOON), NicRemoval::Released);
    assert_eq!((control.nics(), vm.config().nics()), (vec![], &[][..]));
}

#[test]
fn a_request_that_had_its_time_can_be_withdrawn() {
    let (vm, platform) = started(false);
    let (bdf, events) = (vm.config().nics()[0].bdf, vm.events());
    let asked = remove(&vm, "lan", Duration::ZERO);
    assert!(asked.wait(SOON).is_some_and(|outcome| !outcome.is_done()));
    vm.offer_nic(&name("lan")).expect("the guest has it still");
    platform.control().eject(bdf);
    let expected = [
        "nic-eject-requested",
        "nic-remove-refused",
        "nic-released-by-guest",
    ];
    assert_eq!(told(&events, "nic-released-by-guest"), expected);
    assert_eq!(names(&platform.control().nics()), ["lan"]);
    let asked = remove(&vm, "lan", SOON);
    removed(&asked, NicRemoval::Released);
}

#[test]
fn a_card_that_goes_late_can_be_waited_for() {
    let (vm, platform) = started(false);
    let bdf = vm.config().nics()[0].bdf;
    let asked = remove(&vm, "lan", Duration::ZERO);
    assert!(asked.wait(SOON).is_some_and(|outcome| !outcome.is_done()));
    let held = platform.control().hold_removals();
    platform.control().eject(bdf);
    let forced = vm.force_remove_nic(&name("lan")).expect("it goes already");
    let again = vm.force_remove_nic(&name("lan")).expect("it goes already");
    assert_eq!(forced.id(), again.id(), "one end");
    let busy = NicRequestError::BeingRemoved { name: name("lan") };
    assert_eq!(vm.remove_nic(&name("lan"), SOON).err(), Some(busy.clone()));
    assert_eq!(vm.offer_nic(&name("lan")).err(), Some(busy));
    drop(held);
    removed(&forced, NicRemoval::ReleasedLate);
    assert_eq!((platform.control().nics(), vm.config().nics()), (vec![], &[][..]));
}

#[test]
fn a_card_that_is_broken_has_no_driver() {
    let (vm, platform) = started(true);
    let (info, operation) = add(&vm, "Fred", SOON);
    let outcome = operation.wait(SOON).expect("a driver takes it");
    assert!(matches!(outcome, AddNicOutcome::DriverReady(_)), "{outcome}");
    let unit = info.config.unit_name();
    platform.control().needs_reset(&unit);
    let card = vm.nics().expect("it lives").remove(1);
    assert_eq!((card.state, card.driver_ready), (Some(NicState::Attached), false));
    platform.control().driver(&unit, true);
    assert!(
        vm.nics().expect("it lives")[1].driver_ready,
        "its driver reset it"
    );
}

/// A supervisor that the test drives itself, of a VM that is off and kept in `folder`.
fn driven(folder: &tempfile::TempDir) -> (Supervisor, Receiver<Message>, FakePlatform) {
    let config = VmConfig::builder("test", "/boot/vmlinuz").nic(NicSpec::new("lan", "tap0"));
    let config = config.build().expect("the configuration is valid");
    let dir = StateDir::create(folder.path().join("vm"), &config).expect("a new folder");
    let (sender, receiver) = channel();
    let platform = FakePlatform::default();
    let shared = Arc::new(shared::Shared::new(Arc::new(config), Arc::new(platform.clone())));
    let supervisor = Supervisor::new(shared, Some(dir), sender);
    (supervisor, receiver, platform)
}

#[test]
fn what_cannot_be_stored_takes_no_other_card_along() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut vm, receiver, _platform) = driven(&folder);
    drop(folder);
    let (_, first) = nic_add::add(&mut vm, spec("first"), SOON).expect("there is room");
    let gone = nic_remove::remove(&mut vm, &name("first"), SOON).expect("it is there");
    let (second, kept) = nic_add::add(&mut vm, spec("second one"), SOON).expect("there is room");
    assert_eq!(second.config.bdf.slot(), 9, "the place of the first");
    let first_failed = || first.outcome().is_some() && gone.outcome().is_some();
    // Who stores last is not known, but each fails.
    while !first_failed() {
        vm.handle(receiver.recv_timeout(SOON).expect("the workers report"));
        if kept.outcome().is_none() {
            assert!(
                vm.config.nic(&name("second one")).is_some(),
                "the first one's failure is not its"
            );
        }
    }
    assert!(matches!(gone.outcome(), Some(RemoveNicOutcome::Failed(_))));
}

#[test]
fn a_machine_that_is_built_meanwhile_follows_what_is_undone() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut vm, receiver, platform) = driven(&folder);
    drop(folder);
    let renamed = nic_change::rename(&mut vm, name("lan"), name("wan")).expect("the name is free");
    let pulled = nic_change::set_link(&mut vm, name("wan"), false).expect("it is there");
    power::start(&mut vm);
    while vm.state != State::Running || renamed.outcome().is_none() || pulled.outcome().is_none() {
        vm.handle(receiver.recv_timeout(SOON).expect("the workers report"));
    }
    assert!(matches!(renamed.outcome(), Some(Outcome::Failed(_))));
    assert_eq!(platform.control().nics(), vm.config.nics());
}

/// Whoever is killed at any of these moments leaves a document that tells what was there.
#[test]
fn the_document_holds_a_card_when_it_is_there_and_until_it_is_gone() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut vm, receiver, platform) = driven(&folder);
    let document = folder.path().join("vm").join("config.json");
    let holds = || {
        let text = std::fs::read_to_string(&document).expect("it is there");
        text.contains("\"Fred\"")
    };
    let next = |vm: &mut Supervisor| vm.handle(receiver.recv_timeout(SOON).expect("a report"));
    power::start(&mut vm);
    next(&mut vm);
    let (info, adding) = nic_add::add(&mut vm, spec("Fred"), SOON).expect("there is room");
    assert!(!holds(), "it is being added");
    wait_until("the worker", || platform.control().nics().len() == 2);
    assert!(!holds(), "the guest could see it, and nobody was told");
    next(&mut vm);
    assert!(adding.outcome().is_none());
    next(&mut vm);
    assert!(holds(), "it is stored before the guest is told");
    let removal = nic_remove::remove(&mut vm, &name("Fred"), SOON).expect("it is there");
    assert!(holds(), "the guest may keep it");
    platform.control().eject(info.config.bdf);
    while removal.outcome().is_none() {
        assert!(
            holds() || platform.control().nics().len() == 1,
            "it is there still"
        );
        next(&mut vm);
    }
    assert!(!holds());
}
