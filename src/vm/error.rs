//! Why a request is refused and why an operation fails.

use crate::config::{ConfigError, StateDirError};
use crate::ids::NicName;
use crate::state::State;
use crate::vm::operation::OperationKind;
use crate::vm::platform::BuildError;

/// Why a request was refused. Nothing has been begun.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The state does not allow it.
    #[error("cannot {request}: the vm is {state}")]
    State { request: OperationKind, state: State },
    /// Another operation is in flight.
    #[error("cannot {request}: {in_flight} is in flight and the vm is {state}")]
    Busy {
        request: OperationKind,
        in_flight: OperationKind,
        state: State,
    },
    /// There is no answer: a device, or the embedder's code behind it, panicked while it was asked, and its guest ends.
    #[error("the vm could not answer: a device of it panicked")]
    Gone,
}

/// Why a request about a network card was refused. Nothing has been begun.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NicRequestError {
    /// The VM does not take the request now.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The VM has no such card, or cannot have it.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The card is being added.
    #[error("network card {name} is still being added")]
    BeingAdded { name: NicName },
    /// The card is being removed. Only force may follow, and only once.
    #[error("network card {name} is being removed")]
    BeingRemoved { name: NicName },
}

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum OperationError {
    /// The machine could not be built.
    #[error("the vm could not be started")]
    Build(#[source] BuildError),
    /// The machine could not be reset; the VM was switched off.
    #[error("the vm could not be reset and was switched off")]
    Reset(#[source] BuildError),
    /// Something did not come to a stand in time: the guest goes on as if nothing had been asked.
    #[error("{missing} after {within_seconds} s, the guest goes on")]
    NotStanding { missing: String, within_seconds: u64 },
    /// The host refused a thread.
    #[error("the host refused a thread for {what}")]
    Thread {
        what: OperationKind,
        #[source]
        source: std::io::Error,
    },
    /// The changed configuration could not be stored; the change was undone.
    #[error("the change could not be stored and was undone")]
    NotStored(#[source] StateDirError),
}
