//! Memory at run time on real guests: grow and shrink in any order, and the same numbers on all sides.
//!
//! The guest's side is its /proc/meminfo, which is held against what the host says that it was given. What the host
//! gets back and what it can give is in `memory_host.rs`, guests that give or take less than asked in `memory_refusals.rs`.

use libtest_mimic::Failed;
use vm_lifecycle::config::VmConfigBuilder;
use vm_lifecycle::event::{EventKind, ResetCause};
use vm_lifecycle::state::State;
use vm_lifecycle::vm::memory::{MemoryOutcome, MemoryReason, MemoryStatus, ResizeOptions};
use vm_lifecycle::vm::operation::Ended;

use crate::Body;
use crate::guest::{BOOT_WITHIN, CMDLINE, Guest, WITHIN, done, small};
use crate::harness::guest_shell::GuestShell;
use crate::harness::wait::wait_for;

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
/// A kernel's books for the memory that it was given, beside what it keeps at boot: 64 bytes for a page of 4096.
const BOOKS: u64 = 64;

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![
        Body::new(
            "memory::a_guest_grows_and_shrinks_in_any_order",
            a_guest_grows_and_shrinks_in_any_order,
        ),
        Body::new("memory::small_and_odd_steps_add_up", small_and_odd_steps_add_up),
        Body::new(
            "memory::the_last_of_many_targets_wins",
            the_last_of_many_targets_wins,
        ),
        Body::new(
            "memory::a_reset_or_a_power_cut_on_the_way_loses_no_size",
            a_reset_or_a_power_cut_on_the_way_loses_no_size,
        ),
    ]
}

/// 512 MiB that can become 4 GiB.
pub fn elastic(name: &str) -> Result<VmConfigBuilder, Failed> {
    Ok(small(name)?
        .cmdline(format!("{CMDLINE} memhp_default_state=online_movable"))
        .startup_bytes(512 * MIB)
        .maximum_bytes(4 * GIB))
}

pub fn patient() -> ResizeOptions {
    ResizeOptions {
        within: WITHIN,
        ..ResizeOptions::default()
    }
}

/// Resizes and waits for the outcome.
pub fn resize(guest: &Guest, target_bytes: u64, options: ResizeOptions) -> Result<MemoryOutcome, Failed> {
    let operation = guest.vm.resize_memory(target_bytes, options)?;
    let patience = options.within + WITHIN;
    let outcome = operation.wait(patience);
    outcome.ok_or_else(|| format!("{operation:?} has not ended").into())
}

/// Resizes to what must be reached.
pub fn reach(guest: &Guest, target_bytes: u64) -> Result<MemoryOutcome, Failed> {
    let outcome = resize(guest, target_bytes, patient())?;
    if outcome.reason == MemoryReason::Complete && outcome.reached_bytes == outcome.requested_bytes {
        return Ok(outcome);
    }
    Err(format!("{outcome}\n{:#}", guest.vm.inspect()?).into())
}

/// What the guest calls its total.
pub fn meminfo_total(shell: &mut GuestShell) -> Result<u64, Failed> {
    let kib: u64 = shell
        .succeed("awk '/^MemTotal:/ { print $2 }' /proc/meminfo")?
        .parse()?;
    Ok(kib * 1024)
}

/// Waits until the host hears from the guest what the guest says of itself, and holds it against what the guest was
/// given: its total moves by that since it had its start-up size and called it `at_start`, less its books for more.
pub fn agreed(guest: &Guest, shell: &mut GuestShell, at_start: u64) -> Result<MemoryStatus, Failed> {
    let total_bytes = meminfo_total(shell)?;
    let told = wait_for(WITHIN, "the guest's total", || {
        let memory = guest.vm.memory().ok()?;
        (memory.guest_total_bytes == Some(total_bytes)).then_some(memory)
    });
    let memory = told.map_err(|error| {
        let host = guest.vm.memory();
        format!("{error}: the guest says {total_bytes}, the host {host:?}")
    })?;
    let books = memory.assigned_bytes.saturating_sub(memory.startup_bytes) / 4096 * BOOKS;
    let expected = at_start + memory.assigned_bytes - memory.startup_bytes;
    // What a kernel keeps for itself at boot differs by some pages from boot to boot.
    assert!(
        (expected - books - MIB..=expected + MIB).contains(&total_bytes),
        "{total_bytes} bytes in the guest, which had {at_start} at first: {memory:?}"
    );
    Ok(memory)
}

