//! vCPUs: a thread each that is in the guest while it may, and a state that can be saved, restored and reset.
//!
//! ```text
//!            run                  park
//!   waiting ────► in the guest ─────────► waiting, `parked` is told
//!                      │ triple fault, error
//!                      └────────────────► waiting, `exited` is told
//! ```
//!
//! Commands return at once; what came of them is told to a [`VcpuListener`] on the vCPU's thread. The state belongs
//! to whoever holds the descriptor's lock, which is the thread while it is in the guest and the caller of the
//! [`Unit`] verbs while it waits. Lock order: the descriptor's, then the command's; no listener is called with either.

pub mod boot_regs;
pub mod cpuid;
mod exit;
mod run_page;
mod saved;
mod state;
mod thread;

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::VcpuFd;
use serde_json::{Value, json};

use self::boot_regs::BootEntry;
use self::cpuid::CpuFacts;
use self::saved::{SCHEMA, VcpuV1};
use self::state::{Refused, VcpuState};
use self::thread::{Command, Shared};
use super::kvm::KvmVm;
use crate::bus::Bus;
use crate::ids::UnitName;
use crate::unit::{PauseTicket, RestoreError, SaveError, Section, Unit};

/// Memory type range registers: enabled, everything else is write-back (Intel SDM 3A §12.11.2.1). Firmware sets it.
const MSR_MTRR_DEF_TYPE: (u32, u64) = (0x2FF, 0x806);
/// Fast string operations on (Intel SDM 4, IA32_MISC_ENABLE). Firmware sets it.
const MSR_MISC_ENABLE: u32 = 0x1A0;
const MISC_ENABLE_FAST_STRING: u64 = 1;

/// Receives what a vCPU did. Called on the vCPU's thread, without locks; never blocks.
pub trait VcpuListener: Send + Sync {
    /// The vCPU's thread begins.
    fn started(&self, vcpu: u32);

    /// The vCPU obeyed [`Vcpu::park`]: it is out of the guest and its registers are consistent.
    fn parked(&self, vcpu: u32);

    /// The vCPU cannot go on; it is out of the guest until it is reset and told to run again.
    fn exited(&self, vcpu: u32, reason: VcpuExitReason);
}

/// Why a vCPU cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuExitReason {
    /// The guest's triple fault.
    Shutdown,
    /// The host's kernel reports a system event (KVM API 5, KVM_EXIT_SYSTEM_EVENT).
    SystemEvent { kind: u32 },
    /// The vCPU halted, which an in-kernel APIC does not report.
    Halted,
    /// KVM could not emulate what the guest did (KVM API 5, KVM_EXIT_INTERNAL_ERROR).
    InternalError { suberror: u32 },
    /// The processor refused to enter the guest.
    FailEntry { reason: u64 },
    /// The memory behind a guest-physical address cannot be had.
    MemoryFault { address: u64 },
    /// An exit for which there is no use here.
    Unsupported { exit: String },
    /// A device that the vCPU called, or the embedder's code behind it, panicked.
    Panicked,
    /// `KVM_RUN`, or the reset before it, failed.
    Host { errno: i32 },
}

impl fmt::Display for VcpuExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shutdown => f.write_str("triple fault"),
            Self::SystemEvent { kind } => write!(f, "kvm reports system event {kind}"),
            Self::Halted => f.write_str("it halted outside the in-kernel apic"),
            Self::InternalError { suberror } => write!(f, "kvm internal error, suberror {suberror}"),
            Self::FailEntry { reason } => write!(f, "the processor refused the entry, reason {reason:#x}"),
            Self::MemoryFault { address } => write!(f, "the memory at {address:#x} cannot be had"),
            Self::Unsupported { exit } => write!(f, "unsupported exit {exit}"),
            Self::Panicked => f.write_str("a device that it called panicked"),
            Self::Host { errno } => write!(f, "{}", io::Error::from_raw_os_error(*errno)),
        }
    }
}

/// Where a vCPU's accesses go.
#[derive(Debug, Clone)]
pub struct Buses {
    /// Ports.
    pub pio: Bus,
    /// Memory-mapped registers.
    pub mmio: Bus,
}

/// The host refused something of a vCPU.
#[derive(Debug, thiserror::Error)]
#[error("the host refused {what} of vcpu {index}")]
pub struct VcpuError {
    /// The vCPU.
    pub index: u32,
    /// What was refused, such as `regs`.
    pub what: String,
    /// The host's error; `EBUSY` when the vCPU is running.
    #[source]
    pub source: io::Error,
}

