//! The memory of the VM: how much it is, and making it more or less.

use std::time::Duration;

use serde_json::{Value, json};
use vm_lifecycle::vm::Vm;
use vm_lifecycle::vm::memory::{MemoryOutcome, MemoryStatus, ResizeOptions};
use vm_lifecycle::vm::operation::{Ended, ErrorChain};

use crate::arguments::size;

/// How long after the deadline an outcome may come.
const PATIENCE: Duration = Duration::from_secs(60);

/// The six numbers, in bytes.
pub fn status(vm: &Vm) -> Result<Value, String> {
    let memory = vm.memory().map_err(|error| error.to_string())?;
    let MemoryStatus {
        startup_bytes,
        maximum_bytes,
        requested_bytes,
        assigned_bytes,
        guest_total_bytes,
        resident_bytes,
    } = memory;
    Ok(json!({
        "startup": startup_bytes, "maximum": maximum_bytes, "requested": requested_bytes, "assigned": assigned_bytes,
        "guest_total": guest_total_bytes, "resident": resident_bytes,
    }))
}

/// Resizes to `target`; the reply comes when it is reached or at the deadline, and says `ok` only when it is reached.
pub fn resize(vm: &Vm, target: &str, within: Duration) -> Result<Value, String> {
    let target_bytes = size(target)?;
    let options = ResizeOptions {
        within,
        ..ResizeOptions::default()
    };
    let operation = match vm.resize_memory(target_bytes, options) {
        Ok(operation) => operation,
        Err(error) => {
            let reached = vm.memory().map_err(|error| error.to_string())?.assigned_bytes;
            return Ok(json!({
                "ok": false, "error": ErrorChain(&error).to_string(), "requested": target_bytes, "reached": reached,
                "reason": error.reason(),
            }));
        }
    };
    let outcome = operation.wait(within.saturating_add(PATIENCE));
    let outcome = outcome.ok_or_else(|| format!("{operation:?} goes on after its deadline"))?;
    let MemoryOutcome {
        target_bytes,
        requested_bytes,
        reached_bytes,
        guest_total_bytes,
        reason,
    } = outcome;
    let mut reply = json!({
        "ok": outcome.is_done(), "target": target_bytes, "requested": requested_bytes, "reached": reached_bytes,
        "guest_total": guest_total_bytes, "reason": reason.as_str(),
    });
    if !outcome.is_done() {
        reply["error"] = outcome.to_string().into();
    }
    Ok(reply)
}
