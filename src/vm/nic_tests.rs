//! Network cards that come and go, against a machine without a guest: every way that adding and removing can end.

use super::error::NicRequestError;
use super::fake::FakePlatform;
use super::nic::{AddNicOutcome, NicInfo, NicState, RemoveNicOutcome};
use super::operation::{Ended, Outcome};
use super::*;
use crate::config::{NicConfig, NicSpec};
use crate::event::NicRemoval;
use crate::ids::NicName;
use std::time::Instant;

pub(super) const SOON: Duration = Duration::from_secs(60);

pub(super) fn name(text: &str) -> NicName {
    NicName::new(text).expect("a valid name")
}

pub(super) fn spec(text: &str) -> NicSpec {
    NicSpec::new(text, format!("tap-{}", text.len()))
}

/// A VM with one card, `lan`, whose guest obeys or does not.
pub(super) fn vm(obeys: bool) -> (Vm, FakePlatform) {
    let platform = FakePlatform::default();
    platform.control().obey_hot_plug(obeys, obeys);
    let config = VmConfig::builder("test", "/boot/vmlinuz").nic(NicSpec::new("lan", "tap0"));
    let config = config.build().expect("the configuration is valid");
    let vm = Vm::new(config, Arc::new(platform.clone())).expect("the fake refuses nothing");
    (vm, platform)
}

pub(super) fn started(obeys: bool) -> (Vm, FakePlatform) {
    let (vm, platform) = vm(obeys);
    done(vm.start().expect("an off vm can be started"));
    (vm, platform)
}

pub(super) fn done<O: Ended + std::fmt::Debug>(operation: Operation<O>) -> O {
    let outcome = operation.wait(SOON).expect("it ends");
    assert!(outcome.is_done(), "{outcome}");
    outcome
}

pub(super) fn add(vm: &Vm, text: &str, within: Duration) -> (NicInfo, Operation<AddNicOutcome>) {
    vm.add_nic(spec(text), within).expect("the card can be added")
}

pub(super) fn remove(vm: &Vm, text: &str, within: Duration) -> Operation<RemoveNicOutcome> {
    vm.remove_nic(&name(text), within)
        .expect("the card can be removed")
}

pub(super) fn removed(operation: &Operation<RemoveNicOutcome>, how: NicRemoval) {
    let outcome = operation.wait(SOON).expect("it ends");
    assert!(
        matches!(outcome, RemoveNicOutcome::Removed(is) if is == how),
        "{outcome}, not {how:?}"
    );
}

pub(super) fn names(nics: &[NicConfig]) -> Vec<String> {
    nics.iter().map(|nic| nic.name.to_string()).collect()
}

/// The events that are about cards, as a reader of JSON sees them.
pub(super) fn told(events: &EventStream, until: &str) -> Vec<String> {
    let mut told = Vec::new();
    while let Some(event) = events.next(SOON) {
        let value = serde_json::to_value(&event).expect("events are JSON");
        let text = value["event"].as_str().unwrap_or_default().to_owned();
        if text.starts_with("nic-") {
            told.push(text);
        }
        if told.last().is_some_and(|last| last == until) {
            return told;
        }
    }
    panic!("no {until} behind {told:?}");
}

