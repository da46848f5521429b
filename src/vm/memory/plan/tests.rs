//! The whole domain of the pure decisions: sizes on both sides of the start-up size, and every way to fall short.

use proptest::prelude::*;

use super::*;
use crate::config::VmConfig;

const MIB: u64 = 1 << 20;

fn memory(startup_mib: u64, maximum_mib: u64) -> MemoryConfig {
    let builder = VmConfig::builder("plan", "/boot/vmlinuz").startup_bytes(startup_mib * MIB);
    let config = builder.maximum_bytes(maximum_mib * MIB).build();
    *config.expect("the sizes are allowed").memory()
}

#[test]
fn a_target_above_the_start_up_size_plugs_and_one_below_it_balloons() {
    let memory = memory(512, 4096);
    let plan = |target| {
        let plan = Plan::new(target, &memory, ConfigVersion::V2_0).expect("within the limits");
        (plan.requested_bytes, plan.plugged_bytes, plan.ballooned_bytes)
    };
    assert_eq!(plan(512 * MIB), (512 * MIB, 0, 0));
    assert_eq!(plan(4096 * MIB), (4096 * MIB, 3584 * MIB, 0));
    assert_eq!(plan(384 * MIB), (384 * MIB, 0, 128 * MIB));
    assert_eq!(plan(168 * MIB), (168 * MIB, 0, 344 * MIB));
    // Never more than was asked for.
    assert_eq!(plan(613 * MIB), (612 * MIB, 100 * MIB, 0));
    assert_eq!(plan(512 * MIB - 1), (512 * MIB - 4096, 0, 4096));
}

#[test]
fn the_balloon_waits_for_what_is_to_be_unplugged_but_deflates_at_once() {
    let memory = memory(512, 4096);
    let plan =
        |target_mib| Plan::new(target_mib * MIB, &memory, ConfigVersion::V2_0).expect("within the limits");
    let ballooned = |target_mib, plugged_mib, ballooned_mib| {
        let now = Observed {
            plugged_bytes: plugged_mib * MIB,
            ballooned_bytes: ballooned_mib * MIB,
            ..Observed::default()
        };
        plan(target_mib).step(&now).ballooned_bytes / MIB
    };
    assert_eq!(ballooned(384, 512, 0), 0);
    assert_eq!(ballooned(384, 2, 64), 64);
    assert_eq!(ballooned(384, 0, 64), 128);
    assert_eq!(ballooned(1024, 0, 128), 0);
    assert_eq!(
        ballooned(384, 2, 256),
        128,
        "what it holds too much it lets go at once"
    );
}

#[test]
fn what_the_vm_forbids_is_refused_with_both_numbers() {
    let refused = |target_mib, version| {
        let plan = Plan::new(target_mib * MIB, &memory(512, 1024), version);
        plan.expect_err("a limit is crossed")
    };
    let v2 = ConfigVersion::V2_0;
    assert_eq!(
        refused(96, v2).to_string(),
        "target 96 MiB is below the floor 168 MiB"
    );
    assert_eq!(
        refused(1025, v2).to_string(),
        "target 1025 MiB exceeds maximum 1 GiB"
    );
    assert_eq!(
        [refused(96, v2).reason(), refused(1025, v2).reason()],
        ["floor", "maximum"]
    );
    assert_eq!(
        refused(513, ConfigVersion::V1_0).to_string(),
        "runtime memory above the start-up size needs configuration version 2.0, the vm has 1.0"
    );
}

