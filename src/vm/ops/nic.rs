//! Adding network cards and removing them.
//!
//! ```text
//! add     build, visible last (worker) ─ store ─ tell the guest [nic-attached] ─ driver ready, or the deadline
//! remove  ask the guest ─ it lets go ─ give back (worker) ─ store ─ [nic-removed]
//! force   give back (worker) ─ store ─ [nic-removed]
//! ```
//! The configuration follows the machine: a card is stored when it is really there or really gone. A card whose
//! removal is waited for goes with a reset, before the guest looks again, and with the end of the guest.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::{ConfigError, NicConfig, NicSpec, VmConfig};
use crate::event::{EventKind, NicRemoval};
use crate::ids::{Bdf, NicName, OperationId, UnitName};
use crate::state::State;
use crate::vm::card::{CardEvent, NicState};
use crate::vm::cards::Present;
use crate::vm::error::NicRequestError;
use crate::vm::nic::{AddNicError, AddNicOutcome, NicInfo, RemoveNicError, RemoveNicOutcome};
use crate::vm::operation::{Operation, OperationKind};
use crate::vm::platform::{BuildError, Machine};
use crate::vm::supervisor::Supervisor;

/// Begins to add a card.
pub fn add(
    vm: &mut Supervisor,
    spec: NicSpec,
    within: Duration,
) -> Result<(NicInfo, Operation<AddNicOutcome>), NicRequestError> {
    vm.check_may_begin(OperationKind::AddNic)?;
    let config = planned(vm).with_nic(spec).map_err(|error| explain(vm, error))?;
    let nic = config
        .nics()
        .last()
        .cloned()
        .expect("with_nic puts the card last");
    let bdf = nic.bdf;
    let Some(machine) = vm.machine.clone() else {
        let operation = vm.begin_beside(OperationKind::AddNic, None);
        add_on_paper(vm, config, nic.clone(), operation.clone());
        return Ok((info(nic, None), operation));
    };
    let operation = vm.begin_beside(OperationKind::AddNic, Instant::now().checked_add(within));
    vm.cards
        .insert(nic.clone(), NicState::Adding, Some(operation.clone()));
    let info = info(nic.clone(), vm.cards.find(bdf));
    let work = move || machine.add_nic(&nic);
    vm.work("vm-nic", work, move |vm, result| added(vm, bdf, result));
    Ok((info, operation))
}

fn add_on_paper(vm: &mut Supervisor, config: VmConfig, nic: NicConfig, operation: Operation<AddNicOutcome>) {
    vm.change_config(config, move |vm, stored| match stored {
        Ok(()) => vm.end_beside(&operation, AddNicOutcome::Configured),
        Err(error) => {
            // A machine that was started meanwhile has the card.
            if vm.state == State::Off {
                forget(vm, &nic);
            }
            vm.end_beside(
                &operation,
                AddNicOutcome::Failed(Arc::new(AddNicError::NotStored(error))),
            );
        }
    });
}

/// The configuration with every card that is being added.
pub(super) fn planned(vm: &Supervisor) -> VmConfig {
    let config = VmConfig::clone(&vm.config);
    vm.cards.adding().fold(config, |config, nic| {
        let held = config.nics().iter().any(|other| other.bdf == nic.bdf);
        // What was free when the card was promised stays so: names and settings are checked against this.
        match (held, config.with_nic(nic.clone().into())) {
            (false, Ok(with_nic)) => with_nic,
            (true, _) | (_, Err(_)) => config,
        }
    })
}

/// A name that is taken by a card on its way out will be free soon.
fn explain(vm: &Supervisor, error: ConfigError) -> NicRequestError {
    if let ConfigError::DuplicateNic { name } = &error
        && let Some(nic) = vm.config.nic(name)
        && let Some(Present { card, .. }) = vm.cards.find(nic.bdf)
        && matches!(card.state(), NicState::EjectRequested | NicState::Ejected)
    {
        return NicRequestError::BeingRemoved { name: name.clone() };
    }
    error.into()
}

