//! The supervisor's mailbox: everything that can interrupt the supervisor, in one file.
//!
//! Handles send requests and queries; vCPUs, units and workers report what happened. Reports carry the generation of
//! the machine they come from, so that a late word from a machine that is gone is told from one of the present machine.
//! Sending never blocks, and a report to a supervisor that is gone is dropped.
//!
//! What the guest can say as often as it likes does not go into the mailbox itself but into a bounded list beside it,
//! of which one report tells: a guest with many vCPUs is faster than the one supervisor.

use std::collections::VecDeque;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use crate::event::EndCause;
use crate::event_loop::LoopListener;
use crate::ids::{Bdf, UnitName};
use crate::machine::vcpu::{VcpuExitReason, VcpuListener};
use crate::unit::{PowerListener, PowerRequest, UnitListener};
use crate::vm::error::RequestError;
use crate::vm::operation::{Operation, OperationKind};
use crate::vm::platform::{BuildError, Machine};
use crate::vm::shared::Shared;
use crate::vm::supervisor::Supervisor;
use crate::vm::thread_role::ThreadRole;

/// What arrives in the mailbox.
pub(super) enum Message {
    /// A handle asks for an operation.
    Request {
        request: Request,
        reply: Sender<Result<Operation, RequestError>>,
    },
    /// A handle asks a question; the closure sends the answer itself.
    Query(Box<dyn FnOnce(&Supervisor) + Send>),
    /// Something to do on the supervisor's thread: a request with a typed answer, or what follows a work that is done.
    Act(Box<dyn FnOnce(&mut Supervisor) + Send>),
    /// The machine of `generation` reports.
    Report { generation: u64, report: Report },
    /// The last handle is gone.
    HandlesGone,
}

/// An operation that a handle asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub kind: OperationKind,
    /// How long the guest has, for operations that need it.
    pub within: Option<Duration>,
}

/// What a machine, or the worker that builds it, reports.
pub(super) enum Report {
    Built(Result<Arc<dyn Machine>, BuildError>),
    VcpuParked {
        vcpu: u32,
    },
    /// The guest cannot go on.
    Ended {
        cause: EndCause,
    },
    /// Of the halt with this number.
    UnitsQuiet {
        halt: u64,
    },
    ResetDone(Result<(), BuildError>),
    TornDown,
    /// The guest said something; it is in the [`Notices`].
    Noticed,
}

/// What the guest says, as often as it likes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Notice {
    Power(PowerRequest),
    DriverReady {
        unit: UnitName,
        ready: bool,
    },
    NeedsReset {
        unit: UnitName,
        reason: String,
    },
    /// What the guest has of its memory changed, or it told of it; the machine tells what.
    Memory,
    /// The host, which had refused more memory, may have it now.
    HostMemory,
    /// The guest let go of the device at `bdf`, asked or not.
    Ejected {
        bdf: Bdf,
        asked: bool,
    },
}

impl Notice {
    /// Whether `other` says everything that needs to be known of this, having come later.
    fn is_outdated_by(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Power(request), Self::Power(other)) => request == other,
            (Self::DriverReady { unit, .. }, Self::DriverReady { unit: other, .. })
            | (Self::NeedsReset { unit, .. }, Self::NeedsReset { unit: other, .. }) => unit == other,
            (Self::Memory, Self::Memory) | (Self::HostMemory, Self::HostMemory) => true,
            (Self::Ejected { bdf, .. }, Self::Ejected { bdf: other, .. }) => bdf == other,
            (
                Self::Power(_)
                | Self::Memory
                | Self::HostMemory
                | Self::DriverReady { .. }
                | Self::NeedsReset { .. }
                | Self::Ejected { .. },
                _,
            ) => false,
        }
    }
}

/// How many notices wait before a later one takes the place of an earlier one of the same kind and unit.
pub(super) const NOTICES_MAX: usize = 256;

/// Notices that wait for the supervisor, oldest first: at most [`NOTICES_MAX`] and, beyond that, one of each kind and
/// unit.
#[derive(Default)]
pub(super) struct Notices {
    waiting: Mutex<VecDeque<Notice>>,
}