#[test]
fn a_shortfall_names_the_driver_the_guest_or_the_clock() {
    let drivers = |mem_driver, balloon_driver| Observed {
        mem_driver,
        balloon_driver,
        plugged_bytes: 64 * MIB,
        ..Observed::default()
    };
    let plan = Plan::new(512 * MIB, &memory(512, 1024), ConfigVersion::V2_0).expect("within the limits");
    let within = Duration::from_secs(10);
    let why = |now: &Observed, still_s| plan.shortfall(now, within, Duration::from_secs(still_s));
    assert_eq!(why(&drivers(false, true), 10), MemoryReason::DriverAbsent);
    assert_eq!(
        why(&drivers(true, false), 10),
        MemoryReason::GuestRefused,
        "no balloon is needed"
    );
    assert_eq!(why(&drivers(true, true), 5), MemoryReason::GuestRefused);
    assert_eq!(why(&drivers(true, true), 4), MemoryReason::Deadline);
    let ballooned = Observed {
        ballooned_bytes: 4096,
        plugged_bytes: 0,
        ..drivers(false, false)
    };
    assert_eq!(why(&ballooned, 0), MemoryReason::DriverAbsent);
    let mut refused = Observed {
        plug_refused: true,
        ..drivers(true, true)
    };
    let more = Plan::new(1024 * MIB, &memory(512, 1024), ConfigVersion::V2_0).expect("within the limits");
    assert_eq!(more.shortfall(&refused, within, within), MemoryReason::Host);
    assert_eq!(
        why(&refused, 10),
        MemoryReason::GuestRefused,
        "the host refuses nothing on the way down"
    );
    refused.plug_refused = false;
    assert_eq!(
        more.shortfall(&refused, within, within),
        MemoryReason::GuestRefused
    );
}

#[test]
fn a_guest_that_has_not_counted_its_last_block_is_told_from_one_that_has() {
    let told = |assigned_mib, total_mib| Told {
        assigned_bytes: assigned_mib * MIB,
        total_bytes: total_mib * MIB,
    };
    let before = told(512, 480);
    // Of 3584 MiB its books take 56.
    assert!(told(4096, 4008).has_counted_all(&before));
    assert!(!told(4096, 4008 - 126).has_counted_all(&before));
    assert!(told(384, 352).has_counted_all(&before) && before.has_counted_all(&before));
    assert!(
        told(512, 480).has_counted_all(&told(4096, 4008)),
        "on the way down nothing is late"
    );
}

#[test]
fn what_is_withdrawn_leaves_a_vm_between_what_it_had_and_what_it_was_asked_for() {
    let span = Span::at(8 << 30).with(9 << 30);
    assert_eq!(span.closest(512 * MIB), 8 << 30, "it boots");
    assert_eq!(span.closest(17 << 29), 17 << 29);
    assert_eq!(span.closest(10 << 30), 9 << 30);
    let replaced = Span::at(512 * MIB).with(4 << 30).with(1 << 30);
    assert_eq!(
        replaced.closest(3 << 30),
        3 << 30,
        "it got there on its way to 4 GiB"
    );
}

proptest! {
    #[test]
    fn whatever_a_guest_tells_is_compared(
        before in (any::<u64>(), any::<u64>()),
        after in (any::<u64>(), any::<u64>()),
    ) {
        let told = |(assigned_bytes, total_bytes)| Told { assigned_bytes, total_bytes };
        let (before, after) = (told(before), told(after));
        prop_assert!(before.has_counted_all(&before));
        let richest = Told { total_bytes: u64::MAX, ..after };
        prop_assert!(richest.has_counted_all(&before));
    }

    #[test]
    fn what_is_asked_for_is_never_more_than_the_target_and_close_to_it(
        startup_mib in 64u64..4096,
        growth in 0u64..64,
        target_bytes in 0u64..20 << 30,
    ) {
        let memory = memory(startup_mib, startup_mib + 128 * growth);
        let Ok(plan) = Plan::new(target_bytes, &memory, ConfigVersion::V2_0) else {
            prop_assert!(target_bytes < memory.minimum_bytes || target_bytes > memory.maximum_bytes);
            return Ok(());
        };
        prop_assert!((memory.minimum_bytes..=memory.maximum_bytes).contains(&plan.requested_bytes));
        prop_assert!(plan.requested_bytes <= target_bytes && target_bytes - plan.requested_bytes < 2 * MIB);
        prop_assert!(plan.plugged_bytes == 0 || plan.ballooned_bytes == 0);
        let again = Plan::new(plan.requested_bytes, &memory, ConfigVersion::V2_0);
        prop_assert_eq!(again.expect("it was allowed"), plan);
        let obeyed = Observed {
            plugged_bytes: plan.plugged_bytes,
            ballooned_bytes: plan.ballooned_bytes,
            ..Observed::default()
        };
        prop_assert!(plan.is_reached(&obeyed));
        prop_assert_eq!(assigned_bytes(memory.startup_bytes, &obeyed), plan.requested_bytes);
        prop_assert_eq!(Plan::as_is(memory.startup_bytes, &obeyed), plan);
    }
}