/// The worker has added the card at `bdf`, or could not.
fn added(vm: &mut Supervisor, bdf: Bdf, result: io::Result<Result<(), BuildError>>) {
    match result {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return add_failed(vm, bdf, AddNicError::Machine(error)),
        Err(error) => return undo_add(vm, bdf, AddNicError::Worker(error)),
    }
    let Some(present) = vm.cards.find(bdf) else { return };
    match vm.config.with_nic(present.card.nic.clone().into()) {
        Ok(config) => vm.change_config(config, move |vm, stored| match stored {
            Ok(()) => attached(vm, bdf),
            Err(error) => undo_add(vm, bdf, AddNicError::NotStored(error)),
        }),
        Err(error) => undo_add(vm, bdf, AddNicError::Config(error)),
    }
}

/// The card at `bdf` is there and stored.
fn attached(vm: &mut Supervisor, bdf: Bdf) {
    let Some(present) = vm.cards.apply(bdf, CardEvent::Added) else {
        return;
    };
    let (nic, is_late, state) = (
        present.card.nic.clone(),
        present.add_is_late,
        present.card.state(),
    );
    let unit = nic.unit_name();
    vm.publish(EventKind::NicAttached {
        name: nic.name,
        bdf,
        acpi_index: nic.acpi_index,
    });
    if let Some(machine) = &vm.machine {
        machine.announce(&unit);
    }
    if state == NicState::DriverReady {
        taken_by_driver(vm, bdf);
    } else if state == NicState::Released {
        released(vm, bdf);
    }
    if is_late {
        end_add(vm, bdf, no_driver(vm));
    }
}

fn undo_add(vm: &mut Supervisor, bdf: Bdf, error: AddNicError) {
    let (Some(machine), Some(present)) = (vm.machine.clone(), vm.cards.find(bdf)) else {
        return add_failed(vm, bdf, error);
    };
    let nic = present.card.nic.clone();
    let unit = nic.unit_name();
    let work = move || machine.remove_device(&unit);
    vm.work("vm-nic", work, move |vm, result| {
        if let Err(error) = result {
            log::error!("the network card at {bdf} could not be taken away again: {error}");
        }
        forget(vm, &nic);
        add_failed(vm, bdf, error);
    });
}

fn add_failed(vm: &mut Supervisor, bdf: Bdf, error: AddNicError) {
    end_add(vm, bdf, AddNicOutcome::Failed(Arc::new(error)));
    vm.cards.remove(bdf);
}

fn end_add(vm: &mut Supervisor, bdf: Bdf, outcome: AddNicOutcome) {
    if let Some(operation) = vm.cards.at(bdf).and_then(|present| present.add.take()) {
        vm.end_beside(&operation, outcome);
    }
}

fn no_driver(vm: &Supervisor) -> AddNicOutcome {
    AddNicOutcome::NoDriver {
        paused: vm.state != State::Running,
    }
}

/// A driver in the guest took a unit, or let go of it.
pub fn driver_ready(vm: &mut Supervisor, unit: &UnitName, ready: bool) {
    let Some(bdf) = vm.cards.of_unit(unit) else { return };
    let before = vm.cards.find(bdf).map(|present| present.card.state());
    let Some(present) = vm.cards.apply(bdf, CardEvent::Driver(ready)) else {
        return;
    };
    let free = matches!(before, Some(NicState::Attached | NicState::Released));
    if free && present.card.state() == NicState::DriverReady {
        taken_by_driver(vm, bdf);
    }
}

fn taken_by_driver(vm: &mut Supervisor, bdf: Bdf) {
    let Some(present) = vm.cards.find(bdf) else { return };
    let info = info(present.card.nic.clone(), Some(present));
    vm.publish(EventKind::NicDriverReady {
        name: info.config.name.clone(),
    });
    end_add(vm, bdf, AddNicOutcome::DriverReady(info));
}

