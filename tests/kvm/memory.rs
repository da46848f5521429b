//! Memory at run time on real guests: grow and shrink in any order, and the same numbers on all sides.
//!
//! The guest's side is its /proc/meminfo, the host's the size of the files behind the guest's memory.

use std::time::Duration;

use libtest_mimic::Failed;
use vm_lifecycle::config::VmConfigBuilder;
use vm_lifecycle::event::EventKind;
use vm_lifecycle::vm::memory::{MemoryOutcome, MemoryReason, MemoryStatus, ResizeOptions};

use crate::Body;
use crate::guest::{CMDLINE, Guest, WITHIN, done, small};
use crate::harness::guest_shell::GuestShell;
use crate::harness::wait::wait_for;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// A kernel's books for the memory that it was given, beside what it keeps at boot: 64 bytes for a page of 4096.
const BOOKS: u64 = 64;

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![Body::new(
        "memory::a_guest_grows_and_shrinks_in_any_order",
        a_guest_grows_and_shrinks_in_any_order,
    )]
}

/// 512 MiB that can become 4 GiB.
fn elastic(name: &str) -> Result<VmConfigBuilder, Failed> {
    Ok(small(name)?
        .cmdline(format!("{CMDLINE} memhp_default_state=online_movable"))
        .startup_bytes(512 * MIB)
        .maximum_bytes(4 * GIB))
}

fn patient() -> ResizeOptions {
    ResizeOptions {
        within: WITHIN,
        ..ResizeOptions::default()
    }
}

/// Resizes and waits for the outcome.
fn resize(guest: &Guest, target_bytes: u64, options: ResizeOptions) -> Result<MemoryOutcome, Failed> {
    let operation = guest.vm.resize_memory(target_bytes, options)?;
    let patience = options.within + WITHIN;
    let outcome = operation.wait(patience);
    outcome.ok_or_else(|| format!("{operation:?} has not ended").into())
}

/// Resizes to what must be reached.
fn reach(guest: &Guest, target_bytes: u64) -> Result<MemoryOutcome, Failed> {
    let outcome = resize(guest, target_bytes, patient())?;
    if outcome.reason == MemoryReason::Complete && outcome.reached_bytes == outcome.requested_bytes {
        return Ok(outcome);
    }
    Err(format!("{outcome}\n{:#}", guest.vm.inspect()?).into())
}

/// What the guest calls its total.
fn meminfo_total(shell: &mut GuestShell) -> Result<u64, Failed> {
    let kib: u64 = shell
        .succeed("awk '/^MemTotal:/ { print $2 }' /proc/meminfo")?
        .parse()?;
    Ok(kib * 1024)
}

/// Waits until the host hears from the guest what the guest says of itself.
fn agreed(guest: &Guest, shell: &mut GuestShell) -> Result<MemoryStatus, Failed> {
    let total_bytes = meminfo_total(shell)?;
    let told = wait_for(WITHIN, "the guest's total", || {
        let memory = guest.vm.memory().ok()?;
        (memory.guest_total_bytes == Some(total_bytes)).then_some(memory)
    });
    told.map_err(|error| {
        format!(
            "{error}: the guest says {total_bytes}, the host {:?}",
            guest.vm.memory()
        )
        .into()
    })
}

fn a_guest_grows_and_shrinks_in_any_order() -> Result<(), Failed> {
    let (guest, mut shell) = Guest::boot(elastic("resize")?)?;
    let at_start = meminfo_total(&mut shell)?;
    for target in [2 * GIB, GIB, 384 * MIB, 4 * GIB, 512 * MIB] {
        let outcome = reach(&guest, target)?;
        assert_eq!(outcome.reached_bytes, target);
        let memory = agreed(&guest, &mut shell)?;
        assert_eq!((memory.requested_bytes, memory.assigned_bytes), (target, target));
        let total = memory.guest_total_bytes.unwrap_or(0);
        // The guest's total moves by what was asked for, less its books for what it has more than at the start.
        let books = target.saturating_sub(512 * MIB) / 4096 * BOOKS;
        let expected = at_start + target - 512 * MIB;
        assert!(
            (expected - books..=expected).contains(&total),
            "{total} bytes in the guest at {target}, it had {at_start} at first"
        );
    }
    Ok(())
}
