//! What the guest's CPUs say they are: the host's features made into CPUs of one socket with N cores.
//!
//! Pure functions over tables of CPUID entries. The features are the host's own, less what could not survive a save
//! or is not built here; a guest that finds the TSC deadline timer, x2APIC, kvmclock and paravirtual end-of-interrupt
//! calibrates no timer and leaves the guest seldom.
//! References: Intel SDM 2A CPUID; AMD APM 3 appendix E; Linux `Documentation/virt/kvm/x86/cpuid.rst`.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// What is known about a vCPU before its CPUID is made.
#[derive(Debug, Clone, Copy)]
pub struct CpuFacts {
    /// The vCPU's number, which is its APIC id too.
    pub index: u32,
    /// The number of vCPUs of the VM.
    pub count: u32,
    /// The frequency of the guest's TSC where the host knows it.
    pub tsc_khz: Option<u32>,
    /// Whether the in-kernel APIC has the TSC deadline timer (KVM_CAP_TSC_DEADLINE_TIMER).
    pub tsc_deadline_timer: bool,
}

/// A feature that saved vCPUs have and this host's do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cpuid {function:#x}.{index:#x} {register} needs bits {bits:#x} that this host lacks")]
pub struct MissingFeature {
    /// The leaf.
    pub function: u32,
    /// The sub-leaf.
    pub index: u32,
    /// The register.
    pub register: &'static str,
    /// The bits that are missing.
    pub bits: u32,
}

const LEAF_1_ECX_VMX: u32 = 1 << 5;
const LEAF_1_ECX_X2APIC: u32 = 1 << 21;
const LEAF_1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF_1_ECX_OSXSAVE: u32 = 1 << 27;
const LEAF_1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF_1_EDX_HTT: u32 = 1 << 28;
const LEAF_6_EAX_ARAT: u32 = 1 << 2;
const LEAF_7_EBX_SGX: u32 = 1 << 2;
const LEAF_7_EBX_PROCESSOR_TRACE: u32 = 1 << 25;
const LEAF_7_ECX_OSPKE: u32 = 1 << 4;
const LEAF_7_ECX_SGX_LC: u32 = 1 << 30;
const EXT_1_ECX_CMP_LEGACY: u32 = 1 << 1;
const EXT_1_ECX_SVM: u32 = 1 << 2;
const EXT_1_ECX_PERFCTR_CORE: u32 = 1 << 23;
const EXT_7_EDX_INVARIANT_TSC: u32 = 1 << 8;

const HYPERVISOR_LEAF: u32 = 0x4000_0000;
const HYPERVISOR_FREQUENCY_LEAF: u32 = 0x4000_0010;
/// The in-kernel APIC timer ticks once a nanosecond (KVM API, KVM_CAP_X86_APIC_BUS_CYCLES_NS).
const APIC_BUS_KHZ: u32 = 1_000_000;

/// Makes the CPUID of one vCPU from what the host supports (KVM_GET_SUPPORTED_CPUID).
pub fn patch(supported: &[kvm_cpuid_entry2], facts: &CpuFacts) -> Vec<kvm_cpuid_entry2> {
    let leaf_max = eax_of(supported, 0);
    // The host tells the topology of the CPU on which it was asked: all of it is made anew.
    let kept = supported
        .iter()
        .filter(|entry| !matches!(entry.function, 0xB | 0x1F | HYPERVISOR_FREQUENCY_LEAF));
    let mut entries: Vec<kvm_cpuid_entry2> = kept.copied().collect();
    for entry in &mut entries {
        patch_features(entry, facts);
        patch_topology(entry, facts);
    }
    for function in [0xB, 0x1F] {
        if leaf_max >= function {
            entries.extend(extended_topology(function, facts));
        }
    }
    if let Some(tsc_khz) = facts.tsc_khz
        && let Some(base) = entries.iter_mut().find(|entry| entry.function == HYPERVISOR_LEAF)
    {
        base.eax = base.eax.max(HYPERVISOR_FREQUENCY_LEAF);
        entries.push(kvm_cpuid_entry2 {
            function: HYPERVISOR_FREQUENCY_LEAF,
            eax: tsc_khz,
            ebx: APIC_BUS_KHZ,
            ..Default::default()
        });
    }
    entries
}

/// Adds and removes features.
fn patch_features(entry: &mut kvm_cpuid_entry2, facts: &CpuFacts) {
    match (entry.function, entry.index) {
        (1, _) => {
            // OSXSAVE follows the guest's CR4, KVM keeps it up to date. Nested VMX is not offered: its state is not
            // part of a saved vCPU.
            entry.ecx &= !(LEAF_1_ECX_VMX | LEAF_1_ECX_TSC_DEADLINE | LEAF_1_ECX_OSXSAVE);
            entry.ecx |= LEAF_1_ECX_HYPERVISOR | LEAF_1_ECX_X2APIC;
            if facts.tsc_deadline_timer {
                entry.ecx |= LEAF_1_ECX_TSC_DEADLINE;
            }
        }
        // The APIC timer goes on in every C state, as a timer of the host's kernel does.
        (6, _) => {
            (entry.eax, entry.ebx) = (LEAF_6_EAX_ARAT, 0);
            (entry.ecx, entry.edx) = (0, 0);
        }
        (7, 0) => {
            // Enclaves and traces need memory and files that are not part of a VM here.
            entry.ebx &= !(LEAF_7_EBX_SGX | LEAF_7_EBX_PROCESSOR_TRACE);
            entry.ecx &= !(LEAF_7_ECX_SGX_LC | LEAF_7_ECX_OSPKE);
        }
        // No performance counters: they differ between hosts that are alike otherwise, and a guest's watchdog would
        // keep one armed for ever. No SVM capabilities and no memory encryption, which are not offered either.
        (0xA | 0x12 | 0x14 | 0x8000_000A | 0x8000_001F | 0x8000_0022, _) => {
            (entry.eax, entry.ebx) = (0, 0);
            (entry.ecx, entry.edx) = (0, 0);
        }
        (0x8000_0001, _) => entry.ecx &= !(EXT_1_ECX_SVM | EXT_1_ECX_PERFCTR_CORE),
        // A guest that sees an invariant TSC keeps time by it, and it goes on while the VM is paused and at another
        // rate on another host; without it the guest keeps time by kvmclock, which does neither.
        (0x8000_0007, _) => entry.edx &= !EXT_7_EDX_INVARIANT_TSC,
        _ => {}
    }
}