/// Begins to remove a card with the guest's help.
pub fn remove(
    vm: &mut Supervisor,
    name: &NicName,
    within: Duration,
) -> Result<Operation<RemoveNicOutcome>, NicRequestError> {
    vm.check_may_begin(OperationKind::RemoveNic)?;
    if let Some((operation, true)) = going(vm, name) {
        return Ok(operation);
    }
    let bdf = settled(vm, name)?;
    let Some(machine) = vm.machine.clone() else {
        return remove_on_paper(vm, name);
    };
    end_add(vm, bdf, AddNicOutcome::Overtaken);
    let operation = vm.begin_beside(OperationKind::RemoveNic, Instant::now().checked_add(within));
    if let Some(present) = vm.cards.apply(bdf, CardEvent::EjectRequested) {
        present.removal = Some(operation.clone());
        let unit = present.card.nic.unit_name();
        vm.publish(EventKind::NicEjectRequested { name: name.clone() });
        if !machine.request_eject(&unit) {
            // The guest let go of it by itself, before anybody asked.
            ejected(vm, bdf, false);
        }
    }
    Ok(operation)
}

/// Begins to remove a card without asking the guest.
pub fn force_remove(
    vm: &mut Supervisor,
    name: &NicName,
) -> Result<Operation<RemoveNicOutcome>, NicRequestError> {
    vm.check_may_begin(OperationKind::RemoveNic)?;
    if let Some((operation, _)) = going(vm, name) {
        return Ok(operation);
    }
    let bdf = match (settled(vm, name), vm.config.nic(name)) {
        (Ok(bdf), _) => bdf,
        (Err(NicRequestError::BeingRemoved { .. }), Some(nic)) => nic.bdf,
        (Err(error), _) => return Err(error),
    };
    if vm.machine.is_none() {
        return remove_on_paper(vm, name);
    }
    if let Some(earlier) = vm.cards.at(bdf).and_then(|present| present.removal.take()) {
        vm.end_beside(&earlier, RemoveNicOutcome::Overtaken);
    }
    end_add(vm, bdf, AddNicOutcome::Overtaken);
    let operation = vm.begin_beside(OperationKind::RemoveNic, None);
    if let Some(present) = vm.cards.apply(bdf, CardEvent::Forced) {
        present.removal = Some(operation.clone());
        give_back(vm, bdf, NicRemoval::Forced);
    }
    Ok(operation)
}

/// The operation that ends when the card called `name` is gone, if the guest has it no more, and whether it is a new
/// one: of a card that went late nobody waits for the end.
fn going(vm: &mut Supervisor, name: &NicName) -> Option<(Operation<RemoveNicOutcome>, bool)> {
    let bdf = vm.config.nic(name)?.bdf;
    let present = vm.cards.find(bdf).filter(|present| present.going)?;
    if let Some(operation) = &present.removal {
        return Some((operation.clone(), false));
    }
    let operation: Operation<RemoveNicOutcome> = vm.begin_beside(OperationKind::RemoveNic, None);
    vm.cards.at(bdf)?.removal = Some(operation.clone());
    Some((operation, true))
}

fn remove_on_paper(
    vm: &mut Supervisor,
    name: &NicName,
) -> Result<Operation<RemoveNicOutcome>, NicRequestError> {
    let (before, config) = (vm.config.nic(name).cloned(), vm.config.without_nic(name)?);
    let operation: Operation<RemoveNicOutcome> = vm.begin_beside(OperationKind::RemoveNic, None);
    let ended = operation.clone();
    let name = name.clone();
    vm.change_config(config, move |vm, stored| match stored {
        Ok(()) => {
            let how = NicRemoval::Off;
            vm.publish(EventKind::NicRemoved { name, how });
            vm.end_beside(&ended, RemoveNicOutcome::Removed(how));
        }
        Err(error) => {
            let back = before.and_then(|nic| vm.config.with_nic(nic.into()).ok());
            let error = match back.filter(|_| vm.state == State::Off) {
                Some(config) => {
                    vm.change_config(config, |_, _| {});
                    RemoveNicError::Kept(error)
                }
                None => RemoveNicError::NotStored(error),
            };
            vm.end_beside(&ended, RemoveNicOutcome::Failed(Arc::new(error)));
        }
    });
    Ok(operation)
}

