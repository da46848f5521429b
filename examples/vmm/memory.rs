//! The memory of the VM: how much it is, and making it more or less.

use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vm_lifecycle::vm::Vm;
use vm_lifecycle::vm::memory::{MemoryOutcome, MemoryStatus, ResizeError, ResizeOptions};
use vm_lifecycle::vm::operation::{Ended, ErrorChain, Operation};

use crate::arguments::size;
use crate::commands::{DEFAULT_SECONDS, PATIENCE, parse_seconds};
use crate::session::Input;

/// The six numbers, in bytes, and whether the VM's directory has what is requested.
pub fn status(vm: &Vm) -> Result<Value, String> {
    let memory = vm.memory().map_err(|error| error.to_string())?;
    let MemoryStatus {
        startup_bytes,
        maximum_bytes,
        requested_bytes,
        assigned_bytes,
        guest_total_bytes,
        resident_bytes,
        stored,
    } = memory;
    Ok(json!({
        "startup": startup_bytes, "maximum": maximum_bytes, "requested": requested_bytes, "assigned": assigned_bytes,
        "guest_total": guest_total_bytes, "resident": resident_bytes, "stored": stored,
    }))
}

/// A resize that goes on.
pub struct Resize {
    operation: Operation<MemoryOutcome>,
    patience: Duration,
    /// Nobody waits longer; no time is too long.
    until: Option<Instant>,
}

/// Begins to resize to `target`.
///
/// # Errors
/// The answer, where the command is answered at once.
pub fn begin(vm: &Vm, target: &str, seconds: Option<&str>) -> Result<Resize, Result<Value, String>> {
    let target_bytes = size(target).map_err(|error| Err(format!("size {target:?}: {error}")))?;
    let within = seconds.map_or(Ok(Duration::from_secs(DEFAULT_SECONDS)), parse_seconds);
    let within = within.map_err(Err)?;
    let options = ResizeOptions {
        within,
        ..ResizeOptions::default()
    };
    let patience = within.saturating_add(PATIENCE);
    match vm.resize_memory(target_bytes, options) {
        Ok(operation) => Ok(Resize {
            operation,
            patience,
            until: Instant::now().checked_add(patience),
        }),
        Err(error) => Err(refused(vm, target_bytes, &error)),
    }
}

fn refused(vm: &Vm, target_bytes: u64, error: &ResizeError) -> Result<Value, String> {
    let reached = vm.memory().map_err(|error| error.to_string())?.assigned_bytes;
    Ok(json!({
        "ok": false, "error": ErrorChain(error).to_string(), "requested": target_bytes, "reached": reached,
        "reason": error.reason(),
    }))
}

impl Resize {
    /// Tells `sender` when there is an answer.
    pub fn watch(&self, sender: Sender<Input>) {
        let (operation, patience) = (self.operation.clone(), self.patience);
        thread::spawn(move || {
            let _outcome = operation.wait(patience);
            // A session that has ended needs no answer.
            let _ = sender.send(Input::Settled);
        });
    }

    /// The answer, if it is reached, at its deadline, or will not come.
    pub fn answer(&self) -> Option<Result<Value, String>> {
        let Some(outcome) = self.operation.outcome() else {
            let is_over = self.until.is_some_and(|until| until <= Instant::now());
            return is_over.then(|| Err(format!("{:?} goes on after its deadline", self.operation)));
        };
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
        Some(Ok(reply))
    }
}
