//! Resizing on a machine without a guest: every way an operation ends, and what is left behind.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::config::{ConfigVersion, VmConfig, VmConfigBuilder};
use crate::event::{EventKind, EventStream};
use crate::ids::OperationId;
use crate::state::State;
use crate::unit::PowerRequest;
use crate::vm::fake::{FakeControl, FakePlatform};

const SOON: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn builder() -> VmConfigBuilder {
    VmConfig::builder("resize", "/boot/vmlinuz")
        .startup_bytes(512 * MIB)
        .maximum_bytes(4 * GIB)
}

fn make(builder: VmConfigBuilder) -> (Vm, FakePlatform) {
    let platform = FakePlatform::default();
    let config = builder.build().expect("the configuration is valid");
    let vm = Vm::new(config, Arc::new(platform.clone())).expect("the fake refuses nothing");
    (vm, platform)
}

fn started(builder: VmConfigBuilder) -> (Vm, FakePlatform) {
    let (vm, platform) = make(builder);
    start(&vm);
    (vm, platform)
}

fn start(vm: &Vm) {
    let start = vm.start().expect("an off vm can be started");
    assert!(start.wait(SOON).is_some_and(|outcome| outcome.is_done()));
}

fn within(within: Duration, at_deadline: AtDeadline) -> ResizeOptions {
    ResizeOptions { within, at_deadline }
}

fn resize(vm: &Vm, target_bytes: u64, options: ResizeOptions) -> Operation<MemoryOutcome> {
    vm.resize_memory(target_bytes, options)
        .expect("the target is allowed")
}

fn outcome(vm: &Vm, target_bytes: u64, options: ResizeOptions) -> MemoryOutcome {
    resize(vm, target_bytes, options).wait(SOON).expect("it ends")
}

/// The guest goes no further than this by itself.
fn stop_at(control: &FakeControl, plugged_bytes: u64, ballooned_bytes: u64) {
    control.memory(|memory| {
        memory.obeys = false;
        memory.now.plugged_bytes = plugged_bytes;
        memory.now.ballooned_bytes = ballooned_bytes;
    });
}

fn settled(events: &EventStream) -> (u64, &'static str) {
    std::iter::from_fn(|| events.next(SOON))
        .find_map(|event| match event.kind {
            EventKind::MemorySettled {
                reached_bytes,
                reason,
                ..
            } => Some((reached_bytes, reason)),
            _ => None,
        })
        .expect("it settles")
}

#[test]
fn a_guest_that_obeys_reaches_every_target_in_any_order() {
    let (vm, _platform) = started(builder());
    for target_bytes in [2 * GIB, GIB, 384 * MIB, 4 * GIB, 4 * GIB, 512 * MIB] {
        let outcome = outcome(&vm, target_bytes, ResizeOptions::default());
        assert_eq!(
            (outcome.reached_bytes, outcome.reason),
            (target_bytes, MemoryReason::Complete)
        );
        assert!(
            outcome.guest_total_bytes.is_some(),
            "the guest was asked when it was there"
        );
        let memory = vm.memory().expect("the supervisor lives");
        assert_eq!(
            (memory.requested_bytes, memory.assigned_bytes),
            (target_bytes, target_bytes)
        );
        assert_eq!(vm.config().memory().assigned_bytes, target_bytes);
    }
    let unaligned = outcome(&vm, GIB + 3 * MIB, ResizeOptions::default());
    let told = (
        unaligned.target_bytes,
        unaligned.requested_bytes,
        unaligned.reached_bytes,
    );
    assert_eq!(told, (GIB + 3 * MIB, GIB + 2 * MIB, GIB + 2 * MIB));
    assert_eq!(unaligned.to_string(), "complete: 1026 MiB of 1026 MiB reached");
}