/// Tells the topology in the leaves that also tell something else: one socket, one thread a core.
fn patch_topology(entry: &mut kvm_cpuid_entry2, facts: &CpuFacts) {
    let core_id_max = facts.count.next_power_of_two() - 1;
    match entry.function {
        1 => {
            let id_count = (core_id_max + 1).min(0xFF);
            entry.ebx = (entry.ebx & 0xFFFF) | (id_count << 16) | (facts.index << 24);
            entry.edx = with_bit(entry.edx, LEAF_1_EDX_HTT, facts.count > 1);
        }
        // EAX bits 7–5: the cache's level; 25–14: the ids that share it; 31–26: the cores of the package.
        4 if entry.eax & 0x1F != 0 => {
            entry.eax &= 0x3FFF;
            entry.eax |= cache_sharing(entry.eax, core_id_max) | (core_id_max.min(0x3F) << 26);
        }
        0x8000_0001 => entry.ecx = with_bit(entry.ecx, EXT_1_ECX_CMP_LEGACY, facts.count > 1),
        0x8000_0008 => {
            let id_bits = facts.count.next_power_of_two().trailing_zeros();
            entry.ecx = (entry.ecx & !0xF0FF) | (id_bits << 12) | (facts.count - 1).min(0xFF);
        }
        0x8000_001D if entry.eax & 0x1F != 0 => {
            entry.eax &= 0x3FFF;
            entry.eax |= cache_sharing(entry.eax, core_id_max);
        }
        // The APIC id, the core's id with one thread, node 0 of one.
        0x8000_001E => (entry.eax, entry.ebx, entry.ecx) = (facts.index, facts.index & 0xFF, 0),
        _ => {}
    }
}

/// The sharing field of a cache: levels 1 and 2 belong to a core, the others to the package.
fn cache_sharing(eax: u32, core_id_max: u32) -> u32 {
    let level = (eax >> 5) & 7;
    if level < 3 { 0 } else { core_id_max << 14 }
}

/// The sub-leaves of leaf 0xB or 0x1F: threads of a core, cores of the package, end.
fn extended_topology(function: u32, facts: &CpuFacts) -> [kvm_cpuid_entry2; 3] {
    const LEVEL_THREAD: u32 = 1 << 8;
    const LEVEL_CORE: u32 = 2 << 8;
    let id_bits = facts.count.next_power_of_two().trailing_zeros();
    let sub_leaf = |index, eax, ebx, level: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: level | index,
        edx: facts.index,
        ..Default::default()
    };
    [
        sub_leaf(0, 0, 1, LEVEL_THREAD),
        sub_leaf(1, id_bits, facts.count, LEVEL_CORE),
        sub_leaf(2, 0, 0, 0),
    ]
}

fn with_bit(value: u32, bit: u32, set: bool) -> u32 {
    if set { value | bit } else { value & !bit }
}

fn eax_of(entries: &[kvm_cpuid_entry2], function: u32) -> u32 {
    let entry = entries.iter().find(|entry| entry.function == function);
    entry.map_or(0, |entry| entry.eax)
}

/// The registers that hold features, of which a guest may have used any.
const FEATURE_WORDS: [(u32, u32, &str); 14] = [
    (1, 0, "ecx"),
    (1, 0, "edx"),
    (7, 0, "ebx"),
    (7, 0, "ecx"),
    (7, 0, "edx"),
    (7, 1, "eax"),
    (7, 1, "edx"),
    (0xD, 0, "eax"),
    (0xD, 1, "eax"),
    (0xD, 1, "ecx"),
    (0x8000_0001, 0, "ecx"),
    (0x8000_0001, 0, "edx"),
    (0x8000_0008, 0, "ebx"),
    (0x4000_0001, 0, "eax"),
];

/// Checks that vCPUs with the features of `here` can go on with what a vCPU with those of `saved` began.
///
/// # Errors
/// The first [`MissingFeature`].
pub fn check(saved: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Result<(), MissingFeature> {
    for (function, index, register) in FEATURE_WORDS {
        let word = |entries: &[kvm_cpuid_entry2]| {
            let entry = entries
                .iter()
                .find(|entry| entry.function == function && entry.index == index);
            entry.map_or(0, |entry| match register {
                "eax" => entry.eax,
                "ebx" => entry.ebx,
                "ecx" => entry.ecx,
                _ => entry.edx,
            })
        };
        let bits = word(saved) & !word(here);
        if bits != 0 {
            return Err(MissingFeature {
                function,
                index,
                register,
                bits,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