/// Waits for what the supervisor does soon; a test that waits for long has failed.
pub(super) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < SOON, "no end of waiting for {what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_card_comes_and_goes_and_the_document_follows() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("vm");
    let platform = FakePlatform::default();
    platform.control().obey_hot_plug(true, true);
    let config = VmConfig::builder("test", "/boot/vmlinuz").build();
    let config = config.expect("the configuration is valid");
    let vm = Vm::create(&dir, config, Arc::new(platform.clone())).expect("a new vm");
    done(vm.start().expect("an off vm can be started"));
    let events = vm.events();
    let (info, operation) = add(&vm, "Fred", SOON);
    assert_eq!(info.config.acpi_index, Some(1));
    let outcome = done(operation);
    let AddNicOutcome::DriverReady(ready) = outcome else {
        panic!("{outcome}");
    };
    assert_eq!(
        (ready.config.clone(), ready.state),
        (info.config.clone(), Some(NicState::DriverReady))
    );
    assert_eq!(
        told(&events, "nic-driver-ready"),
        ["nic-attached", "nic-driver-ready"]
    );
    done(add(&vm, "büro 🖧", SOON).1);
    done(vm.rename_nic(&name("büro 🖧"), &name("WAN")).expect("it is there"));
    done(vm.set_nic_link(&name("WAN"), false).expect("it is there"));
    removed(&remove(&vm, "Fred", SOON), NicRemoval::Released);
    assert_eq!(
        told(&events, "nic-removed"),
        [
            "nic-attached",
            "nic-driver-ready",
            "nic-renamed",
            "nic-link",
            "nic-eject-requested",
            "nic-removed"
        ]
    );
    assert_eq!(
        platform.control().nics(),
        vm.config().nics(),
        "the machine's cards"
    );
    let kept = vm.config();
    drop(vm);
    let vm = Vm::open(&dir, Arc::new(platform)).expect("the vm is kept");
    assert_eq!(*vm.config(), *kept);
    assert_eq!(names(kept.nics()), ["WAN"]);
    assert!(!kept.nics()[0].link_up);
}

#[test]
fn without_a_driver_the_card_stays_and_a_late_driver_is_told() {
    let (vm, platform) = started(false);
    let events = vm.events();
    let (info, operation) = add(&vm, "Fred", Duration::ZERO);
    let outcome = operation.wait(SOON).expect("the deadline passes");
    assert!(
        matches!(outcome, AddNicOutcome::NoDriver { paused: false }),
        "{outcome}"
    );
    assert!(vm.config().nic(&name("Fred")).is_some());
    platform.control().driver(&info.config.unit_name(), true);
    assert_eq!(
        told(&events, "nic-driver-ready"),
        ["nic-attached", "nic-driver-ready"]
    );
}

#[test]
fn a_guest_that_ignores_the_request_keeps_a_working_card_and_may_let_go_late() {
    let (vm, platform) = started(false);
    let bdf = vm.config().nics()[0].bdf;
    let events = vm.events();
    let operation = remove(&vm, "lan", Duration::ZERO);
    let outcome = operation.wait(SOON).expect("the deadline passes");
    assert!(
        matches!(outcome, RemoveNicOutcome::NotReleased { paused: false }),
        "{outcome}"
    );
    assert_eq!(vm.nics().expect("it lives")[0].state, Some(NicState::Attached));
    platform.control().eject(bdf);
    let expected = ["nic-eject-requested", "nic-remove-refused", "nic-removed"];
    assert_eq!(told(&events, "nic-removed"), expected);
    assert_eq!((platform.control().nics(), vm.config().nics()), (vec![], &[][..]));
}

#[test]
fn what_is_being_removed_is_told_so_and_force_overtakes() {
    let (vm, platform) = started(false);
    let asked = remove(&vm, "lan", SOON);
    let busy = NicRequestError::BeingRemoved { name: name("lan") };
    assert_eq!(vm.remove_nic(&name("lan"), SOON).err(), Some(busy.clone()));
    assert_eq!(vm.add_nic(spec("lan"), SOON).err(), Some(busy.clone()));
    assert_eq!(
        vm.rename_nic(&name("lan"), &name("wan")).err(),
        Some(busy.clone())
    );
    assert_eq!(vm.set_nic_link(&name("lan"), false).err(), Some(busy));
    let forced = vm
        .force_remove_nic(&name("lan"))
        .expect("force needs no settled card");
    let outcome = asked.wait(SOON).expect("force ends it");
    assert!(matches!(outcome, RemoveNicOutcome::Overtaken), "{outcome}");
    removed(&forced, NicRemoval::Forced);
    assert_eq!(platform.control().nics(), []);
    let error = vm.remove_nic(&name("lan"), SOON).expect_err("it is gone");
    assert_eq!(error.to_string(), "the vm has no network card lan");
    drop(add(&vm, "lan", SOON));
}