#[test]
fn a_guest_without_drivers_is_told_from_one_that_refuses() {
    let (vm, platform) = started(builder());
    let control = platform.control();
    stop_at(control, 0, 0);
    control.memory(|memory| memory.now.mem_driver = false);
    let late = within(Duration::ZERO, AtDeadline::Withdraw);
    let absent = outcome(&vm, GIB, late);
    assert_eq!(
        (absent.reached_bytes, absent.reason),
        (512 * MIB, MemoryReason::DriverAbsent)
    );
    assert!(!absent.is_done());
    control.memory(|memory| memory.now.mem_driver = true);
    assert_eq!(outcome(&vm, GIB, late).reason, MemoryReason::GuestRefused);
    // What was withdrawn is not asked for any more, and is not a setting.
    assert_eq!(
        vm.memory().expect("the supervisor lives").requested_bytes,
        512 * MIB
    );
}

#[test]
fn what_was_reached_is_kept_and_the_rest_withdrawn_or_kept_as_asked() {
    let (vm, platform) = started(builder());
    let control = platform.control();
    stop_at(control, 256 * MIB, 0);
    let events = vm.events();
    let kept = outcome(&vm, GIB, within(Duration::ZERO, AtDeadline::Keep));
    assert_eq!((kept.reached_bytes, kept.requested_bytes), (768 * MIB, GIB));
    assert_eq!(settled(&events), (768 * MIB, kept.reason.as_str()));
    assert_eq!(vm.memory().expect("the supervisor lives").requested_bytes, GIB);
    // The guest comes round: nobody waits any more, and an event tells.
    stop_at(control, 512 * MIB, 0);
    assert_eq!(settled(&events), (GIB, "complete"));
    let withdrawn = outcome(&vm, 2 * GIB, within(Duration::ZERO, AtDeadline::Withdraw));
    assert_eq!(withdrawn.reached_bytes, GIB);
    assert_eq!(vm.config().memory().assigned_bytes, GIB);
}

#[test]
fn a_new_target_takes_the_place_of_the_pending_one_and_the_same_joins_it() {
    let (vm, platform) = started(builder());
    stop_at(platform.control(), 0, 0);
    let first = resize(&vm, GIB, within(SOON, AtDeadline::Withdraw));
    let again = resize(&vm, GIB, within(Duration::ZERO, AtDeadline::Withdraw));
    assert_eq!(again.id(), first.id(), "the same target is the same operation");
    let second = resize(&vm, 2 * GIB, within(SOON, AtDeadline::Withdraw));
    let outcome = first.outcome().expect("its place is taken");
    assert_eq!(
        (outcome.reason, outcome.reached_bytes),
        (MemoryReason::Withdrawn, 512 * MIB)
    );
    assert!(second.outcome().is_none(), "it goes on");
    stop_at(platform.control(), 3 * GIB / 2, 0);
    let outcome = second.wait(SOON).expect("the guest obeyed");
    assert_eq!(outcome.reason, MemoryReason::Complete);
}

#[test]
fn a_reset_guest_is_asked_again_and_an_ended_one_ends_the_operation() {
    let (vm, platform) = started(builder());
    let control = platform.control();
    assert!(outcome(&vm, 2 * GIB, ResizeOptions::default()).is_done());
    let events = vm.events();
    assert!(
        vm.reset()
            .expect("it runs")
            .wait(SOON)
            .is_some_and(|outcome| outcome.is_done())
    );
    assert_eq!(vm.memory().expect("the supervisor lives").assigned_bytes, 2 * GIB);
    assert_eq!(settled(&events), (2 * GIB, "complete"));
    stop_at(control, 0, 0);
    let pending = resize(&vm, 4 * GIB, within(SOON, AtDeadline::Withdraw));
    control.guest(PowerRequest::PowerOff);
    assert_eq!(
        pending.wait(SOON).expect("the guest is gone").reason,
        MemoryReason::GuestEnded
    );
    assert!(vm.wait_for(State::Off, SOON));
    let memory = vm.memory().expect("the supervisor lives");
    assert_eq!((memory.requested_bytes, memory.assigned_bytes), (4 * GIB, 0));
    control.memory(|memory| memory.obeys = true);
    start(&vm);
    assert_eq!(vm.memory().expect("the supervisor lives").assigned_bytes, 4 * GIB);
}

