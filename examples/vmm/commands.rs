//! The commands: each is one request to the VM, answered when it has ended or takes too long. `memory` and `quit` are
//! the session's.

use std::time::Duration;

use serde_json::{Value, json};
use vm_lifecycle::state::State;
use vm_lifecycle::vm::Vm;
use vm_lifecycle::vm::operation::{Ended, Operation};

use crate::memory;
use crate::nics;

/// How long commands that wait for the guest wait when they are not told.
pub const DEFAULT_SECONDS: u64 = 60;
/// How long a reply waits for an operation that needs no guest; the operation goes on after that.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `command`; the value's fields go into the reply, the error becomes its text.
pub fn run(vm: &Vm, command: &str, rest: &[&str]) -> Result<Value, String> {
    match (command, rest) {
        ("start", []) => finish(vm.start()),
        ("pause", []) => finish(vm.pause()),
        ("resume", []) => finish(vm.resume()),
        ("reset", []) => finish(vm.reset()),
        ("power-off", []) => finish(vm.power_off()),
        ("shut-down", []) => shut_down(vm, Duration::from_secs(DEFAULT_SECONDS)),
        ("shut-down", [seconds]) => shut_down(vm, parse_seconds(seconds)?),
        ("wait", [state]) => wait(vm, state, Duration::from_secs(DEFAULT_SECONDS)),
        ("wait", [state, seconds]) => wait(vm, state, parse_seconds(seconds)?),
        ("nic", words) => nics::run(vm, words),
        ("status", []) => status(vm),
        ("inspect", []) => Ok(json!({ "inspect": vm.inspect().map_err(|error| error.to_string())? })),
        (
            "start" | "pause" | "resume" | "reset" | "power-off" | "shut-down" | "wait" | "status" | "memory"
            | "inspect" | "quit",
            _,
        ) => Err(format!("wrong number of words after {command:?}")),
        _ => Err(format!(
            "unknown command {command:?}; commands are start, status, pause, resume, reset, shut-down [SECONDS], \
             power-off, wait STATE [SECONDS], memory SIZE [SECONDS], {}, inspect, quit",
            nics::USAGE
        )),
    }
}

fn shut_down(vm: &Vm, within: Duration) -> Result<Value, String> {
    let operation = vm.shut_down(within);
    finish_within(operation, within.saturating_add(PATIENCE)).map(|_| json!({}))
}

/// Waits for an operation that needs no guest.
pub fn finish<E: std::fmt::Display>(operation: Result<Operation, E>) -> Result<Value, String> {
    finish_within(operation, PATIENCE).map(|_| json!({}))
}

/// A disk that hangs can keep a pause or a reset waiting for ever: the next command, perhaps `power-off`, must be read.
pub fn finish_within<O: Ended, E: std::fmt::Display>(
    operation: Result<Operation<O>, E>,
    patience: Duration,
) -> Result<O, String> {
    let operation = operation.map_err(|error| error.to_string())?;
    match operation.wait(patience) {
        Some(outcome) if outcome.is_done() => Ok(outcome),
        Some(outcome) => Err(outcome.to_string()),
        None => Err(format!(
            "{} goes on after {} seconds",
            operation.kind(),
            patience.as_secs()
        )),
    }
}

fn wait(vm: &Vm, state: &str, within: Duration) -> Result<Value, String> {
    let wanted: State = state
        .parse()
        .map_err(|error: vm_lifecycle::state::UnknownState| error.to_string())?;
    if vm.wait_for(wanted, within) {
        return Ok(json!({ "state": wanted }));
    }
    Err(format!(
        "the vm is {} after {} seconds, not {wanted}",
        vm.state(),
        within.as_secs_f64()
    ))
}

/// A number of seconds, with a fraction if need be.
pub fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text
        .parse::<f64>()
        .map_err(|_| format!("{text:?} is not a number of seconds"))?;
    Duration::try_from_secs_f64(seconds).map_err(|error| format!("{text:?} seconds: {error}"))
}

fn status(vm: &Vm) -> Result<Value, String> {
    let status = vm.status().map_err(|error| error.to_string())?;
    let config = vm.config();
    let ready = |unit: &str| {
        status
            .devices
            .iter()
            .any(|d| d.unit.as_str() == unit && d.driver_ready)
    };
    let nics: Vec<_> = status.nics.iter().map(nics::describe).collect();
    let disks: Vec<_> = config
        .disks()
        .iter()
        .map(|disk| {
            json!({
                "name": disk.name, "path": disk.path, "readonly": disk.read_only, "bdf": disk.bdf,
                "driver_ready": ready(disk.unit_name().as_str()),
            })
        })
        .collect();
    Ok(json!({
        "state": status.state,
        "operation": status.operation.map(|operation| operation.as_str()),
        "name": config.name(),
        "config_version": config.version(),
        "cpus": config.cpu_count(),
        "memory": memory::status(vm)?,
        "nics": nics,
        "disks": disks,
    }))
}
