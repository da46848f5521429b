//! The network cards of a VM as its user sees them: adding, removing and changing them, and how that ends.
//!
//! In Off these verbs change the configuration and nothing else. While there is a machine, a card is added to it and
//! removed from it by ACPI hot-plug, and the configuration follows when the card is really there or really gone.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::config::{ConfigError, NicConfig, NicSpec, StateDirError};
use crate::event::NicRemoval;
use crate::ids::NicName;
use crate::vm::Vm;
use crate::vm::error::{NicRequestError, RequestError};
use crate::vm::operation::{Ended, ErrorChain, Operation};
use crate::vm::ops::{nic, nic_add, nic_change, nic_remove};
use crate::vm::platform::BuildError;

pub use crate::vm::card::NicState;

/// What is known of one network card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicInfo {
    /// What it is, complete: nothing is left open as it may be in [`NicSpec`].
    pub config: NicConfig,
    /// Where it is in its life; `None` while there is no machine.
    pub state: Option<NicState>,
    /// Whether a driver in the guest has it.
    pub driver_ready: bool,
}

/// How adding a network card ended.
#[derive(Debug, Clone)]
pub enum AddNicOutcome {
    /// A driver in the guest has the card.
    DriverReady(NicInfo),
    /// The VM is off: the card will be there when it starts.
    Configured,
    /// The card is there and stays, but no driver in the guest took it before the deadline. `paused` tells whether
    /// the VM was not running then, so that none could.
    NoDriver { paused: bool },
    /// The card was there, but the guest ended before a driver took it. It will be there at the next start.
    GuestEnded,
    /// A request to remove the card came before a driver took it.
    Overtaken,
    /// The card is not there.
    Failed(Arc<AddNicError>),
}

/// Why a network card could not be added.
#[derive(Debug, thiserror::Error)]
pub enum AddNicError {
    /// The host refuses something that the card needs.
    #[error("the network card could not be added")]
    Machine(#[source] BuildError),
    /// Something that it needs was taken meanwhile.
    #[error("the network card could not be added")]
    Config(#[source] ConfigError),
    /// The configuration could not be stored. The card was taken away again, by force; a VM that was off, and is not
    /// any more, keeps it until it ends.
    #[error("the network card could not be kept: the configuration was not stored")]
    NotStored(#[source] StateDirError),
    /// The host refused a thread, or the embedder's code panicked in it.
    #[error("the network card could not be added: its worker did not work")]
    Worker(#[source] io::Error),
}

/// How removing a network card ended.
#[derive(Debug, Clone)]
pub enum RemoveNicOutcome {
    /// The card is gone, from the machine and the configuration.
    Removed(NicRemoval),
    /// The guest did not let go of the card before the deadline: the host has it still, and it works for as long as the
    /// guest has not begun to let go. The guest may do so at any time, also at the very moment of the deadline; an event
    /// tells when it has. [`Vm::offer_nic`] withdraws the request. `paused` tells whether the VM was not running, so that it could not.
    NotReleased { paused: bool },
    /// The card was removed by force meanwhile.
    Overtaken,
    /// Something went wrong on the host.
    Failed(Arc<RemoveNicError>),
}

/// What went wrong when a network card was removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveNicError {
    /// The card is gone, but the document on disk still holds it; the next change stores it again.
    #[error("the network card is gone, but the configuration was not stored")]
    NotStored(#[source] StateDirError),
    /// The VM is off and keeps the card, because the configuration could not be stored.
    #[error("the network card stays: the configuration was not stored")]
    Kept(#[source] StateDirError),
    /// The guest does not have the card any more, but the host did not take back what it held: the host refused a
    /// thread, or the embedder's code panicked in it. Removing it by force tries again.
    #[error("the guest let go of the network card, but its worker did not work")]
    Worker(#[source] io::Error),
}

impl Ended for AddNicOutcome {
    fn is_done(&self) -> bool {
        matches!(self, Self::DriverReady(_) | Self::Configured)
    }
}

impl fmt::Display for AddNicOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DriverReady(_) => f.write_str("driver ready"),
            Self::Configured => f.write_str("configured"),
            Self::NoDriver { paused: false } => {
                f.write_str("no driver in the guest took the network card before the deadline")
            }
            Self::NoDriver { paused: true } => {
                f.write_str("the vm did not run, so no driver took the network card before the deadline")
            }
            Self::GuestEnded => f.write_str("the guest ended before a driver took the network card"),
            Self::Overtaken => f.write_str("overtaken by a request to remove the network card"),
            Self::Failed(error) => write!(f, "{}", ErrorChain(&**error)),
        }
    }
}

impl Ended for RemoveNicOutcome {
    fn is_done(&self) -> bool {
        matches!(self, Self::Removed(_))
    }
}

impl fmt::Display for RemoveNicOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Removed(how) => write!(f, "removed: {}", how.as_str()),
            Self::NotReleased { paused: false } => {
                f.write_str("the guest did not release the network card before the deadline")
            }
            Self::NotReleased { paused: true } => f.write_str(
                "the vm did not run, so the guest did not release the network card before the deadline",
            ),
            Self::Overtaken => f.write_str("overtaken by its removal by force"),
            Self::Failed(error) => write!(f, "{}", ErrorChain(&**error)),
        }
    }
}