#[test]
fn a_removal_overtakes_an_addition_that_waits_for_a_driver() {
    let (vm, platform) = started(false);
    let (info, added) = add(&vm, "Fred", SOON);
    let attached = || vm.nics().expect("it lives")[1].state == Some(NicState::Attached);
    wait_until("the card to be attached", attached);
    let asked = remove(&vm, "Fred", SOON);
    let outcome = added.wait(SOON).expect("it is overtaken");
    assert!(matches!(outcome, AddNicOutcome::Overtaken), "{outcome}");
    platform.control().eject(info.config.bdf);
    removed(&asked, NicRemoval::Released);
}

#[test]
fn a_paused_guest_is_waited_for_and_blamed_for_nothing() {
    let (vm, platform) = started(false);
    done(vm.pause().expect("a running vm can be paused"));
    let outcome = remove(&vm, "lan", Duration::ZERO)
        .wait(SOON)
        .expect("the deadline passes");
    assert!(
        matches!(outcome, RemoveNicOutcome::NotReleased { paused: true }),
        "{outcome}"
    );
    let outcome = add(&vm, "Fred", Duration::ZERO)
        .1
        .wait(SOON)
        .expect("the deadline passes");
    assert!(
        matches!(outcome, AddNicOutcome::NoDriver { paused: true }),
        "{outcome}"
    );
    removed(
        &vm.force_remove_nic(&name("Fred"))
            .expect("force works in a pause"),
        NicRemoval::Forced,
    );
    done(vm.resume().expect("a paused vm can be resumed"));
    platform.control().obey_hot_plug(true, true);
    removed(&remove(&vm, "lan", SOON), NicRemoval::Released);
}

#[test]
fn a_card_that_was_asked_for_goes_with_a_reset_and_with_the_end_of_the_guest() {
    let (vm, platform) = started(false);
    drop(add(&vm, "Fred", Duration::ZERO).1.wait(SOON));
    let given_up = remove(&vm, "Fred", Duration::ZERO);
    assert!(given_up.wait(SOON).is_some_and(|outcome| !outcome.is_done()));
    let asked = remove(&vm, "lan", SOON);
    done(vm.reset().expect("a running vm can be reset"));
    removed(&asked, NicRemoval::Reset);
    assert_eq!(
        names(&platform.control().nics()),
        ["Fred"],
        "it was told to be there still"
    );
    let asked = remove(&vm, "Fred", SOON);
    let (_, waiting) = add(&vm, "second", SOON);
    done(vm.power_off().expect("a running vm has power"));
    removed(&asked, NicRemoval::GuestEnded);
    let outcome = waiting.wait(SOON).expect("it ends");
    assert!(matches!(outcome, AddNicOutcome::GuestEnded), "{outcome}");
    assert_eq!(names(vm.config().nics()), ["second"]);
}

#[test]
fn while_the_vm_is_off_only_the_configuration_changes() {
    let (vm, _platform) = vm(false);
    let outcome = done(add(&vm, "Fred", Duration::ZERO).1);
    assert!(matches!(outcome, AddNicOutcome::Configured), "{outcome}");
    done(vm.rename_nic(&name("Fred"), &name("Freda")).expect("it is there"));
    removed(&remove(&vm, "lan", Duration::ZERO), NicRemoval::Off);
    removed(
        &vm.force_remove_nic(&name("Freda")).expect("it is there"),
        NicRemoval::Off,
    );
    assert_eq!(vm.nics().expect("it lives"), []);
}