#[test]
fn a_vm_that_is_off_starts_with_what_it_was_given() {
    let (vm, _platform) = make(builder());
    let outcome = outcome(&vm, 384 * MIB, ResizeOptions::default());
    assert_eq!(
        (outcome.reason, outcome.reached_bytes, outcome.is_done()),
        (MemoryReason::Stored, 0, true)
    );
    assert_eq!(outcome.to_string(), "stored: 384 MiB for the next start");
    start(&vm);
    assert_eq!(
        vm.memory().expect("the supervisor lives").assigned_bytes,
        384 * MIB
    );
}

#[test]
fn a_guest_whose_host_has_less_than_before_starts_with_its_start_up_size_and_says_so() {
    let (vm, platform) = make(builder().assigned_bytes(2 * GIB));
    platform.control().memory(|memory| memory.host_refuses = true);
    let events = vm.events();
    start(&vm);
    assert_eq!(settled(&events), (512 * MIB, "host"));
    let memory = vm.memory().expect("the supervisor lives");
    assert_eq!(
        (memory.requested_bytes, memory.assigned_bytes),
        (2 * GIB, 512 * MIB)
    );
    platform.control().host_memory_freed();
    assert_eq!(settled(&events), (2 * GIB, "complete"), "another vm gave it back");
}

#[test]
fn what_is_impossible_is_refused_and_changes_nothing() {
    let (vm, platform) = started(builder());
    let refused = |target_bytes| {
        let refused = vm.resize_memory(target_bytes, ResizeOptions::default());
        refused.expect_err("it is impossible").to_string()
    };
    assert_eq!(refused(96 * MIB), "target 96 MiB is below the floor 168 MiB");
    assert_eq!(refused(5 * GIB), "target 5 GiB exceeds maximum 4 GiB");
    platform.control().memory(|memory| memory.host_refuses = true);
    assert_eq!(refused(GIB), "target 1 GiB cannot be promised");
    assert_eq!(
        vm.memory().expect("the supervisor lives").requested_bytes,
        512 * MIB
    );
    assert!(
        outcome(&vm, 256 * MIB, ResizeOptions::default()).is_done(),
        "less is always there"
    );
    let (generous, platform) = started(builder().overcommit(true));
    platform.control().memory(|memory| memory.host_refuses = true);
    assert!(outcome(&generous, GIB, ResizeOptions::default()).is_done());
    let (old, _platform) = started(
        VmConfig::builder("old", "/boot/vmlinuz")
            .startup_bytes(512 * MIB)
            .version(ConfigVersion::V1_0),
    );
    let error = old
        .resize_memory(GIB, ResizeOptions::default())
        .expect_err("1.0 cannot grow");
    assert_eq!(error.reason(), "version");
    assert!(outcome(&old, 384 * MIB, ResizeOptions::default()).is_done());
}

#[test]
fn the_size_is_stored_and_a_vm_opened_again_starts_with_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let platform = Arc::new(FakePlatform::default());
    let config = builder().build().expect("the configuration is valid");
    let vm = Vm::create(folder.path(), config, platform.clone()).expect("the folder is empty");
    start(&vm);
    assert!(outcome(&vm, 3 * GIB, ResizeOptions::default()).is_done());
    drop(vm);
    let vm = Vm::open(folder.path(), platform).expect("it was stored");
    start(&vm);
    assert_eq!(vm.memory().expect("the supervisor lives").assigned_bytes, 3 * GIB);
}

#[test]
fn a_size_that_cannot_be_stored_is_told_and_stored_later() {
    let folder = tempfile::tempdir().expect("a folder");
    let place = folder.path().join("vm");
    let platform = Arc::new(FakePlatform::default());
    let config = builder().build().expect("the configuration is valid");
    let vm = Vm::create(&place, config, platform.clone()).expect("the folder is empty");
    let events = vm.events();
    let away = folder.path().join("away");
    std::fs::rename(&place, &away).expect("the folder can be moved");
    let off = outcome(&vm, GIB, ResizeOptions::default());
    assert_eq!((off.reason, off.is_done()), (MemoryReason::NotStored, false));
    let told = std::iter::from_fn(|| events.next(SOON))
        .find(|event| matches!(event.kind, EventKind::ConfigNotStored { .. }));
    assert!(told.is_some());
    start(&vm);
    assert!(outcome(&vm, 2 * GIB, ResizeOptions::default()).is_done());
    let stored = || vm.memory().expect("the supervisor lives").stored;
    assert!(!stored(), "the guest has it all the same");
    std::fs::rename(&away, &place).expect("the folder can be moved back");
    assert!(outcome(&vm, 2 * GIB, ResizeOptions::default()).is_done());
    drop(vm.power_off());
    assert!(vm.wait_for(State::Off, SOON));
    assert_eq!(
        outcome(&vm, 2 * GIB, ResizeOptions::default()).reason,
        MemoryReason::Stored
    );
    assert!(stored());
    drop((vm, events));
    let vm = Vm::open(&place, platform).expect("it was stored");
    assert_eq!(vm.config().memory().assigned_bytes, 2 * GIB);
}

