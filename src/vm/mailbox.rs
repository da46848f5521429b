//! The supervisor's mailbox: everything that can interrupt the supervisor, in one file.
//!
//! Handles send requests and queries; vCPUs, units and workers report what happened. Reports carry the generation of
//! the machine they come from, so that a late word from a machine that is gone is told from one of the present machine.
//! Sending never blocks, and a report to a supervisor that is gone is dropped.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use crate::event::EndCause;
use crate::ids::UnitName;
use crate::unit::{PowerListener, PowerRequest, UnitListener};
use crate::vm::error::RequestError;
use crate::vm::operation::{Operation, OperationKind};
use crate::vm::platform::{BuildError, Machine};
use crate::vm::supervisor::Supervisor;

/// What arrives in the mailbox.
pub(super) enum Message {
    /// A handle asks for an operation.
    Request {
        request: Request,
        reply: Sender<Result<Operation, RequestError>>,
    },
    /// A handle asks a question; the closure sends the answer itself.
    Query(Box<dyn FnOnce(&Supervisor) + Send>),
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
    VcpuParked,
    VcpuEnded { cause: EndCause },
    UnitsQuiet,
    ResetDone(Result<(), BuildError>),
    TornDown,
    Power(PowerRequest),
    DriverReady { unit: UnitName, ready: bool },
    NeedsReset { unit: UnitName, reason: String },
}

/// The way from one generation of a VM's machine to its supervisor; cheap to clone.
#[derive(Clone)]
pub struct Mailbox {
    sender: Sender<Message>,
    generation: u64,
}

impl Mailbox {
    pub(super) fn new(sender: Sender<Message>, generation: u64) -> Self {
        Self { sender, generation }
    }

    pub(super) fn report(&self, report: Report) {
        // The supervisor outlives its machines; when it is gone nobody needs the report.
        let _ = self.sender.send(Message::Report {
            generation: self.generation,
            report,
        });
    }

    /// A vCPU that was told to park stands still now.
    pub fn vcpu_parked(&self) {
        self.report(Report::VcpuParked);
    }

    /// A vCPU ended by itself and will not run again.
    pub fn vcpu_ended(&self, cause: EndCause) {
        self.report(Report::VcpuEnded { cause });
    }
}

impl PowerListener for Mailbox {
    fn power_request(&self, request: PowerRequest) {
        self.report(Report::Power(request));
    }
}

impl UnitListener for Mailbox {
    fn driver_ready(&self, unit: &UnitName, ready: bool) {
        self.report(Report::DriverReady {
            unit: unit.clone(),
            ready,
        });
    }

    fn needs_reset(&self, unit: &UnitName, reason: &str) {
        // The reason may quote the guest: bounded here, once for all devices.
        let reason = reason.chars().take(200).collect();
        self.report(Report::NeedsReset {
            unit: unit.clone(),
            reason,
        });
    }
}