/// The guest let go of what is at `bdf`, asked or not.
pub fn ejected(vm: &mut Supervisor, bdf: Bdf, asked: bool) {
    let Some(present) = vm.cards.apply(bdf, CardEvent::Ejected { asked }) else {
        return;
    };
    match (present.card.state(), &present.removal) {
        (NicState::Ejected, Some(_)) => give_back(vm, bdf, NicRemoval::Released),
        (NicState::Ejected, None) => give_back(vm, bdf, NicRemoval::ReleasedLate),
        (NicState::Released, _) => released(vm, bdf),
        // Of a card that is being added it is told when that is safe in the configuration.
        (
            NicState::Adding
            | NicState::Attached
            | NicState::DriverReady
            | NicState::EjectRequested
            | NicState::Removed,
            _,
        ) => {}
    }
}

/// The guest does not want the card at `bdf`, which nobody asked it for.
fn released(vm: &mut Supervisor, bdf: Bdf) {
    if let Some(present) = vm.cards.find(bdf) {
        let name = present.card.nic.name.clone();
        vm.publish(EventKind::NicReleasedByGuest { name });
    }
}

/// Gives back what the card at `bdf` held on the host.
fn give_back(vm: &mut Supervisor, bdf: Bdf, how: NicRemoval) {
    let (Some(machine), Some(present)) = (vm.machine.clone(), vm.cards.at(bdf)) else {
        return;
    };
    present.going = true;
    let unit = present.card.nic.unit_name();
    let work = move || machine.remove_device(&unit);
    vm.work("vm-nic", work, move |vm, result| match result {
        Ok(_) => gone(vm, &[bdf], how),
        Err(error) => {
            let Some(present) = vm.cards.at(bdf) else { return };
            present.going = false;
            log::error!("what the network card at {bdf} held is not given back: {error}");
            if let Some(operation) = present.removal.take() {
                let error = Arc::new(RemoveNicError::Worker(error));
                vm.end_beside(&operation, RemoveNicOutcome::Failed(error));
            }
        }
    });
}

/// Nothing is left of the cards at these addresses but their place in the configuration.
fn gone(vm: &mut Supervisor, addresses: &[Bdf], how: NicRemoval) {
    let cards = addresses.iter().filter_map(|bdf| vm.cards.remove(*bdf));
    let cards: Vec<Present> = cards.collect();
    if cards.is_empty() {
        return;
    }
    let config = without(&vm.config, addresses);
    vm.change_config(config, move |vm, stored| {
        let error = stored.err().map(|error| {
            log::error!("{error}");
            Arc::new(RemoveNicError::NotStored(error))
        });
        for Present { card, removal, .. } in cards {
            let name = card.nic.name;
            vm.publish(EventKind::NicRemoved { name, how });
            if let Some(operation) = removal {
                let outcome = match &error {
                    None => RemoveNicOutcome::Removed(how),
                    Some(error) => RemoveNicOutcome::Failed(error.clone()),
                };
                vm.end_beside(&operation, outcome);
            }
        }
    });
}

/// The machine is about to be reset: the units of the cards that go with it.
pub fn going_with_reset(vm: &mut Supervisor) -> Vec<UnitName> {
    let mut units = Vec::new();
    for bdf in vm.cards.addresses() {
        if let Some(present) = vm.cards.apply(bdf, CardEvent::Reset)
            && present.card.state() == NicState::Ejected
        {
            present.going = true;
            present.goes_with_reset = true;
            units.push(present.card.nic.unit_name());
        }
    }
    units
}

/// The machine was reset, and the cards that were to go with it are gone.
pub fn gone_with_reset(vm: &mut Supervisor) {
    let going = vm.cards.all().filter(|present| present.goes_with_reset);
    let addresses: Vec<Bdf> = going.map(|present| present.card.nic.bdf).collect();
    gone(vm, &addresses, NicRemoval::Reset);
}

/// The machine that was built has the cards of the configuration. What cannot be stored may have been undone meanwhile.
pub fn machine_built(vm: &mut Supervisor, machine: &dyn Machine) {
    for nic in vm.config.clone().nics() {
        let unit = nic.unit_name();
        machine.rename_nic(&unit, &nic.name);
        machine.set_link(&unit, nic.link_up);
        vm.cards.insert(nic.clone(), NicState::Attached, None);
    }
}

