//! What adding ([`nic_add`](super::nic_add)), removing ([`nic_remove`](super::nic_remove)) and changing
//! ([`nic_change`](super::nic_change)) network cards share: what is planned, and what a new machine, the end of a guest and
//! a deadline mean for every card.
//!
//! The configuration follows the machine: a card is stored when it is really there or really gone.

use crate::config::{ConfigError, NicConfig, VmConfig};
use crate::event::NicRemoval;
use crate::ids::{Bdf, NicName, OperationId};
use crate::vm::card::NicState;
use crate::vm::cards::Present;
use crate::vm::error::NicRequestError;
use crate::vm::nic::{AddNicOutcome, NicInfo};
use crate::vm::operation::Operation;
use crate::vm::ops::nic_add::{end_add, no_driver};
use crate::vm::ops::nic_remove::{gone, not_released};
use crate::vm::platform::Machine;
use crate::vm::supervisor::Supervisor;

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

pub(super) fn without(config: &VmConfig, addresses: &[Bdf]) -> VmConfig {
    let going = config.nics().iter().filter(|nic| addresses.contains(&nic.bdf));
    going.fold(config.clone(), |config, nic| {
        config.without_nic(&nic.name).unwrap_or(config)
    })
}

/// Takes a card out of the configuration again, whether that can be stored or not; another that has its place meanwhile
/// stays.
pub(super) fn forget(vm: &mut Supervisor, nic: &NicConfig) {
    let held = vm.config.nic(&nic.name);
    if held.is_some_and(|held| (held.bdf, held.mac) == (nic.bdf, nic.mac)) {
        let config = without(&vm.config, &[nic.bdf]);
        vm.change_config(config, |_, _| {});
    }
}

pub(super) fn info(config: NicConfig, present: Option<&Present>) -> NicInfo {
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