fn a_guest_grows_and_shrinks_in_any_order() -> Result<(), Failed> {
    let (guest, mut shell) = Guest::boot(elastic("resize")?)?;
    let at_start = meminfo_total(&mut shell)?;
    for target in [2 * GIB, GIB, 384 * MIB, 4 * GIB, 512 * MIB] {
        let outcome = reach(&guest, target)?;
        assert_eq!(outcome.reached_bytes, target);
        // The outcome waited for the guest to count what it was given.
        let (told, total) = (outcome.guest_total_bytes.unwrap_or(0), meminfo_total(&mut shell)?);
        assert!(told.abs_diff(total) < 8 * MIB, "told {told} bytes, says {total}");
        let memory = agreed(&guest, &mut shell, at_start)?;
        assert_eq!((memory.requested_bytes, memory.assigned_bytes), (target, target));
    }
    // The driver took the feature that keeps the guest off what is not plugged (virtio 1.2 §5.15.3).
    let accepted = shell.succeed(
        "for d in /sys/bus/virtio/devices/*; do case $(cat $d/device) in 0x0018) cut -c 2 $d/features;; esac; done",
    )?;
    assert_eq!(accepted, "1");
    Ok(())
}

fn small_and_odd_steps_add_up() -> Result<(), Failed> {
    let (guest, mut shell) = Guest::boot(elastic("steps")?)?;
    let at_start = meminfo_total(&mut shell)?;
    let steps = (1..=10u64).chain((0..10).rev());
    for step in steps {
        let target = 512 * MIB + step * 128 * MIB;
        assert_eq!(reach(&guest, target)?.reached_bytes, target);
        agreed(&guest, &mut shell, at_start)?;
    }
    // What cannot be given exactly is rounded down, and the outcome says to what.
    for (target, given) in [
        (612 * MIB + 1, 612 * MIB),
        (513 * MIB, 512 * MIB),
        (500 * MIB - 1, 500 * MIB - 4096),
        (1001 * MIB + 12345, 1000 * MIB),
        (512 * MIB, 512 * MIB),
    ] {
        let outcome = reach(&guest, target)?;
        let told = (
            outcome.target_bytes,
            outcome.requested_bytes,
            outcome.reached_bytes,
        );
        assert_eq!(told, (target, given, given));
    }
    let memory = agreed(&guest, &mut shell, at_start)?;
    assert_eq!(memory.assigned_bytes, 512 * MIB);
    for (target, why) in [
        (96 * MIB, "target 96 MiB is below the floor 168 MiB"),
        (4 * GIB + MIB, "target 4097 MiB exceeds maximum 4 GiB"),
    ] {
        let refused = guest.vm.resize_memory(target, patient()).err();
        assert_eq!(refused.map(|error| error.to_string()).as_deref(), Some(why));
    }
    Ok(())
}

fn the_last_of_many_targets_wins() -> Result<(), Failed> {
    let (guest, mut shell) = Guest::boot(elastic("storm")?)?;
    let at_start = meminfo_total(&mut shell)?;
    let mut random: u64 = 0x9E37_79B9_7F4A_7C15;
    let mut operations = Vec::new();
    for _ in 0..50 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let target = 200 * MIB + (random >> 33) % (3800 * MIB);
        operations.push(guest.vm.resize_memory(target, patient())?);
        // The guest gets to work before the next one comes.
        shell.succeed("true")?;
    }
    let last = operations.pop().ok_or("fifty were begun")?;
    for operation in operations {
        let outcome = operation
            .outcome()
            .ok_or_else(|| format!("{operation:?} still goes on"))?;
        assert!(
            matches!(outcome.reason, MemoryReason::Withdrawn | MemoryReason::Complete),
            "{outcome}"
        );
    }
    let outcome = last.wait(WITHIN * 2).ok_or("the last has not ended")?;
    assert_eq!(outcome.reason, MemoryReason::Complete, "{outcome}");
    assert_eq!(outcome.reached_bytes, outcome.requested_bytes);
    let memory = agreed(&guest, &mut shell, at_start)?;
    assert_eq!(memory.assigned_bytes, outcome.requested_bytes);
    assert_eq!(guest.vm.config().memory().assigned_bytes, outcome.requested_bytes);
    // The guest is as able as before.
    reach(&guest, 512 * MIB)?;
    agreed(&guest, &mut shell, at_start)?;
    Ok(())
}