#[test]
fn impossible_cards_are_refused_by_name() {
    let (vm, platform) = started(true);
    for index in 1..64 {
        let nic = NicSpec::new(format!("card {index}"), format!("tap{index}"));
        done(vm.add_nic(nic, SOON).expect("64 are possible").1);
    }
    assert_eq!(platform.control().nics().len(), 64);
    let refusal = vm
        .add_nic(NicSpec::new("card 64", "tap64"), SOON)
        .expect_err("one too many");
    assert_eq!(
        refusal.to_string(),
        "network card card 64 is one too many: a vm can have 64"
    );
    let refusal = vm
        .rename_nic(&name("card 1"), &name("lan"))
        .expect_err("the name is taken");
    assert_eq!(refusal.to_string(), "two network cards are called lan");
    removed(&remove(&vm, "card 7", SOON), NicRemoval::Released);
    platform.control().refuse_nics(true);
    let (_, operation) = vm
        .add_nic(NicSpec::new("card 64", "tap64"), SOON)
        .expect("there is room");
    let outcome = operation.wait(SOON).expect("the host refuses").to_string();
    let expected = "the network card could not be added: the host refused a network card: ";
    assert!(outcome.starts_with(expected), "{outcome}");
    assert_eq!(
        (platform.control().nics().len(), vm.config().nics().len()),
        (63, 63)
    );
    done(vm.power_off().expect("a running vm has power"));
}

#[test]
fn what_cannot_be_stored_is_said_and_undone_where_it_can_be() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("vm");
    let platform = FakePlatform::default();
    platform.control().obey_hot_plug(true, true);
    let config = VmConfig::builder("test", "/boot/vmlinuz").nic(NicSpec::new("lan", "tap0"));
    let config = config.build().expect("the configuration is valid");
    let vm = Vm::create(&dir, config.clone(), Arc::new(platform.clone())).expect("a new vm");
    std::fs::remove_dir_all(&dir).expect("the folder goes");
    for running in [false, true] {
        if running {
            done(vm.start().expect("an off vm can be started"));
        }
        let outcome = add(&vm, "Fred", SOON).1.wait(SOON).expect("it ends").to_string();
        let expected = "the network card could not be kept: the configuration was not stored: ";
        assert!(outcome.starts_with(expected), "{outcome}");
        let renamed = vm
            .rename_nic(&name("lan"), &name("wan"))
            .expect("the name is free");
        let outcome = renamed.wait(SOON).expect("it ends");
        assert!(matches!(outcome, Outcome::Failed(_)), "{outcome}");
        let pulled = vm.set_nic_link(&name("lan"), false).expect("it is there");
        assert!(pulled.wait(SOON).is_some_and(|outcome| !outcome.is_done()));
        assert_eq!(vm.config().nics(), config.nics(), "running: {running}");
    }
    assert_eq!(platform.control().nics(), config.nics());
    let outcome = remove(&vm, "lan", SOON).wait(SOON).expect("it ends").to_string();
    assert!(outcome.starts_with("the network card is gone, but the configuration was not stored: "));
    assert_eq!(platform.control().nics(), []);
}

#[test]
fn the_lives_of_cards_can_be_looked_up_in_bounds() {
    let (vm, _platform) = started(true);
    for _ in 0..cards::PAST_CARDS_MAX + 3 {
        done(add(&vm, "Fred", SOON).1);
        removed(&remove(&vm, "Fred", SOON), NicRemoval::Released);
    }
    let told = vm.inspect().expect("it lives");
    let past = told["nics"]["past"].as_array().expect("a list");
    assert_eq!(past.len(), cards::PAST_CARDS_MAX);
    let states: Vec<_> = past[0]["history"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|step| step["state"].as_str().unwrap_or_default())
        .collect();
    let lived = NicState::ALL.iter().filter(|state| **state != NicState::Released);
    let words: Vec<_> = lived.map(|state| state.as_str()).collect();
    assert_eq!(states, words);
    assert_eq!(told["nics"]["present"][0]["name"], "lan");
}
