//! Changing network cards that stay: their names, their cables, and whether the guest has them.
//!
//! The machine follows at once, the document is stored behind it; what cannot be stored is undone in both.

use std::sync::Arc;

use crate::config::{StateDirError, VmConfig};
use crate::event::EventKind;
use crate::ids::{Bdf, NicName};
use crate::vm::card::CardEvent;
use crate::vm::error::{NicRequestError, OperationError};
use crate::vm::operation::{Operation, OperationKind, Outcome};
use crate::vm::ops::nic::{planned, settled};
use crate::vm::supervisor::Supervisor;

/// Gives the card `old` the name `new`.
pub fn rename(vm: &mut Supervisor, old: NicName, new: NicName) -> Result<Operation, NicRequestError> {
    vm.check_may_begin(OperationKind::ChangeNic)?;
    let bdf = settled(vm, &old)?;
    // A card that is being added has its name already.
    planned(vm).renamed_nic(&old, &new)?;
    let config = vm.config.renamed_nic(&old, &new)?;
    let operation = vm.begin_beside(OperationKind::ChangeNic, None);
    let ended = operation.clone();
    show_name(vm, bdf, &new);
    vm.change_config(config, move |vm, stored| match stored {
        Ok(()) => {
            vm.publish(EventKind::NicRenamed { from: old, to: new });
            vm.end_beside(&ended, Outcome::Done);
        }
        Err(error) => {
            let back = vm.config.renamed_nic(&new, &old).ok();
            if let Some(config) = back.filter(|config| is_at(config, &old, bdf)) {
                show_name(vm, bdf, &old);
                vm.change_config(config, |_, _| {});
            }
            vm.end_beside(&ended, not_stored(error));
        }
    });
    Ok(operation)
}

fn is_at(config: &VmConfig, name: &NicName, bdf: Bdf) -> bool {
    config.nic(name).is_some_and(|nic| nic.bdf == bdf)
}

fn show_name(vm: &mut Supervisor, bdf: Bdf, name: &NicName) {
    if let (Some(present), Some(machine)) = (vm.cards.at(bdf), &vm.machine) {
        present.card.nic.name = name.clone();
        machine.rename_nic(&present.card.nic.unit_name(), name);
    }
}

/// Offers a settled card to the guest again, and withdraws what it was asked.
pub fn offer(vm: &mut Supervisor, name: &NicName) -> Result<(), NicRequestError> {
    vm.check_may_begin(OperationKind::ChangeNic)?;
    let bdf = settled(vm, name)?;
    // In Off there is no guest that could have let go of it.
    let (Some(machine), Some(present)) = (vm.machine.clone(), vm.cards.find(bdf)) else {
        return Ok(());
    };
    if !machine.offer(&present.card.nic.unit_name()) {
        // It did as it was asked to; the word of that is on its way.
        return Err(NicRequestError::BeingRemoved { name: name.clone() });
    }
    vm.cards.apply(bdf, CardEvent::Offered);
    Ok(())
}

/// Plugs the cable of a card in, or pulls it out.
pub fn set_link(vm: &mut Supervisor, name: NicName, up: bool) -> Result<Operation, NicRequestError> {
    vm.check_may_begin(OperationKind::ChangeNic)?;
    let bdf = settled(vm, &name)?;
    let was_up = vm.config.nic(&name).is_some_and(|nic| nic.link_up);
    let config = vm.config.with_nic_link(&name, up)?;
    let operation = vm.begin_beside(OperationKind::ChangeNic, None);
    let ended = operation.clone();
    plug_cable(vm, bdf, up);
    vm.change_config(config, move |vm, stored| match stored {
        Ok(()) => {
            vm.publish(EventKind::NicLink { name, up });
            vm.end_beside(&ended, Outcome::Done);
        }
        Err(error) => {
            let back = vm.config.with_nic_link(&name, was_up).ok();
            if let Some(config) = back.filter(|config| is_at(config, &name, bdf)) {
                plug_cable(vm, bdf, was_up);
                vm.change_config(config, |_, _| {});
            }
            vm.end_beside(&ended, not_stored(error));
        }
    });
    Ok(operation)
}

fn plug_cable(vm: &mut Supervisor, bdf: Bdf, up: bool) {
    if let (Some(present), Some(machine)) = (vm.cards.at(bdf), &vm.machine) {
        present.card.nic.link_up = up;
        machine.set_link(&present.card.nic.unit_name(), up);
    }
}

fn not_stored(error: StateDirError) -> Outcome {
    Outcome::Failed(Arc::new(OperationError::NotStored(error)))
}
