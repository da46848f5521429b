//! A vCPU's thread: obeys the last command, sleeps without one, never loses a kick.
//!
//! A command is numbered. Giving one and, when the thread is in the guest, kicking it happens under one lock; the
//! thread clears an old kick under the same lock when it takes a command. So a kick is either seen by the entry into
//! the guest or belongs to a command that was taken already.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;

use super::run_page::{self, RunPage};
use super::{Buses, VcpuExitReason, VcpuListener, exit};
use crate::guest_log::GuestLog;

/// What a vCPU's thread is told to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// Be in the guest.
    Run,
    /// Be out of the guest.
    Park,
    /// End.
    Stop,
}

/// What the thread and the vCPU's owner share.
pub(super) struct Shared {
    pub(super) index: u32,
    /// Held by the thread while it is in the guest.
    pub(super) fd: Mutex<VcpuFd>,
    page: RunPage,
    control: Mutex<Control>,
    commanded: Condvar,
    pub(super) buses: Buses,
    listener: Arc<dyn VcpuListener>,
    log: GuestLog,
}

struct Control {
    command: Command,
    /// Counts the commands.
    serial: u64,
    /// The thread, while it is in the guest.
    in_guest: Option<libc::pid_t>,
    /// The error of a reset that went wrong.
    broken: Option<i32>,
}

impl Shared {
    pub(super) fn new(
        index: u32,
        fd: VcpuFd,
        buses: Buses,
        listener: Arc<dyn VcpuListener>,
    ) -> io::Result<Self> {
        let page = RunPage::map(&fd)?;
        Ok(Self {
            index,
            fd: Mutex::new(fd),
            page,
            control: Mutex::new(Control {
                command: Command::Park,
                serial: 0,
                in_guest: None,
                broken: None,
            }),
            commanded: Condvar::new(),
            buses,
            listener,
            log: GuestLog::new(format!("vcpu-{index}")),
        })
    }

    /// Gives the thread a command; the last one is for ever when it is [`Command::Stop`].
    pub(super) fn issue(&self, command: Command) {
        let mut control = self.control();
        if control.command == Command::Stop {
            return;
        }
        control.command = command;
        control.serial += 1;
        if let Some(thread) = control.in_guest {
            self.page.set_immediate_exit(true);
            run_page::kick(thread);
        }
        drop(control);
        self.commanded.notify_one();
    }

    /// Remembers the error of a reset, or that there was none.
    pub(super) fn set_broken(&self, errno: Option<i32>) {
        self.control().broken = errno;
    }

    /// What the thread is doing, in a word.
    pub(super) fn inspect(&self) -> &'static str {
        let control = self.control();
        match (control.command, control.in_guest) {
            (Command::Stop, _) => "stopped",
            (_, Some(_)) => "running",
            (_, None) => "waiting",
        }
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps until there is a command after number `obeyed`, and takes it.
    fn take_command(&self, obeyed: &mut u64) -> (Command, Option<i32>) {
        let mut control = self.control();
        while control.serial == *obeyed {
            control = self
                .commanded
                .wait(control)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *obeyed = control.serial;
        if control.command == Command::Run {
            self.page.set_immediate_exit(false);
            control.in_guest = Some(run_page::thread_id());
        }
        (control.command, control.broken)
    }

    fn has_command_after(&self, obeyed: u64) -> bool {
        self.control().serial != obeyed
    }

    /// Is in the guest until there is a command after number `obeyed`, or the vCPU cannot go on.
    fn run_guest(&self, obeyed: u64) -> Option<VcpuExitReason> {
        let mut fd = self.fd.lock().unwrap_or_else(PoisonError::into_inner);
        let reason = loop {
            let reason = match fd.run() {
                Ok(exit) => exit::handle(exit, &self.buses, &self.page, &self.log),
                Err(error) => match error.errno() {
                    // KVM finishes a pending access before it looks for a kick, so the registers are consistent now.
                    libc::EINTR if self.has_command_after(obeyed) => break None,
                    // Another signal, or a start-up interrupt for a vCPU that waited for it (KVM API 5, EAGAIN).
                    libc::EINTR | libc::EAGAIN => None,
                    errno => Some(VcpuExitReason::Host { errno }),
                },
            };
            if reason.is_some() {
                break reason;
            }
        };
        drop(fd);
        self.control().in_guest = None;
        reason
    }
}

/// Starts the thread of a vCPU.
pub(super) fn spawn(shared: Arc<Shared>) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(format!("vcpu-{}", shared.index))
        .spawn(move || obey(&shared))
}

fn obey(shared: &Shared) {
    run_page::accept_kicks();
    shared.listener.started(shared.index);
    let mut obeyed = 0;
    loop {
        let reason = match shared.take_command(&mut obeyed) {
            (Command::Stop, _) => return,
            (Command::Park, _) => {
                shared.listener.parked(shared.index);
                continue;
            }
            (Command::Run, Some(errno)) => {
                shared.control().in_guest = None;
                Some(VcpuExitReason::Host { errno })
            }
            (Command::Run, None) => {
                // Devices call the embedder's code here. A thread that a panic ends would leave its VM waiting for a
                // park; nothing of the vCPU is looked at again before a reset.
                catch_unwind(AssertUnwindSafe(|| shared.run_guest(obeyed))).unwrap_or_else(|_| {
                    shared.control().in_guest = None;
                    Some(VcpuExitReason::Panicked)
                })
            }
        };
        if let Some(reason) = reason {
            shared.listener.exited(shared.index, reason);
        }
    }
}
