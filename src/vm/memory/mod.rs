//! A VM's memory at run time, as its user asks for it and sees it.
//!
//! A target is checked at once, against everything that is known up front: the limits of the VM, its version, the
//! host. Whatever the guest has to do is an operation, whose outcome tells how far it came and why no further.
//!
//! | file | |
//! |---|---|
//! | `plan` | pure: what a target means, when it is reached, why it was not |
//! | `way` | pure: what of the way there is worth an event |
//! | `machine` | what is needed of the machine under it |
//! | `../ops/memory.rs` | the operation |

pub mod machine;
pub(super) mod plan;
pub(super) mod way;

use std::fmt;
use std::time::Duration;

use crate::config::{ByteSize, NeedsVersion};
use crate::memory::host::HostMemoryError;
use crate::vm::error::RequestError;
use crate::vm::operation::{Ended, Operation};
use crate::vm::{Vm, ops};

/// A VM's memory, read at one moment; all in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryStatus {
    /// What the guest boots with.
    pub startup_bytes: u64,
    /// What it can be given.
    pub maximum_bytes: u64,
    /// What was asked for last.
    pub requested_bytes: u64,
    /// What the guest has been given: start-up size and plugged blocks, less what its balloon holds. 0 without a guest.
    pub assigned_bytes: u64,
    /// What the guest calls its total, as it told last; asking for the status asks it to tell again. A guest says less
    /// than it was given: its kernel keeps a part for itself. `None` before it has told.
    pub guest_total_bytes: Option<u64>,
    /// What the guest's memory costs the host.
    pub resident_bytes: u64,
    /// Whether what was asked for last is safe in the VM's directory, if it has one. If it is not, the next resize stores
    /// it again.
    pub stored: bool,
}

/// How [`Vm::resize_memory`] goes about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResizeOptions {
    /// How long the guest has. 60 s unless something else is said.
    pub within: Duration,
    /// What becomes of a request that the guest did not fulfil by then.
    pub at_deadline: AtDeadline,
}

/// What becomes of the rest of a request at its deadline. What was reached is kept in any case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AtDeadline {
    /// Nothing more is asked of the guest: what the outcome tells stays true. A guest that has not even what the VM had
    /// before, because it boots, is still asked for that.
    #[default]
    Withdraw,
    /// The guest is still asked, and may come closer later; an event tells when it is there.
    Keep,
}

impl Default for ResizeOptions {
    fn default() -> Self {
        Self {
            within: Duration::from_secs(60),
            at_deadline: AtDeadline::default(),
        }
    }
}

/// How a resize ended; all in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryOutcome {
    /// The target as the caller gave it.
    pub target_bytes: u64,
    /// What the guest was asked for: the target, rounded down to what can be given.
    pub requested_bytes: u64,
    /// What the guest had in the end; 0 without a guest.
    pub reached_bytes: u64,
    /// What the guest then called its total, if it has told.
    pub guest_total_bytes: Option<u64>,
    /// Why it ended.
    pub reason: MemoryReason,
}

/// Why a resize ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryReason {
    /// What was requested has been reached.
    Complete,
    /// The VM is off, and this is what its next guest will be asked for. Whether the host has it is known then.
    Stored,
    /// The VM is off, and its directory did not take what it was asked for; it is the VM's setting for as long as the VM
    /// is open. An event has the reason.
    NotStored,
    /// The guest has the drivers, and had stopped moving long before the deadline: it does not give or take more. Also
    /// when a driver broke the rules and its device needs a reset, of which an event tells.
    GuestRefused,
    /// The guest would take more, and the host has no place for it: huge pages, memslots or mappings are used up.
    Host,
    /// The guest has no driver for what was to be done.
    DriverAbsent,
    /// The guest was still moving at the deadline, or stood still with its VM. Of a VM that is off: its directory had not
    /// taken its setting yet, and may still.
    Deadline,
    /// Another target took its place.
    Withdrawn,
    /// The guest was switched off on the way.
    GuestEnded,
}

impl MemoryReason {
    /// The reason in lower case with dashes.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Stored => "stored",
            Self::NotStored => "not-stored",
            Self::GuestRefused => "guest-refused",
            Self::Host => "host",
            Self::DriverAbsent => "driver-absent",
            Self::Deadline => "deadline",
            Self::Withdrawn => "withdrawn",
            Self::GuestEnded => "guest-ended",
        }
    }
}

impl Ended for MemoryOutcome {
    fn is_done(&self) -> bool {
        matches!(self.reason, MemoryReason::Complete | MemoryReason::Stored)
    }
}

impl fmt::Display for MemoryOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            target_bytes: _,
            requested_bytes,
            reached_bytes,
            guest_total_bytes: _,
            reason,
        } = *self;
        let (reached, requested) = (ByteSize(reached_bytes), ByteSize(requested_bytes));
        if reason == MemoryReason::Stored {
            return write!(f, "{}: {requested} for the next start", reason.as_str());
        }
        write!(f, "{}: {reached} of {requested} reached", reason.as_str())
    }
}

/// Why a target was refused. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// The VM's state does not allow it.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The guest cannot be left with so little.
    #[error("target {target} is below the floor {floor}")]
    BelowFloor {
        /// What was asked for.
        target: ByteSize,
        /// The least that is possible.
        floor: ByteSize,
    },
    /// The VM may not have so much.
    #[error("target {target} exceeds maximum {maximum}")]
    AboveMaximum {
        /// What was asked for.
        target: ByteSize,
        /// The most that is possible.
        maximum: ByteSize,
    },
    /// The VM's version cannot do it.
    #[error(transparent)]
    NeedsVersion(#[from] NeedsVersion),
    /// The host does not have so much left, and over-commit was not asked for.
    #[error("target {target} cannot be promised")]
    Host {
        /// What was asked for.
        target: ByteSize,
        /// What is there.
        #[source]
        source: HostMemoryError,
    },
}

impl ResizeError {
    /// The reason in lower case with dashes, in the words of [`MemoryReason::as_str`].
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Request(_) => "state",
            Self::BelowFloor { .. } => "floor",
            Self::AboveMaximum { .. } => "maximum",
            Self::NeedsVersion(_) => "version",
            Self::Host { .. } => "host",
        }
    }
}

impl Vm {
    /// Gives the guest `target_bytes` of memory, more or less than it has. Allowed in Off, where it sets what the guest
    /// starts with, and in Running, Pausing, Paused and Resuming; it goes on while the VM is paused, resumed or reset.
    ///
    /// The target is rounded down to 2 MiB above the start-up size and to 4 KiB below it. It is a setting of the VM: a
    /// guest that is reset or started again is given it once its drivers are there. A new target takes the place of a
    /// pending one, whose operation ends as [`MemoryReason::Withdrawn`]; the same target again joins the pending
    /// operation, which ends at the later of both deadlines. Every call reaches the guest's drivers, so that one which
    /// could not obey tries again.
    ///
    /// # Errors
    /// [`ResizeError`], with the numbers, for everything that is known to be impossible.
    pub fn resize_memory(
        &self,
        target_bytes: u64,
        options: ResizeOptions,
    ) -> Result<Operation<MemoryOutcome>, ResizeError> {
        self.act(move |supervisor| ops::memory::resize(supervisor, target_bytes, options))?
    }

    /// What memory the VM has, by every measure there is.
    ///
    /// # Errors
    /// [`RequestError::Gone`].
    pub fn memory(&self) -> Result<MemoryStatus, RequestError> {
        self.ask(ops::memory::status)
    }
}

#[cfg(test)]
mod tests;