impl Notices {
    /// Adds `notice` and, if it is the first that waits, calls `tell` before another can be added: whoever adds one
    /// may rely on its being told of before anything that it sends afterwards.
    fn add(&self, notice: Notice, tell: impl FnOnce()) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= NOTICES_MAX
            && let Some(outdated) = waiting.iter().position(|earlier| earlier.is_outdated_by(&notice))
        {
            waiting.remove(outdated);
        }
        waiting.push_back(notice);
        if waiting.len() == 1 {
            tell();
        }
    }

    /// Takes all that wait now.
    pub(super) fn take(&self) -> VecDeque<Notice> {
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The way from one generation of a VM's machine to its supervisor; cheap to clone.
#[derive(Clone)]
pub struct Mailbox {
    sender: Sender<Message>,
    generation: u64,
    notices: Arc<Notices>,
    /// Not kept alive: events end with the VM's handles and its supervisor.
    shared: Weak<Shared>,
}

impl Mailbox {
    pub(super) fn new(
        sender: Sender<Message>,
        generation: u64,
        notices: Arc<Notices>,
        shared: Weak<Shared>,
    ) -> Self {
        Self {
            sender,
            generation,
            notices,
            shared,
        }
    }

    /// Makes the calling thread, which begins, one of the VM's own.
    pub(super) fn own_thread(&self, role: ThreadRole) {
        if let Some(shared) = self.shared.upgrade() {
            shared.own_thread(role);
        }
    }

    fn notice(&self, notice: Notice) {
        self.notices.add(notice, || self.report(Report::Noticed));
    }

    pub(super) fn report(&self, report: Report) {
        // The supervisor outlives its machines; when it is gone nobody needs the report.
        let _ = self.sender.send(Message::Report {
            generation: self.generation,
            report,
        });
    }

    /// What the guest has of its memory changed, or it told of it.
    pub fn memory_changed(&self) {
        self.notice(Notice::Memory);
    }

    /// The host had refused more memory, and may have it now.
    pub fn host_memory_freed(&self) {
        self.notice(Notice::HostMemory);
    }

    /// A vCPU that was told to park stands still now.
    pub fn vcpu_parked(&self, vcpu: u32) {
        self.report(Report::VcpuParked { vcpu });
    }

    /// A vCPU ended by itself and will not run again.
    pub fn vcpu_ended(&self, cause: EndCause) {
        self.report(Report::Ended { cause });
    }

    /// The guest let go of the device at `bdf`; `asked` tells whether it was asked to.
    pub fn ejected(&self, bdf: Bdf, asked: bool) {
        self.notice(Notice::Ejected { bdf, asked });
    }
}

impl PowerListener for Mailbox {
    fn power_request(&self, request: PowerRequest) {
        self.notice(Notice::Power(request));
    }
}

impl VcpuListener for Mailbox {
    fn started(&self, _vcpu: u32) {
        self.own_thread(ThreadRole::Vcpu);
    }

    fn parked(&self, vcpu: u32) {
        self.vcpu_parked(vcpu);
    }

    fn exited(&self, vcpu: u32, reason: VcpuExitReason) {
        self.vcpu_ended(match reason {
            VcpuExitReason::Shutdown => EndCause::TripleFault,
            reason => EndCause::VcpuError {
                vcpu,
                reason: reason.to_string(),
            },
        });
    }
}

impl LoopListener for Mailbox {
    fn loop_started(&self) {
        self.own_thread(ThreadRole::DeviceLoop);
    }

    fn loop_failed(&self, words: &str) {
        let reason = words.to_owned();
        let cause = EndCause::DeviceError { reason };
        self.report(Report::Ended { cause });
    }
}

impl UnitListener for Mailbox {
    fn driver_ready(&self, unit: &UnitName, ready: bool) {
        self.notice(Notice::DriverReady {
            unit: unit.clone(),
            ready,
        });
    }

    fn needs_reset(&self, unit: &UnitName, reason: &str) {
        // The reason may quote the guest: bounded here, once for all devices.
        let reason = reason.chars().take(200).collect();
        self.notice(Notice::NeedsReset {
            unit: unit.clone(),
            reason,
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    fn unit(name: &str) -> UnitName {
        UnitName::new(name).expect("a short name")
    }

    #[test]
    fn a_flood_is_bounded_and_its_last_word_is_heard_behind_what_others_said() {
        let (sender, receiver) = channel();
        let notices = Arc::new(Notices::default());
        let mailbox = Mailbox::new(sender, 1, notices.clone(), Weak::new());
        mailbox.needs_reset(&unit("disk"), "first");
        for round in 0..100_000 {
            mailbox.driver_ready(&unit("net"), round % 2 == 0);
        }
        mailbox.power_request(PowerRequest::PowerOff);
        assert_eq!(receiver.try_iter().count(), 1, "one report tells of all notices");
        let taken = notices.take();
        assert!(taken.len() <= NOTICES_MAX + 3, "{} notices", taken.len());
        let first = Notice::NeedsReset {
            unit: unit("disk"),
            reason: "first".to_owned(),
        };
        assert_eq!(taken.front(), Some(&first));
        let ends = [
            Notice::DriverReady {
                unit: unit("net"),
                ready: false,
            },
            Notice::Power(PowerRequest::PowerOff),
        ];
        assert!(taken.iter().rev().take(2).eq(ends.iter().rev()), "{taken:?}");
        mailbox.driver_ready(&unit("net"), true);
        assert_eq!(receiver.try_iter().count(), 1, "the next notice is told of again");
    }
}