/// One vCPU with its thread; unit `vcpu-N`. Dropping it stops the thread and waits for its end.
pub struct Vcpu {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    vm: Arc<KvmVm>,
    cpuid: Mutex<Vec<kvm_cpuid_entry2>>,
    pristine: VcpuState,
}

impl Vcpu {
    /// Makes vCPU `index` of `count` (0-based) and its thread, which waits for a command. vCPUs are made in order.
    ///
    /// # Errors
    /// [`VcpuError`] with the step that the host refused.
    pub fn new(
        vm: &Arc<KvmVm>,
        index: u32,
        count: u32,
        buses: Buses,
        listener: Arc<dyn VcpuListener>,
    ) -> Result<Self, VcpuError> {
        let error = |what: &str| {
            let what = what.to_owned();
            move |source: io::Error| VcpuError { index, what, source }
        };
        run_page::kick_signal().map_err(error("a signal for the kicks"))?;
        let fd = vm.create_vcpu(index).map_err(error("the creation"))?;
        let facts = CpuFacts {
            index,
            count,
            tsc_khz: fd.get_tsc_khz().ok().filter(|khz| *khz > 0),
            tsc_deadline_timer: vm.host.tsc_deadline_timer,
        };
        let cpuid = cpuid::patch(&vm.host.supported_cpuid, &facts);
        state::write_cpuid(&fd, &cpuid).map_err(error("cpuid"))?;
        let pristine = VcpuState::read(&fd, &cpuid, &vm.host.msr_indices, vm.xsave_size_bytes())
            .map_err(|Refused { what, source }| error(&what)(source))?;
        let pristine = as_firmware_leaves_it(pristine);
        pristine
            .write(&fd)
            .map_err(|Refused { what, source }| error(&what)(source))?;
        let shared = Shared::new(index, fd, buses, listener).map_err(error("the run page"))?;
        let shared = Arc::new(shared);
        let thread = thread::spawn(shared.clone()).map_err(error("the thread"))?;
        Ok(Self {
            shared,
            thread: Some(thread),
            vm: vm.clone(),
            cpuid: Mutex::new(cpuid),
            pristine: pristine.without_tsc(),
        })
    }

    /// The number of the vCPU in its VM.
    pub fn index(&self) -> u32 {
        self.shared.index
    }

    /// Lets the vCPU into the guest. Returns at once. A command replaces one that was not obeyed yet.
    pub fn run(&self) {
        self.shared.issue(Command::Run);
    }

    /// Gets the vCPU out of the guest, with the instruction finished that it was in. Returns at once;
    /// [`VcpuListener::parked`] is told, also when the vCPU was out already.
    pub fn park(&self) {
        self.shared.issue(Command::Park);
    }

    /// Ends the thread; commands have no effect any more and nobody is told. Returns at once.
    pub fn stop(&self) {
        self.shared.issue(Command::Stop);
    }

    /// Sets the registers with which the kernel is entered. Called on vCPU 0, freshly reset, while it waits.
    ///
    /// # Errors
    /// [`VcpuError`] when the host refuses or the vCPU is running.
    pub fn enter_at(&self, entry: BootEntry) -> Result<(), VcpuError> {
        let error = |what: &str, source| VcpuError {
            index: self.index(),
            what: what.to_owned(),
            source,
        };
        let fd = self.waiting_fd().map_err(|source| error("regs", source))?;
        let mut sregs = fd.get_sregs().map_err(|e| error("sregs", e.into()))?;
        boot_regs::system(&mut sregs, entry.protocol);
        fd.set_sregs(&sregs).map_err(|e| error("sregs", e.into()))?;
        let regs = boot_regs::general(entry);
        fd.set_regs(&regs).map_err(|e| error("regs", e.into()))
    }

    /// The descriptor, unless the thread is in the guest with it.
    fn waiting_fd(&self) -> io::Result<MutexGuard<'_, VcpuFd>> {
        match self.shared.fd.try_lock() {
            Ok(fd) => Ok(fd),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(io::Error::from_raw_os_error(libc::EBUSY)),
        }
    }
}

impl Unit for Vcpu {
    fn name(&self) -> UnitName {
        UnitName::new(format!("vcpu-{}", self.index())).expect("a short name of letters and digits")
    }

