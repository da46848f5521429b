//! The frozen saved form of a vCPU.
//!
//! The input is untrusted: lengths are checked here, values by the host when it takes them, so that a wrong one is
//! an error of the restore and never of this process.

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use super::state::VcpuState;
use crate::machine::saved::HexBytes;
use crate::unit::RestoreError;

/// The number of the form below.
pub(super) const SCHEMA: u32 = 1;
/// The most MSRs and CPUID entries a section may hold; hosts have about 100 of each.
const ENTRIES_MAX: usize = 1024;

/// Schema 1 of `vcpu-N`. Structures are KVM's own (KVM API 4.11–4.40, 4.134).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VcpuV1 {
    cpuid: Vec<CpuidEntryV1>,
    mp_state: u32,
    regs: HexBytes,
    sregs: HexBytes,
    debug_regs: HexBytes,
    xsave: HexBytes,
    xcrs: HexBytes,
    lapic: HexBytes,
    msrs: Vec<MsrV1>,
    events: HexBytes,
}

/// One CPUID sub-leaf.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CpuidEntryV1 {
    function: u32,
    index: u32,
    flags: u32,
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
}

/// One model-specific register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MsrV1 {
    index: u32,
    value: u64,
}

impl From<&VcpuState> for VcpuV1 {
    fn from(state: &VcpuState) -> Self {
        let VcpuState {
            cpuid,
            mp_state,
            regs,
            sregs,
            debug_regs,
            xsave,
            xcrs,
            lapic,
            msrs,
            events,
        } = state;
        let msr = |&(index, value): &(u32, u64)| MsrV1 { index, value };
        Self {
            cpuid: cpuid.iter().map(CpuidEntryV1::from).collect(),
            mp_state: *mp_state,
            regs: HexBytes::of(regs),
            sregs: HexBytes::of(sregs),
            debug_regs: HexBytes::of(debug_regs),
            xsave: HexBytes::of(xsave.as_slice()),
            xcrs: HexBytes::of(xcrs),
            lapic: HexBytes::of(lapic),
            msrs: msrs.iter().map(msr).collect(),
            events: HexBytes::of(events),
        }
    }
}

impl VcpuV1 {
    /// The state that this form tells, for a host whose extended state has `xsave_size_bytes`.
    pub(super) fn state(self, xsave_size_bytes: usize) -> Result<VcpuState, RestoreError> {
        let Self {
            cpuid,
            mp_state,
            regs,
            sregs,
            debug_regs,
            xsave,
            xcrs,
            lapic,
            msrs,
            events,
        } = self;
        check_count("cpuid", cpuid.len())?;
        check_count("msrs", msrs.len())?;
        Ok(VcpuState {
            cpuid: cpuid.into_iter().map(kvm_cpuid_entry2::from).collect(),
            mp_state,
            regs: regs.read("regs")?,
            sregs: sregs.read("sregs")?,
            debug_regs: debug_regs.read("debug_regs")?,
            xsave: xsave.words("xsave", xsave_size_bytes)?,
            xcrs: xcrs.read("xcrs")?,
            lapic: lapic.read("lapic")?,
            msrs: msrs
                .into_iter()
                .map(|MsrV1 { index, value }| (index, value))
                .collect(),
            events: events.read("events")?,
        })
    }
}

fn check_count(field: &'static str, count: usize) -> Result<(), RestoreError> {
    if count > ENTRIES_MAX {
        return Err(RestoreError::Value {
            field,
            value: format!("{count} entries long"),
            reason: "at most 1024 are possible",
        });
    }
    Ok(())
}

impl From<&kvm_cpuid_entry2> for CpuidEntryV1 {
    fn from(entry: &kvm_cpuid_entry2) -> Self {
        let kvm_cpuid_entry2 {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
            padding: _,
        } = *entry;
        Self {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
        }
    }
}

impl From<CpuidEntryV1> for kvm_cpuid_entry2 {
    fn from(entry: CpuidEntryV1) -> Self {
        let CpuidEntryV1 {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
        } = entry;
        Self {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
            padding: [0; 3],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::testing::same_bytes;

    #[test]
    fn schema_1_reads_and_writes_these_bytes() {
        let text = concat!(
            r#"{"cpuid":[{"function":2147483649,"index":0,"flags":1,"eax":1,"ebx":2,"ecx":3,"edx":4}],"mp_state":3,"#,
            r#""regs":"01","sregs":"02","debug_regs":"03","xsave":"04","xcrs":"05","lapic":"06","#,
            r#""msrs":[{"index":16,"value":18446744073709551615}],"events":"07"}"#
        );
        same_bytes::<VcpuV1>(text);
    }
}
