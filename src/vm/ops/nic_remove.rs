//! Removing network cards, and cards that the guest lets go of.
//!
//! ```text
//! remove  ask the guest ─ it lets go ─ give back (worker) ─ store ─ [nic-removed]
//! force   give back (worker) ─ store ─ [nic-removed]
//! ```
//! A card whose removal is waited for goes with a reset, before the guest looks again, and with the end of the guest.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::event::{EventKind, NicRemoval};
use crate::ids::{Bdf, NicName, UnitName};
use crate::state::State;
use crate::vm::card::{CardEvent, NicState};
use crate::vm::cards::Present;
use crate::vm::error::NicRequestError;
use crate::vm::nic::{AddNicOutcome, RemoveNicError, RemoveNicOutcome};
use crate::vm::operation::{Operation, OperationKind};
use crate::vm::ops::nic::{settled, without};
use crate::vm::ops::nic_add::end_add;
use crate::vm::supervisor::Supervisor;

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
pub(super) fn released(vm: &mut Supervisor, bdf: Bdf) {
    if let Some(present) = vm.cards.find(bdf) {
        let name = present.card.nic.name.clone();
        vm.publish(EventKind::NicReleasedByGuest { name });
    }
}

/// Gives back what the card at `bdf` held on the host.
pub(super) fn give_back(vm: &mut Supervisor, bdf: Bdf, how: NicRemoval) {
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
pub(super) fn gone(vm: &mut Supervisor, addresses: &[Bdf], how: NicRemoval) {
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

pub(super) fn not_released(vm: &mut Supervisor, bdf: Bdf) {
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