impl Vm {
    /// Adds a network card. Allowed in Off, Running and Paused, and beside every operation but a reset.
    ///
    /// In Off only the configuration changes. Otherwise the operation is done when a driver in the guest has the card.
    /// After `within` it ends with [`AddNicOutcome::NoDriver`] and the card stays; a driver may still take it. A paused
    /// guest sees the card when it goes on, and its time runs meanwhile.
    ///
    /// # Errors
    /// [`NicRequestError::Config`] when the VM cannot have the card, for example because it has 64 already;
    /// [`NicRequestError::BeingRemoved`] when a card of that name is still being removed; [`NicRequestError::Request`]
    /// when the state or a reset forbids it. What the host refuses is told by the outcome.
    pub fn add_nic(
        &self,
        nic: NicSpec,
        within: Duration,
    ) -> Result<(NicInfo, Operation<AddNicOutcome>), NicRequestError> {
        self.act(move |vm| nic_add::add(vm, nic, within))?
    }

    /// Asks the guest to let go of the network card called `name`. Allowed as [`Vm::add_nic`] is.
    ///
    /// In Off only the configuration changes. Otherwise the operation is done when the guest has let go of the card and
    /// nothing of it is left. After `within` it ends with [`RemoveNicOutcome::NotReleased`]: the card is still there
    /// and works, and goes when the guest lets go of it late. When the guest is reset or ends while the operation goes
    /// on, the card goes with that.
    ///
    /// # Errors
    /// [`NicRequestError::Config`] when there is no such card; [`NicRequestError::BeingAdded`] and
    /// [`NicRequestError::BeingRemoved`] when the card is not settled; [`NicRequestError::Request`] when the state or a
    /// reset forbids it.
    pub fn remove_nic(
        &self,
        name: &NicName,
        within: Duration,
    ) -> Result<Operation<RemoveNicOutcome>, NicRequestError> {
        let name = name.clone();
        self.act(move |vm| nic_remove::remove(vm, &name, within))?
    }

    /// Takes the network card called `name` from the guest without asking. What is the host's, the backend, the name and the
    /// numbers, is free at the end; the guest's driver finds a card without a link, out of its slot, until it has let go.
    /// Allowed as [`Vm::add_nic`]
    /// is, also while the guest is being asked; that operation then ends with [`RemoveNicOutcome::Overtaken`]. Of a card
    /// that the guest has let go of, the operation that goes on is returned.
    ///
    /// # Errors
    /// As [`Vm::remove_nic`].
    pub fn force_remove_nic(&self, name: &NicName) -> Result<Operation<RemoveNicOutcome>, NicRequestError> {
        let name = name.clone();
        self.act(move |vm| nic_remove::force_remove(vm, &name))?
    }

    /// Offers the guest the network card called `name` again: one that it let go of without being asked comes back, and
    /// a request to let go that had its time ([`RemoveNicOutcome::NotReleased`]) is withdrawn. A guest that has heard of
    /// the request may still let go; it gets the card back. Allowed as [`Vm::add_nic`] is; an event tells when a driver
    /// has the card.
    ///
    /// # Errors
    /// As [`Vm::remove_nic`]; [`NicRequestError::BeingRemoved`] also when the guest has just done what it was asked.
    pub fn offer_nic(&self, name: &NicName) -> Result<(), NicRequestError> {
        let name = name.clone();
        self.act(move |vm| nic_change::offer(vm, &name))?
    }

    /// Gives the network card `old` the name `new`, also while the guest runs: it sees the new label when it looks
    /// again. The card keeps its addresses. Allowed as [`Vm::add_nic`] is. The operation is done when the name is
    /// stored.
    ///
    /// # Errors
    /// As [`Vm::remove_nic`], and [`NicRequestError::Config`] when another card is called `new`.
    pub fn rename_nic(&self, old: &NicName, new: &NicName) -> Result<Operation, NicRequestError> {
        let (old, new) = (old.clone(), new.clone());
        self.act(move |vm| nic_change::rename(vm, old, new))?
    }

    /// Plugs the cable of the network card called `name` in (`up`), or pulls it out. Allowed as [`Vm::add_nic`] is. The
    /// operation is done when the setting is stored.
    ///
    /// # Errors
    /// As [`Vm::remove_nic`].
    pub fn set_nic_link(&self, name: &NicName, up: bool) -> Result<Operation, NicRequestError> {
        let name = name.clone();
        self.act(move |vm| nic_change::set_link(vm, name, up))?
    }

    /// Every network card of the VM, with those that are being added.
    ///
    /// # Errors
    /// [`RequestError::Gone`].
    pub fn nics(&self) -> Result<Vec<NicInfo>, RequestError> {
        self.ask(nic::infos)
    }
}