#[test]
fn a_guest_that_does_not_tell_its_total_has_reached_its_target_all_the_same() {
    let (vm, platform) = started(builder());
    platform.control().memory(|memory| memory.tells = false);
    let silent = outcome(&vm, GIB, within(Duration::ZERO, AtDeadline::Withdraw));
    assert_eq!(
        (silent.reason, silent.guest_total_bytes),
        (MemoryReason::Complete, None)
    );
    platform
        .control()
        .memory(|memory| memory.now.balloon_driver = false);
    assert!(outcome(&vm, 2 * GIB, ResizeOptions::default()).is_done());
}

/// A guest that boots has no memory beyond its start-up size yet.
#[test]
fn what_a_vm_had_survives_a_request_that_comes_while_its_guest_boots() {
    let (vm, platform) = make(builder().assigned_bytes(2 * GIB));
    stop_at(platform.control(), 0, 0);
    start(&vm);
    let early = within(Duration::ZERO, AtDeadline::Withdraw);
    let setting = || vm.memory().expect("the supervisor lives").requested_bytes;
    for target_bytes in [2 * GIB, 3 * GIB] {
        assert_eq!(outcome(&vm, target_bytes, early).reached_bytes, 512 * MIB);
        assert_eq!(setting(), 2 * GIB, "after a request for {target_bytes}");
    }
    let first = resize(&vm, 3 * GIB, within(SOON, AtDeadline::Withdraw));
    assert_eq!(outcome(&vm, 4 * GIB, early).reached_bytes, 512 * MIB);
    assert_eq!(
        first.outcome().map(|outcome| outcome.reason),
        Some(MemoryReason::Withdrawn)
    );
    assert_eq!(setting(), 2 * GIB, "it never had what took its place either");
    let events = vm.events();
    platform.control().memory(|memory| memory.obeys = true);
    assert_eq!(
        settled(&events),
        (2 * GIB, "complete"),
        "it is still asked for it"
    );
}

#[test]
fn what_is_withdrawn_is_not_promised_any_more() {
    let (vm, platform) = started(builder());
    let control = platform.control();
    stop_at(control, 0, 0);
    control.memory(|memory| memory.now.mem_driver = false);
    let absent = outcome(&vm, 4 * GIB, within(Duration::ZERO, AtDeadline::Withdraw));
    assert_eq!(absent.reason, MemoryReason::DriverAbsent);
    // An answer of the supervisor comes behind what it did at the deadline.
    assert_eq!(
        vm.memory().expect("the supervisor lives").requested_bytes,
        512 * MIB
    );
    let mut promised_bytes = 0;
    control.memory(|memory| promised_bytes = memory.promised_bytes);
    assert_eq!(promised_bytes, 512 * MIB);
}

#[test]
fn asking_again_for_the_same_reaches_the_guest_again() {
    let (vm, platform) = started(builder());
    let control = platform.control();
    stop_at(control, 0, 0);
    let reminded = || {
        let mut count = 0;
        control.memory(|memory| count = memory.reminded_count);
        count
    };
    let _kept = outcome(&vm, GIB, within(Duration::ZERO, AtDeadline::Keep));
    let once = reminded();
    let again = resize(&vm, GIB, within(SOON, AtDeadline::Keep));
    let joined = resize(&vm, GIB, within(SOON, AtDeadline::Keep));
    assert_eq!((joined.id(), reminded()), (again.id(), once + 2));
}

