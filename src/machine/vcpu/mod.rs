//! SKELETON: vCPUs.
pub mod boot_regs;

use std::io;
use std::sync::Arc;

use self::boot_regs::BootEntry;
use super::kvm::KvmVm;
use crate::bus::Bus;

/// Receives what a vCPU did. Called on the vCPU's thread; never blocks.
pub trait VcpuListener: Send + Sync {
    /// The vCPU obeyed [`Vcpu::park`]: it executes nothing and its registers are consistent.
    fn parked(&self, vcpu: u32);
    /// The vCPU left the guest for good (until reset); it executes nothing and needs no park.
    fn exited(&self, vcpu: u32, reason: VcpuExitReason);
}
/// Why a vCPU left the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VcpuExitReason {
    /// Triple fault.
    Shutdown,
    /// KVM_EXIT_INTERNAL_ERROR.
    InternalError { suberror: u32 },
    /// KVM_EXIT_FAIL_ENTRY.
    FailEntry { reason: u64 },
    /// HLT without in-kernel irqchip.
    Halted,
    /// Another exit.
    Unsupported { reason: u32 },
    /// KVM_RUN failed.
    Host { errno: i32 },
}
/// Where a vCPU's accesses go.
#[derive(Clone)]
pub struct Buses {
    /// Ports.
    pub pio: Bus,
    /// Memory-mapped registers.
    pub mmio: Bus,
}
/// SKELETON
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// SKELETON
    #[error("the host refused {what} of vcpu {index}")]
    Host { what: &'static str, index: u32, #[source] source: io::Error },
}
/// One vCPU with its thread; implements Unit (`vcpu-N`). Dropping it stops and joins the thread.
pub struct Vcpu;
impl Vcpu {
    /// Makes vCPU `index` of `count` and its thread, which waits.
    pub fn new(_vm: &Arc<KvmVm>, _index: u32, _count: u32, _buses: Buses, _listener: Arc<dyn VcpuListener>) -> Result<Self, VcpuError> {
        unimplemented!()
    }
    /// Lets it run. Returns at once.
    pub fn run(&self) {}
    /// Makes it leave the guest; [`VcpuListener::parked`] is called once for each call. Returns at once.
    pub fn park(&self) {}
    /// Ends its thread; no listener call follows. Returns at once; dropping joins.
    pub fn stop(&self) {}
    /// Sets the registers for the kernel's entry. Called on vCPU 0 while parked and freshly reset.
    pub fn enter_at(&self, _entry: BootEntry) -> Result<(), VcpuError> {
        unimplemented!()
    }
}
