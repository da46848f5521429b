//! A vCPU's state in KVM's structures: read from the host, written to the host, in the one order that works.
//!
//! Reading begins with MP_STATE, because reading it lets KVM finish what is pending for the APIC, and ends with the
//! events. Writing: CPUID, MP_STATE, REGS, SREGS, XSAVE, XCRS, DEBUGREGS, LAPIC, MSRs, EVENTS. CPUID decides which
//! MSRs exist, SREGS which mode the APIC is in, the APIC's timer mode whether the TSC deadline can be armed, and
//! writing the registers clears events. Among the MSRs the TSC comes first and its deadline last.

use std::io;

use kvm_bindings::{
    Msrs, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;

use crate::machine::kvm::cpuid_from;

/// The time stamp counter (Intel SDM 4).
const MSR_IA32_TSC: u32 = 0x10;
/// The deadline of the APIC's timer.
const MSR_IA32_TSC_DEADLINE: u32 = 0x6E0;
/// How many MSRs one call reads or writes.
const MSR_BATCH: usize = 64;

/// Everything that a vCPU holds.
#[derive(Clone)]
pub(super) struct VcpuState {
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    pub(super) mp_state: u32,
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    pub(super) debug_regs: kvm_debugregs,
    /// `kvm_xsave` with what follows it, as long as the host says.
    pub(super) xsave: Vec<u32>,
    pub(super) xcrs: kvm_xcrs,
    pub(super) lapic: kvm_lapic_state,
    /// Index and value.
    pub(super) msrs: Vec<(u32, u64)>,
    pub(super) events: kvm_vcpu_events,
}

/// A part of the state that the host did not give or take.
#[derive(Debug)]
pub(super) struct Refused {
    /// The part, such as `lapic`.
    pub(super) what: String,
    pub(super) source: io::Error,
}

fn refused(what: &'static str) -> impl FnOnce(errno::Error) -> Refused {
    move |error| Refused {
        what: what.to_owned(),
        source: error.into(),
    }
}

impl VcpuState {
    /// Reads the state of a vCPU whose CPUID is `cpuid`; `msr_indices` are tried, what the host does not tell is
    /// left out.
    pub(super) fn read(
        fd: &VcpuFd,
        cpuid: &[kvm_cpuid_entry2],
        msr_indices: &[u32],
        xsave_size_bytes: usize,
    ) -> Result<Self, Refused> {
        let mp_state = fd.get_mp_state().map_err(refused("mp_state"))?.mp_state;
        let mut msrs = read_msrs(fd, msr_indices).map_err(refused("msrs"))?;
        msrs.sort_by_key(|(index, _)| match *index {
            MSR_IA32_TSC => (0, 0),
            MSR_IA32_TSC_DEADLINE => (2, 0),
            index => (1, index),
        });
        Ok(Self {
            cpuid: cpuid.to_vec(),
            mp_state,
            regs: fd.get_regs().map_err(refused("regs"))?,
            sregs: fd.get_sregs().map_err(refused("sregs"))?,
            debug_regs: fd.get_debug_regs().map_err(refused("debug_regs"))?,
            xsave: read_xsave(fd, xsave_size_bytes).map_err(refused("xsave"))?,
            xcrs: fd.get_xcrs().map_err(refused("xcrs"))?,
            lapic: fd.get_lapic().map_err(refused("lapic"))?,
            msrs,
            events: fd.get_vcpu_events().map_err(refused("events"))?,
        })
    }

    /// Writes everything but the CPUID, which KVM takes only before the vCPU's first run.
    pub(super) fn write(&self, fd: &VcpuFd) -> Result<(), Refused> {
        let mp_state = kvm_mp_state {
            mp_state: self.mp_state,
        };
        fd.set_mp_state(mp_state).map_err(refused("mp_state"))?;
        fd.set_regs(&self.regs).map_err(refused("regs"))?;
        fd.set_sregs(&self.sregs).map_err(refused("sregs"))?;
        write_xsave(fd, &self.xsave).map_err(refused("xsave"))?;
        fd.set_xcrs(&self.xcrs).map_err(refused("xcrs"))?;
        fd.set_debug_regs(&self.debug_regs)
            .map_err(refused("debug_regs"))?;
        fd.set_lapic(&self.lapic).map_err(refused("lapic"))?;
        write_msrs(fd, &self.msrs)?;
        fd.set_vcpu_events(&self.events).map_err(refused("events"))
    }

    /// Leaves the TSC out: a reset lets it go on, as on hardware, so that the vCPUs' counters stay equal.
    pub(super) fn without_tsc(mut self) -> Self {
        self.msrs.retain(|(index, _)| *index != MSR_IA32_TSC);
        self
    }
}

/// Sets the CPUID of a vCPU.
pub(super) fn write_cpuid(fd: &VcpuFd, cpuid: &[kvm_cpuid_entry2]) -> io::Result<()> {
    Ok(fd.set_cpuid2(&cpuid_from(cpuid)?)?)
}

/// Reads those of `indices` that the host tells.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, errno::Error> {
    let mut read = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(MSR_BATCH)];
        let mut msrs = msr_batch(batch.iter().map(|index| (*index, 0)))?;
        let count = fd.get_msrs(&mut msrs)?.min(batch.len());
        read.extend(msrs.as_slice()[..count].iter().map(|msr| (msr.index, msr.data)));
        // KVM stops at the first that it refuses, which is left out.
        rest = &rest[(count + usize::from(count < batch.len()))..];
    }
    Ok(read)
}

