//! Adding network cards.
//!
//! ```text
//! build, visible last (worker) ─ store ─ tell the guest [nic-attached] ─ driver ready, or the deadline
//! ```

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::{ConfigError, NicConfig, NicSpec, VmConfig};
use crate::event::EventKind;
use crate::ids::{Bdf, UnitName};
use crate::state::State;
use crate::vm::card::{CardEvent, NicState};
use crate::vm::cards::Present;
use crate::vm::error::NicRequestError;
use crate::vm::nic::{AddNicError, AddNicOutcome, NicInfo};
use crate::vm::operation::{Operation, OperationKind};
use crate::vm::ops::nic::{forget, info, planned};
use crate::vm::ops::nic_remove::released;
use crate::vm::platform::BuildError;
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

pub(super) fn end_add(vm: &mut Supervisor, bdf: Bdf, outcome: AddNicOutcome) {
    if let Some(operation) = vm.cards.at(bdf).and_then(|present| present.add.take()) {
        vm.end_beside(&operation, outcome);
    }
}

pub(super) fn no_driver(vm: &Supervisor) -> AddNicOutcome {
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