    /// vCPU 0 is then at the processor's reset vector and needs [`Vcpu::enter_at`]; the others wait for a start-up
    /// interrupt. A refused reset is reported by [`VcpuListener::exited`] at the next [`Vcpu::run`].
    fn reset(&self) {
        let result = self.waiting_fd().and_then(|fd| {
            let written = self.pristine.write(&fd);
            written.map_err(|Refused { what, source }| {
                log::error!(
                    "vcpu-{}: the host refused the reset of {what}: {source}",
                    self.index()
                );
                source
            })
        });
        let errno = result
            .err()
            .map(|error| error.raw_os_error().unwrap_or(libc::EIO));
        self.shared.set_broken(errno);
    }

    /// The vCPU is parked already; there is nothing in flight.
    fn pause(&self, _ticket: PauseTicket) {}

    fn resume(&self) {
        // Tells the guest that it was stopped, so that its watchdogs do not count the time (KVM API 4.70). EINVAL
        // means that it has no kvmclock to be told through.
        let result = self.waiting_fd().and_then(|fd| Ok(fd.kvmclock_ctrl()?));
        if let Err(error) = result
            && error.raw_os_error() != Some(libc::EINVAL)
        {
            log::warn!(
                "vcpu-{}: cannot tell the guest of the pause: {error}",
                self.index()
            );
        }
    }

    fn save(&self) -> Result<Section, SaveError> {
        let index = self.index();
        let error = |what: &str, source| SaveError::Host {
            what: format!("{what} of vcpu {index}"),
            source,
        };
        let fd = self.waiting_fd().map_err(|source| error("the state", source))?;
        let host = &self.vm.host;
        let cpuid = self.cpuid();
        let state = VcpuState::read(&fd, &cpuid, &host.msr_indices, self.vm.xsave_size_bytes())
            .map_err(|Refused { what, source }| error(&what, source))?;
        Section::encode(SCHEMA, &VcpuV1::from(&state))
    }

    fn restore(&self, section: &Section) -> Result<(), RestoreError> {
        let index = self.index();
        let error = |what: &str, source| RestoreError::Host {
            what: format!("{what} of vcpu {index}"),
            source,
        };
        let saved: VcpuV1 = section.decode(SCHEMA)?;
        let state = saved.state(self.vm.xsave_size_bytes())?;
        check_cpuid(&state.cpuid, &self.pristine.cpuid, index)?;
        let fd = self.waiting_fd().map_err(|source| error("the state", source))?;
        let mut cpuid = self.cpuid();
        if *cpuid != state.cpuid {
            state::write_cpuid(&fd, &state.cpuid).map_err(|source| error("cpuid", source))?;
            cpuid.clone_from(&state.cpuid);
        }
        state
            .write(&fd)
            .map_err(|Refused { what, source }| error(&what, source))
    }

    fn inspect(&self) -> Value {
        json!({ "index": self.index(), "state": self.shared.inspect() })
    }
}

impl Vcpu {
    fn cpuid(&self) -> MutexGuard<'_, Vec<kvm_cpuid_entry2>> {
        self.cpuid.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of vcpu {} panicked", self.index());
        }
    }
}

/// A fresh vCPU's state with what a PC's firmware sets before it starts a kernel.
fn as_firmware_leaves_it(mut state: VcpuState) -> VcpuState {
    for (index, value) in &mut state.msrs {
        if *index == MSR_MTRR_DEF_TYPE.0 {
            *value = MSR_MTRR_DEF_TYPE.1;
        } else if *index == MSR_MISC_ENABLE {
            *value |= MISC_ENABLE_FAST_STRING;
        }
    }
    state
}

/// Checks that the saved CPUID is that of vCPU `index` and that this host has its features.
fn check_cpuid(
    saved: &[kvm_cpuid_entry2],
    here: &[kvm_cpuid_entry2],
    index: u32,
) -> Result<(), RestoreError> {
    cpuid::check(saved, here).map_err(|missing| RestoreError::Value {
        field: "cpuid",
        value: missing.to_string(),
        reason: "the vcpu cannot go on here",
    })?;
    let leaf_1 = saved.iter().find(|entry| entry.function == 1);
    match leaf_1.map(|entry| entry.ebx >> 24) {
        Some(apic_id) if apic_id == index => Ok(()),
        apic_id => Err(RestoreError::Value {
            field: "cpuid",
            value: format!("apic id {apic_id:?}"),
            reason: "it is that of another vcpu",
        }),
    }
}

#[cfg(test)]
mod tests;