/// Waits until the guest has begun to move.
fn moving(guest: &Guest) -> Result<(), Failed> {
    let events = std::iter::from_fn(|| guest.events.next(WITHIN));
    let mut progress = events.filter(|event| matches!(event.kind, EventKind::MemoryProgress { .. }));
    progress
        .next()
        .map(drop)
        .ok_or_else(|| "the guest does not move".into())
}

fn a_reset_or_a_power_cut_on_the_way_loses_no_size() -> Result<(), Failed> {
    let (guest, mut shell) = Guest::boot(elastic("cut")?)?;
    let at_start = meminfo_total(&mut shell)?;
    let growing = guest.vm.resize_memory(2 * GIB, patient())?;
    moving(&guest)?;
    done(guest.vm.reset())?;
    let outcome = growing.wait(WITHIN * 2).ok_or("it goes on over a reset")?;
    assert_eq!(
        (outcome.reason, outcome.reached_bytes),
        (MemoryReason::Complete, 2 * GIB)
    );
    shell.run_within("true", BOOT_WITHIN)?;
    agreed(&guest, &mut shell, at_start)?;
    // The guest resets itself on its way below its start-up size, and once more when it is there.
    let events = guest.vm.events();
    let shrinking = guest.vm.resize_memory(384 * MIB, patient())?;
    shell.send("reboot -f")?;
    let by = std::iter::from_fn(|| events.next(WITHIN)).find_map(|event| match event.kind {
        EventKind::Reset { cause } => Some(cause),
        _ => None,
    });
    assert_eq!(by, Some(ResetCause::Guest));
    let outcome = shrinking.wait(WITHIN * 2).ok_or("it goes on over a reset")?;
    assert_eq!(
        (outcome.requested_bytes, outcome.is_done()),
        (384 * MIB, true),
        "{outcome}"
    );
    let ballooned = || {
        let memory = guest.vm.memory().ok()?;
        (memory.assigned_bytes == 384 * MIB).then_some(memory)
    };
    wait_for(WITHIN, "the balloon after a reset by the guest", ballooned)?;
    done(guest.vm.reset())?;
    wait_for(WITHIN, "the balloon after a reset by the host", ballooned)?;
    shell.run_within("true", BOOT_WITHIN)?;
    let memory = agreed(&guest, &mut shell, at_start)?;
    assert_eq!(memory.assigned_bytes, 384 * MIB);
    let growing = guest.vm.resize_memory(4 * GIB, patient())?;
    moving(&guest)?;
    done(guest.vm.power_off())?;
    let outcome = growing.wait(WITHIN).ok_or("there is no guest any more")?;
    assert_eq!(outcome.reason, MemoryReason::GuestEnded, "{outcome}");
    guest.wait_for(State::Off)?;
    let memory = guest.vm.memory()?;
    assert_eq!(
        (
            memory.requested_bytes,
            memory.assigned_bytes,
            memory.resident_bytes
        ),
        (4 * GIB, 0, 0)
    );
    let events = guest.vm.events();
    done(guest.vm.start())?;
    let mut shell = guest.shell()?;
    let settled = std::iter::from_fn(|| events.next(WITHIN)).find_map(|event| match event.kind {
        EventKind::MemorySettled {
            reached_bytes,
            reason,
            ..
        } => Some((reached_bytes, reason)),
        _ => None,
    });
    assert_eq!(settled, Some((4 * GIB, "complete")));
    let memory = agreed(&guest, &mut shell, at_start)?;
    assert_eq!(memory.assigned_bytes, 4 * GIB);
    Ok(())
}
