//! Random sequences of everything that can happen to network cards, against a machine without a guest.

use proptest::prelude::*;

use super::fake::FakePlatform;
use super::nic::{AddNicOutcome, NicInfo, NicState, RemoveNicOutcome};
use super::nic_tests::wait_until;
use super::*;
use crate::config::NicSpec;
use crate::event::EventKind;
use crate::ids::NicName;

const SOON: Duration = Duration::from_secs(60);

/// What happens next in a random sequence.
#[derive(Debug, Clone)]
enum Step {
    Add(u8, bool),
    Remove(u8, bool),
    Force(u8),
    Rename(u8, u8),
    Link(u8, bool),
    Eject(u8),
    Offer(u8),
    Driver(u8, bool),
    Obey(bool, bool),
    Refuse(bool),
    Lifecycle(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let card = 0u8..4;
    prop_oneof![
        (card.clone(), any::<bool>()).prop_map(|(card, waits)| Step::Add(card, waits)),
        (card.clone(), any::<bool>()).prop_map(|(card, waits)| Step::Remove(card, waits)),
        card.clone().prop_map(Step::Force),
        (card.clone(), card.clone()).prop_map(|(from, to)| Step::Rename(from, to)),
        (card.clone(), any::<bool>()).prop_map(|(card, up)| Step::Link(card, up)),
        card.clone().prop_map(Step::Eject),
        card.clone().prop_map(Step::Offer),
        (card, any::<bool>()).prop_map(|(card, ready)| Step::Driver(card, ready)),
        (any::<bool>(), any::<bool>()).prop_map(|(takes, releases)| Step::Obey(takes, releases)),
        any::<bool>().prop_map(Step::Refuse),
        (0u8..6).prop_map(Step::Lifecycle),
    ]
}

/// The operations of a random sequence.
#[derive(Default)]
struct Begun {
    adds: Vec<Operation<AddNicOutcome>>,
    removals: Vec<Operation<RemoveNicOutcome>>,
    others: Vec<Operation>,
}

fn card_name(card: u8) -> NicName {
    NicName::new(format!("card {card}")).expect("a valid name")
}

fn play(vm: &Vm, platform: &FakePlatform, step: &Step, begun: &mut Begun) {
    let control = platform.control();
    let within = |waits| if waits { SOON } else { Duration::ZERO };
    match *step {
        Step::Add(card, waits) => {
            let spec = NicSpec::new(card_name(card).as_str(), format!("tap{card}"));
            begun
                .adds
                .extend(vm.add_nic(spec, within(waits)).ok().map(|(_, add)| add));
        }
        Step::Remove(card, waits) => begun
            .removals
            .extend(vm.remove_nic(&card_name(card), within(waits)).ok()),
        Step::Force(card) => begun.removals.extend(vm.force_remove_nic(&card_name(card)).ok()),
        Step::Rename(from, to) => {
            begun
                .others
                .extend(vm.rename_nic(&card_name(from), &card_name(to)).ok());
        }
        Step::Link(card, up) => begun.others.extend(vm.set_nic_link(&card_name(card), up).ok()),
        Step::Eject(card) => {
            let nics = control.nics();
            if let Some(nic) = nics.get(usize::from(card)) {
                control.eject(nic.bdf);
            }
        }
        // Refused or not: it begins no operation.
        Step::Offer(card) => drop(vm.offer_nic(&card_name(card))),
        Step::Driver(card, ready) => {
            let nics = control.nics();
            if let Some(nic) = nics.get(usize::from(card)) {
                control.driver(&nic.unit_name(), ready);
            }
        }
        Step::Obey(takes, releases) => control.obey_hot_plug(takes, releases),
        Step::Refuse(refuses) => control.refuse_nics(refuses),
        Step::Lifecycle(what) => begun.others.extend(
            match what {
                0 | 1 => vm.start(),
                2 => vm.pause(),
                3 => vm.resume(),
                4 => vm.reset(),
                _ => vm.power_off(),
            }
            .ok(),
        ),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn whatever_happens_machine_configuration_and_document_agree_and_every_operation_ends(
        steps in prop::collection::vec(step(), 0..40),
    ) {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().join("vm");
        let platform = FakePlatform::default();
        let config = VmConfig::builder("test", "/boot/vmlinuz").build().expect("the configuration is valid");
        let vm = Vm::create(&dir, config, Arc::new(platform.clone())).expect("a new vm");
        let events = vm.events();
        let mut begun = Begun::default();
        begun.others.extend(vm.start().ok());
        prop_assert!(vm.wait_for(State::Running, SOON), "{}", vm.state());
        for step in &steps {
            play(&vm, &platform, step, &mut begun);
        }
        let settled = |nic: &NicInfo| !matches!(nic.state, Some(NicState::Adding | NicState::Ejected));
        wait_until("the cards to settle", || vm.nics().expect("it lives").iter().all(settled));
        if vm.state() == State::Running {
            let mut expected = vm.config().nics().to_vec();
            expected.sort_by_key(|nic| nic.bdf);
            prop_assert_eq!(platform.control().nics(), expected);
        }
        begun.others.extend(vm.power_off().ok());
        prop_assert!(vm.wait_for(State::Off, SOON), "{}", vm.state());
        let ended = begun.adds.iter().all(|operation| operation.wait(SOON).is_some())
            && begun.removals.iter().all(|operation| operation.wait(SOON).is_some())
            && begun.others.iter().all(|operation| operation.wait(SOON).is_some());
        prop_assert!(ended, "an operation has no outcome");
        let config = vm.config();
        drop(vm);
        let (_, stored) = StateDir::open(&dir).expect("the vm is kept");
        prop_assert_eq!(&stored, &*config);
        check_events(&events)?;
    }
}

/// Begun operations end exactly once, and the cards that events tell of are those that came and went.
fn check_events(events: &EventStream) -> Result<(), TestCaseError> {
    let mut open = std::collections::BTreeSet::new();
    while let Some(event) = events.next(SOON) {
        match event.kind {
            EventKind::OperationBegan { id, .. } => prop_assert!(open.insert(id)),
            EventKind::OperationEnded { id, .. } => prop_assert!(open.remove(&id)),
            EventKind::Lost { .. } => return Ok(()),
            _ => {}
        }
    }
    prop_assert!(open.is_empty(), "{:?} have not ended", open);
    Ok(())
}
