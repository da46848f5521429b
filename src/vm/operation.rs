//! Operations: what was asked of a VM, how it goes and how it ended.
//!
//! A request that was accepted yields an [`Operation`]. Dropping it cancels nothing. Every operation ends in exactly
//! one [`Outcome`] and one final event.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::ids::OperationId;
use crate::vm::error::OperationError;

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OperationKind {
    Start,
    Pause,
    Resume,
    Reset,
    ShutDown,
    PowerOff,
    ResizeMemory,
    AddNic,
    RemoveNic,
    ChangeNic,
}

impl OperationKind {
    /// Every kind.
    pub const ALL: [Self; 10] = [
        Self::Start,
        Self::Pause,
        Self::Resume,
        Self::Reset,
        Self::ShutDown,
        Self::PowerOff,
        Self::ResizeMemory,
        Self::AddNic,
        Self::RemoveNic,
        Self::ChangeNic,
    ];

    /// Whether operations of this kind go on beside others, whatever the state becomes meanwhile: they wait for the
    /// guest, which may take its time, and change nothing of the lifecycle.
    pub const fn is_beside(self) -> bool {
        match self {
            Self::ResizeMemory | Self::AddNic | Self::RemoveNic | Self::ChangeNic => true,
            Self::Start | Self::Pause | Self::Resume | Self::Reset | Self::ShutDown | Self::PowerOff => false,
        }
    }

    /// The kind in lower case with dashes.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Reset => "reset",
            Self::ShutDown => "shut-down",
            Self::PowerOff => "power-off",
            Self::ResizeMemory => "resize-memory",
            Self::AddNic => "add-nic",
            Self::RemoveNic => "remove-nic",
            Self::ChangeNic => "change-nic",
        }
    }
}

impl fmt::Display for OperationKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How an operation ended; its text is what the final event says.
pub trait Ended: Clone + fmt::Display {
    /// Whether what was asked for has been reached.
    fn is_done(&self) -> bool;
}

/// How an operation of the lifecycle ended.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// What was asked for has been reached.
    Done,
    /// It cannot be reached; the VM is as the error and its state say.
    Failed(Arc<OperationError>),
    /// The guest did not do its part before the deadline. Nothing is undone.
    DeadlinePassed,
    /// Another operation or the end of the guest overtook it.
    Overtaken { by: &'static str },
}

impl Outcome {
    /// Whether what was asked for has been reached.
    pub const fn is_done(&self) -> bool {
        matches!(self, Self::Done)
    }
}

impl Ended for Outcome {
    fn is_done(&self) -> bool {
        self.is_done()
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("done"),
            Self::Failed(error) => write!(f, "{}", ErrorChain(&**error)),
            Self::DeadlinePassed => f.write_str("the guest did not answer before the deadline"),
            Self::Overtaken { by } => write!(f, "overtaken by {by}"),
        }
    }
}

/// Writes an error and its sources in one line, separated by colons.
pub struct ErrorChain<'a>(pub &'a (dyn std::error::Error + 'static));

impl fmt::Display for ErrorChain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

/// An accepted request; cheap to clone. Dropping it cancels nothing.
#[derive(Clone)]
#[must_use = "wait for the operation or drop it knowingly: it goes on by itself"]
pub struct Operation<O = Outcome> {
    id: OperationId,
    kind: OperationKind,
    ending: Arc<Ending<O>>,
}

struct Ending<O> {
    outcome: Mutex<Option<O>>,
    ended: Condvar,
}

impl<O> fmt::Debug for Operation<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Operation({} {})", self.id, self.kind)
    }
}

impl<O: Ended> Operation<O> {
    pub(super) fn begin(id: OperationId, kind: OperationKind) -> Self {
        let ending = Ending {
            outcome: Mutex::new(None),
            ended: Condvar::new(),
        };
        Self {
            id,
            kind,
            ending: Arc::new(ending),
        }
    }

    /// The operation's number, as events tell it.
    pub const fn id(&self) -> OperationId {
        self.id
    }

    /// What the operation does.
    pub const fn kind(&self) -> OperationKind {
        self.kind
    }

    /// The outcome, if the operation has ended.
    pub fn outcome(&self) -> Option<O> {
        self.ending
            .outcome
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Waits at most `within` for the outcome; `None` when the operation still goes on. May be called again.
    pub fn wait(&self, within: Duration) -> Option<O> {
        let deadline = Instant::now().checked_add(within);
        let mut outcome = self.ending.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        while outcome.is_none() {
            outcome = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => return None,
                Some(left) => {
                    let waited = self.ending.ended.wait_timeout(outcome, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self
                    .ending
                    .ended
                    .wait(outcome)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
        outcome.clone()
    }

    /// Ends the operation. The first outcome stands.
    pub(super) fn end(&self, outcome: O) {
        let mut place = self.ending.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        if place.is_none() {
            *place = Some(outcome);
            self.ending.ended.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_with_the_first_outcome() {
        let operation = Operation::begin(OperationId(1), OperationKind::Pause);
        assert!(operation.wait(Duration::ZERO).is_none());
        let waiter = std::thread::spawn({
            let operation = operation.clone();
            move || operation.wait(Duration::MAX)
        });
        operation.end(Outcome::Done);
        operation.end(Outcome::DeadlinePassed);
        assert!(
            waiter
                .join()
                .expect("the waiter returns")
                .is_some_and(|outcome| outcome.is_done())
        );
    }
}