#[test]
fn a_guest_that_has_obeyed_and_tells_nothing_ends_the_wait_of_one_who_waits_for_ever() {
    let (vm, platform) = started(builder());
    platform.control().memory(|memory| memory.tells = false);
    let silent = resize(&vm, GIB, within(Duration::MAX, AtDeadline::Withdraw));
    let outcome = silent.wait(SOON).expect("it has a second to count");
    assert_eq!(
        (outcome.reason, outcome.reached_bytes),
        (MemoryReason::Complete, GIB)
    );
}

#[test]
fn a_guest_that_moves_back_while_it_counts_has_its_time_as_before() {
    let (vm, platform) = started(builder());
    platform.control().memory(|memory| memory.tells = false);
    let operation = resize(&vm, GIB, within(SOON, AtDeadline::Withdraw));
    stop_at(platform.control(), 0, 0);
    assert_eq!(
        operation.wait(Duration::from_secs(2)),
        None,
        "its minute is not over"
    );
    stop_at(platform.control(), 512 * MIB, 0);
    assert_eq!(
        operation.wait(SOON).map(|outcome| outcome.reason),
        Some(MemoryReason::Complete)
    );
}

#[test]
fn a_guest_that_goes_back_and_forth_does_not_flood_the_events() {
    let (vm, platform) = started(builder());
    assert!(outcome(&vm, 2 * GIB, ResizeOptions::default()).is_done());
    let events = vm.events();
    for _ in 0..1000 {
        stop_at(platform.control(), GIB, 0);
        vm.memory().expect("the supervisor lives");
        stop_at(platform.control(), 3 * GIB / 2, 0);
        vm.memory().expect("the supervisor lives");
    }
    drop(vm.pause());
    let before_the_pause = std::iter::from_fn(|| events.next(SOON))
        .take_while(|event| !matches!(event.kind, EventKind::OperationBegan { .. }));
    let count = before_the_pause.count();
    assert!(count < 60, "{count} events of some seconds");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn whatever_happens_every_resize_ends_once_and_the_last_target_is_asked_for(
        steps in prop::collection::vec((0u8..9, 0u64..40), 1..30),
    ) {
        let (vm, platform) = started(builder());
        let control = platform.control();
        let events = vm.events();
        let mut operations = Vec::new();
        let mut endings: BTreeMap<OperationId, u32> = BTreeMap::new();
        for (step, size) in steps {
            match step {
                0..4 => {
                    let keep = if step == 0 { AtDeadline::Keep } else { AtDeadline::Withdraw };
                    let options = within(if step == 1 { SOON } else { Duration::ZERO }, keep);
                    operations.extend(vm.resize_memory(size * 128 * MIB, options).ok());
                }
                4 => control.memory(|memory| memory.obeys = !memory.obeys),
                5 => control.memory(|memory| memory.tells = !memory.tells),
                6 => drop(vm.reset().ok()),
                7 => stop_at(control, size.min(28) * 128 * MIB, 0),
                _ => drop(vm.pause().ok().or_else(|| vm.resume().ok())),
            }
        }
        operations.extend(vm.resize_memory(GIB, within(Duration::ZERO, AtDeadline::Keep)).ok());
        let last = vm.config().memory().assigned_bytes;
        if vm.resize_memory(2 * GIB, within(SOON, AtDeadline::Keep)).is_ok() {
            prop_assert_eq!(vm.memory().expect("the supervisor lives").requested_bytes, 2 * GIB);
        } else {
            prop_assert_eq!(vm.config().memory().assigned_bytes, last);
        }
        drop(vm.power_off());
        for operation in &operations {
            prop_assert!(operation.wait(SOON).is_some(), "{operation:?} has no outcome");
        }
        prop_assert!(vm.wait_for(State::Off, SOON));
        drop(vm);
        // The stream ends with the supervisor.
        for event in std::iter::from_fn(|| events.next(SOON)) {
            match event.kind {
                EventKind::OperationEnded { id, .. } => *endings.entry(id).or_default() += 1,
                EventKind::Lost { count } => prop_assert!(false, "{count} events are lost"),
                _ => {}
            }
        }
        for operation in &operations {
            prop_assert_eq!(endings.get(&operation.id()), Some(&1), "{:?} ended", operation);
        }
    }
}