/// Nothing of the machine is left: what was on its way out is gone.
pub fn guest_ended(vm: &mut Supervisor) {
    let (mut going, mut staying) = (Vec::new(), Vec::new());
    for present in vm.cards.all() {
        let leaves = present.removal.is_some() || present.card.state() == NicState::Ejected;
        let list = if leaves { &mut going } else { &mut staying };
        list.push(present.card.nic.bdf);
    }
    gone(vm, &going, NicRemoval::GuestEnded);
    for bdf in staying {
        end_add(vm, bdf, AddNicOutcome::GuestEnded);
        vm.cards.remove(bdf);
    }
}

/// The operation `id`, if it is about a card, has had its time.
pub fn deadline_passed(vm: &mut Supervisor, id: OperationId) {
    let is = |operation: Option<OperationId>| operation == Some(id);
    for bdf in vm.cards.addresses() {
        let Some(present) = vm.cards.at(bdf) else { continue };
        if is(present.removal.as_ref().map(Operation::id)) {
            not_released(vm, bdf);
        } else if is(present.add.as_ref().map(Operation::id)) {
            // Where the host is slow, and not the guest, the operation ends when the card is there.
            present.add_is_late = present.card.state() == NicState::Adding;
            if !present.add_is_late {
                end_add(vm, bdf, no_driver(vm));
            }
        }
    }
}

fn not_released(vm: &mut Supervisor, bdf: Bdf) {
    // A card that the guest let go of meanwhile is not refused any more.
    let Some(present) = vm.cards.apply(bdf, CardEvent::NotReleased) else {
        return;
    };
    let (name, removal) = (present.card.nic.name.clone(), present.removal.take());
    vm.publish(EventKind::NicRemoveRefused { name });
    if let Some(operation) = removal {
        let paused = vm.state != State::Running;
        vm.end_beside(&operation, RemoveNicOutcome::NotReleased { paused });
    }
}

/// The address of the card called `name`, if nothing is being done to it.
pub(super) fn settled(vm: &Supervisor, name: &NicName) -> Result<Bdf, NicRequestError> {
    if vm.cards.adding().any(|nic| nic.name == *name) {
        return Err(NicRequestError::BeingAdded { name: name.clone() });
    }
    let Some(nic) = vm.config.nic(name) else {
        return Err(ConfigError::NoNic { name: name.clone() }.into());
    };
    match vm.cards.find(nic.bdf) {
        Some(present) if !present.card.is_settled() => {
            Err(NicRequestError::BeingRemoved { name: name.clone() })
        }
        _ => Ok(nic.bdf),
    }
}

fn without(config: &VmConfig, addresses: &[Bdf]) -> VmConfig {
    let going = config.nics().iter().filter(|nic| addresses.contains(&nic.bdf));
    going.fold(config.clone(), |config, nic| {
        config.without_nic(&nic.name).unwrap_or(config)
    })
}

/// Takes a card out of the configuration again, whether that can be stored or not; another that has its place meanwhile
/// stays.
fn forget(vm: &mut Supervisor, nic: &NicConfig) {
    let held = vm.config.nic(&nic.name);
    if held.is_some_and(|held| (held.bdf, held.mac) == (nic.bdf, nic.mac)) {
        let config = without(&vm.config, &[nic.bdf]);
        vm.change_config(config, |_, _| {});
    }
}

fn info(config: NicConfig, present: Option<&Present>) -> NicInfo {
    NicInfo {
        config,
        state: present.map(|present| present.card.state()),
        driver_ready: present.is_some_and(|present| present.card.driver_ready()),
    }
}

/// Every card of the VM, with those that are being added.
pub fn infos(vm: &Supervisor) -> Vec<NicInfo> {
    let planned = planned(vm);
    let nics = planned.nics().iter();
    nics.map(|nic| info(nic.clone(), vm.cards.find(nic.bdf)))
        .collect()
}
