//! The commands about network cards.

use std::time::Duration;

use serde_json::{Value, json};
use vm_lifecycle::config::ConfigError;
use vm_lifecycle::ids::{IdError, NicName};
use vm_lifecycle::vm::nic::{AddNicOutcome, NicInfo, RemoveNicOutcome};
use vm_lifecycle::vm::operation::Operation;
use vm_lifecycle::vm::{NicRequestError, Vm};

use crate::arguments;
use crate::commands::{DEFAULT_SECONDS, PATIENCE, finish, finish_within, parse_seconds};

/// What `nic` understands.
pub const USAGE: &str = "nic add name=N,tap=T[,mac=M] [SECONDS], nic remove NAME [SECONDS] [force], \
                         nic offer NAME, nic rename OLD NEW, nic link NAME up|down";

/// Runs `nic` with the words behind it.
pub fn run(vm: &Vm, words: &[&str]) -> Result<Value, String> {
    let default = Duration::from_secs(DEFAULT_SECONDS);
    match words {
        ["add", card] => add(vm, card, default),
        ["add", card, seconds] => add(vm, card, parse_seconds(seconds)?),
        ["remove", card] => remove(vm, card, default),
        ["remove", card, "force"] => force(vm, &name(card)?),
        ["remove", card, seconds] => remove(vm, card, parse_seconds(seconds)?),
        ["remove", card, seconds, "force"] => remove_or_force(vm, card, parse_seconds(seconds)?),
        ["offer", card] => offer(vm, &name(card)?),
        ["rename", old, new] => finish(vm.rename_nic(&name(old)?, &name(new)?)),
        ["link", card, "up"] => finish(vm.set_nic_link(&name(card)?, true)),
        ["link", card, "down"] => finish(vm.set_nic_link(&name(card)?, false)),
        _ => Err(format!("the commands are {USAGE}")),
    }
}

fn name(text: &str) -> Result<NicName, String> {
    NicName::new(text).map_err(|error: IdError| error.to_string())
}

fn add(vm: &Vm, card: &str, within: Duration) -> Result<Value, String> {
    let spec = arguments::nic(card)?;
    let (info, operation) = vm.add_nic(spec, within).map_err(|error| error.to_string())?;
    let outcome = finish_within(Ok::<_, String>(operation), within.saturating_add(PATIENCE))?;
    let info = match outcome {
        AddNicOutcome::DriverReady(info) => info,
        _ => info,
    };
    Ok(json!({ "nic": describe(&info) }))
}

fn remove(vm: &Vm, card: &str, within: Duration) -> Result<Value, String> {
    let operation = vm.remove_nic(&name(card)?, within);
    finish_within(operation, within.saturating_add(PATIENCE)).map(|_| json!({}))
}

fn force(vm: &Vm, name: &NicName) -> Result<Value, String> {
    finish_within(vm.force_remove_nic(name), PATIENCE).map(|_| json!({}))
}

/// Withdraws a request to let go of the card, and brings back one that the guest let go of by itself.
fn offer(vm: &Vm, name: &NicName) -> Result<Value, String> {
    vm.offer_nic(name)
        .map(|()| json!({}))
        .map_err(|error| error.to_string())
}

/// Asks the guest first.
fn remove_or_force(vm: &Vm, card: &str, within: Duration) -> Result<Value, String> {
    let name = name(card)?;
    let asked: Operation<RemoveNicOutcome> =
        vm.remove_nic(&name, within).map_err(|error| error.to_string())?;
    match asked.wait(within.saturating_add(PATIENCE)) {
        Some(RemoveNicOutcome::NotReleased { .. }) => match vm.force_remove_nic(&name) {
            // It went at the last moment.
            Err(NicRequestError::Config(ConfigError::NoNic { .. })) => Ok(json!({})),
            forced => finish_within(forced, PATIENCE).map(|_| json!({})),
        },
        Some(RemoveNicOutcome::Removed(_)) => Ok(json!({})),
        Some(outcome) => Err(outcome.to_string()),
        None => Err("remove-nic goes on".to_owned()),
    }
}

/// A card as `status` tells of it.
pub fn describe(info: &NicInfo) -> Value {
    let NicInfo {
        config,
        state,
        driver_ready,
    } = info;
    json!({
        "name": config.name,
        "mac": config.mac,
        "bdf": config.bdf,
        "acpi_index": config.acpi_index,
        "tap": config.tap,
        "link": if config.link_up { "up" } else { "down" },
        "state": state,
        "driver_ready": driver_ready,
    })
}
