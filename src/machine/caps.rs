//! What this library needs of the host's KVM, as a table: a host that lacks one of these is refused by its name.
//!
//! The names are those of the KVM API documentation, §8 and the "Capability" line of each call.

use kvm_ioctls::Cap;

/// A capability of KVM without which no VM can be made.
#[derive(Debug, Clone, Copy)]
pub struct Requirement {
    pub(super) cap: Cap,
    /// The capability's name in the KVM API.
    pub name: &'static str,
    /// What cannot be done without it.
    pub needed_for: &'static str,
}

const fn need(cap: Cap, name: &'static str, needed_for: &'static str) -> Requirement {
    Requirement {
        cap,
        name,
        needed_for,
    }
}

/// Every capability that is needed, in the order in which they are checked.
pub const REQUIREMENTS: [Requirement; 22] = [
    need(Cap::UserMemory, "KVM_CAP_USER_MEMORY", "guest memory"),
    need(Cap::Irqchip, "KVM_CAP_IRQCHIP", "the interrupt controllers"),
    need(Cap::Pit2, "KVM_CAP_PIT2", "the interval timer"),
    need(Cap::PitState2, "KVM_CAP_PIT_STATE2", "saving the interval timer"),
    need(
        Cap::SetTssAddr,
        "KVM_CAP_SET_TSS_ADDR",
        "real mode on Intel hosts",
    ),
    need(
        Cap::SetIdentityMapAddr,
        "KVM_CAP_SET_IDENTITY_MAP_ADDR",
        "real mode on Intel hosts",
    ),
    need(Cap::ExtCpuid, "KVM_CAP_EXT_CPUID", "the vCPUs' features"),
    need(Cap::Irqfd, "KVM_CAP_IRQFD", "the devices' interrupts"),
    need(Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING", "the devices' interrupts"),
    need(
        Cap::SignalMsi,
        "KVM_CAP_SIGNAL_MSI",
        "message-signalled interrupts",
    ),
    need(Cap::Ioeventfd, "KVM_CAP_IOEVENTFD", "queue kicks"),
    need(
        Cap::IoeventfdNoLength,
        "KVM_CAP_IOEVENTFD_NO_LENGTH",
        "queue kicks",
    ),
    need(Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "parking a vCPU"),
    need(Cap::MpState, "KVM_CAP_MP_STATE", "saving a vCPU"),
    need(Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS", "saving a vCPU"),
    need(Cap::Debugregs, "KVM_CAP_DEBUGREGS", "saving a vCPU"),
    need(Cap::Xcrs, "KVM_CAP_XCRS", "saving a vCPU"),
    need(
        Cap::Xsave2,
        "KVM_CAP_XSAVE2 (Linux 5.17)",
        "saving a vCPU's vector registers",
    ),
    need(
        Cap::AdjustClock,
        "KVM_CAP_ADJUST_CLOCK",
        "stopping the guest's clock",
    ),
    need(
        Cap::KvmclockCtrl,
        "KVM_CAP_KVMCLOCK_CTRL",
        "telling the guest that it was paused",
    ),
    need(Cap::MaxVcpus, "KVM_CAP_MAX_VCPUS", "the number of vCPUs"),
    need(Cap::NrMemslots, "KVM_CAP_NR_MEMSLOTS", "guest memory"),
];