/// Writes MSRs. One that the host refuses is fine when it has the value already, as read-only ones have.
fn write_msrs(fd: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), Refused> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(MSR_BATCH)];
        let entries = msr_batch(batch.iter().copied()).map_err(refused("msrs"))?;
        let count = fd.set_msrs(&entries).map_err(refused("msrs"))?.min(batch.len());
        if let Some(&(index, value)) = batch.get(count) {
            let present = read_msrs(fd, &[index]).map_err(refused("msrs"))?;
            if present != [(index, value)] {
                return Err(Refused {
                    what: format!("msr {index:#x} with {value:#x}"),
                    source: io::Error::from_raw_os_error(libc::EINVAL),
                });
            }
        }
        rest = &rest[(count + usize::from(count < batch.len()))..];
    }
    Ok(())
}

fn msr_batch(msrs: impl Iterator<Item = (u32, u64)>) -> Result<Msrs, errno::Error> {
    let entry = |(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries: Vec<kvm_msr_entry> = msrs.map(entry).collect();
    Msrs::from_entries(&entries).map_err(|_| errno::Error::new(libc::E2BIG))
}

fn read_xsave(fd: &VcpuFd, size_bytes: usize) -> Result<Vec<u32>, errno::Error> {
    let extra = size_bytes.saturating_sub(size_of::<kvm_xsave>()).div_ceil(4);
    let mut xsave = Xsave::new(extra).map_err(|_| errno::Error::new(libc::ENOMEM))?;
    // SAFETY: the structure has room for `size_bytes`, which is what this VM's KVM_CAP_XSAVE2 told; no feature that
    // would make it larger is enabled later by this process for its guests.
    unsafe { fd.get_xsave2(&mut xsave) }?;
    let mut words = xsave.as_fam_struct_ref().xsave.region.to_vec();
    words.extend_from_slice(xsave.as_slice());
    Ok(words)
}

/// `words` are as long as those that [`read_xsave`] makes: the caller checks that for untrusted ones.
fn write_xsave(fd: &VcpuFd, words: &[u32]) -> Result<(), errno::Error> {
    let Some((region, extra)) = words.split_first_chunk::<1024>() else {
        return Err(errno::Error::new(libc::EINVAL));
    };
    let mut xsave = Xsave::from_entries(extra).map_err(|_| errno::Error::new(libc::ENOMEM))?;
    // SAFETY: the length field is not touched, which is what the method demands.
    unsafe { xsave.as_mut_fam_struct() }.xsave.region = *region;
    // SAFETY: the structure is as long as this VM's KVM_CAP_XSAVE2 told, as for reading.
    unsafe { fd.set_xsave2(&xsave) }
}
