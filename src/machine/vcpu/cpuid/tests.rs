//! CPUID of made-up hosts.

use proptest::prelude::*;

use super::*;

fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = registers;
    kvm_cpuid_entry2 {
        function,
        index,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

/// A host with every bit of every leaf set, where that makes sense.
fn host() -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = [1, 6, 7, 0xA, 0xD, 0x8000_0001, 0x8000_0007, 0x8000_000A]
        .map(|function| entry(function, 0, [!0; 4]))
        .to_vec();
    entries.push(entry(0, 0, [0x1F, 0, 0, 0]));
    entries.push(entry(4, 0, [0xFC1F_C121, 0, 0, 0]));
    entries.push(entry(4, 3, [0xFC1F_C163, 0, 0, 0]));
    entries.push(entry(0xB, 0, [7, 77, 0x107, 99]));
    entries.push(entry(0x8000_0008, 0, [0x3030, 0, 0x7F7F, 0]));
    entries.push(entry(0x8000_001E, 0, [99, 99, 99, 0]));
    entries.push(entry(HYPERVISOR_LEAF, 0, [0x4000_0001, 1, 2, 3]));
    entries.push(entry(0x4000_0001, 0, [0x0100_FEFB, 0, 0, 0]));
    entries
}

fn facts(index: u32, count: u32) -> CpuFacts {
    CpuFacts {
        index,
        count,
        tsc_khz: Some(2_500_000),
        tsc_deadline_timer: true,
    }
}

fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
    let mut found = entries
        .iter()
        .filter(|entry| entry.function == function && entry.index == index);
    let first = found.next().copied().expect("the leaf is there");
    assert!(found.next().is_none(), "leaf {function:#x}.{index} is there once");
    first
}

#[test]
fn what_cannot_be_kept_is_not_offered() {
    let cpuid = patch(&host(), &facts(0, 1));
    let leaf_1 = find(&cpuid, 1, 0);
    assert_eq!(leaf_1.ecx & (LEAF_1_ECX_VMX | LEAF_1_ECX_OSXSAVE), 0);
    let wanted = LEAF_1_ECX_HYPERVISOR | LEAF_1_ECX_X2APIC | LEAF_1_ECX_TSC_DEADLINE;
    assert_eq!(leaf_1.ecx & wanted, wanted);
    assert_eq!(find(&cpuid, 6, 0).eax, LEAF_6_EAX_ARAT);
    let leaf_a = find(&cpuid, 0xA, 0);
    assert_eq!([leaf_a.eax, leaf_a.ebx, leaf_a.ecx, leaf_a.edx], [0; 4]);
    assert_eq!(find(&cpuid, 0x8000_0001, 0).ecx & EXT_1_ECX_SVM, 0);
    assert_eq!(find(&cpuid, 0x8000_0007, 0).edx & EXT_7_EDX_INVARIANT_TSC, 0);
    assert_eq!(find(&cpuid, 0x4000_0001, 0).eax, 0x0100_FEFB);
}

#[test]
fn the_deadline_timer_is_offered_only_where_the_host_has_it() {
    let mut facts = facts(0, 1);
    facts.tsc_deadline_timer = false;
    let cpuid = patch(&host(), &facts);
    assert_eq!(find(&cpuid, 1, 0).ecx & LEAF_1_ECX_TSC_DEADLINE, 0);
}

#[test]
fn the_tsc_frequency_is_told_where_it_is_known() {
    let cpuid = patch(&host(), &facts(0, 1));
    assert_eq!(find(&cpuid, HYPERVISOR_LEAF, 0).eax, HYPERVISOR_FREQUENCY_LEAF);
    let leaf = find(&cpuid, HYPERVISOR_FREQUENCY_LEAF, 0);
    assert_eq!((leaf.eax, leaf.ebx), (2_500_000, 1_000_000));
    let unknown = CpuFacts {
        tsc_khz: None,
        ..facts(0, 1)
    };
    let cpuid = patch(&host(), &unknown);
    assert_eq!(find(&cpuid, HYPERVISOR_LEAF, 0).eax, 0x4000_0001);
}

#[test]
fn the_topology_is_one_socket_of_cores() {
    let cpuid = patch(&host(), &facts(2, 3));
    let leaf_1 = find(&cpuid, 1, 0);
    assert_eq!(leaf_1.ebx >> 16, 0x0204, "apic id 2 of 4 possible ones");
    assert_ne!(leaf_1.edx & LEAF_1_EDX_HTT, 0);
    assert_eq!(find(&cpuid, 4, 0).eax, 0x0C00_0121, "level 1 belongs to one core");
    assert_eq!(find(&cpuid, 4, 3).eax, 0x0C00_C163, "level 3 belongs to all");
    for function in [0xB, 0x1F] {
        let thread = find(&cpuid, function, 0);
        assert_eq!([thread.eax, thread.ebx, thread.ecx, thread.edx], [0, 1, 0x100, 2]);
        let core = find(&cpuid, function, 1);
        assert_eq!([core.eax, core.ebx, core.ecx, core.edx], [2, 3, 0x201, 2]);
        assert_eq!(find(&cpuid, function, 2).ecx, 2);
    }
    assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, 0x2F02);
    let leaf_1e = find(&cpuid, 0x8000_001E, 0);
    assert_eq!([leaf_1e.eax, leaf_1e.ebx, leaf_1e.ecx], [2, 2, 0]);
    assert_eq!(find(&patch(&host(), &facts(0, 1)), 1, 0).edx & LEAF_1_EDX_HTT, 0);
}

#[test]
fn a_missing_feature_is_named_and_a_surplus_is_not() {
    let here = patch(&host(), &facts(0, 1));
    let mut richer = here.clone();
    let leaf_7 = richer
        .iter_mut()
        .find(|entry| entry.function == 7)
        .expect("the leaf is there");
    leaf_7.ebx |= LEAF_7_EBX_SGX;
    check(&here, &richer).expect("more than needed is fine");
    let error = check(&richer, &here).expect_err("one bit is missing");
    assert_eq!(
        error.to_string(),
        "cpuid 0x7.0x0 ebx needs bits 0x4 that this host lacks"
    );
}

proptest! {
    #[test]
    fn apic_ids_are_distinct_and_fit_their_bits(count in 1u32..=254) {
        for index in 0..count {
            let cpuid = patch(&host(), &facts(index, count));
            let core = find(&cpuid, 0xB, 1);
            prop_assert_eq!(find(&cpuid, 1, 0).ebx >> 24, index);
            prop_assert_eq!(core.edx >> core.eax, 0, "all in one socket");
            prop_assert_eq!(core.ebx, count);
        }
    }
}
