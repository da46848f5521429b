//! Memory at run time on real guests: grow and shrink in any order, and the same numbers on all sides.
//!
//! The guest's side is its /proc/meminfo, the host's the size of the files behind the guest's memory.

use std::thread;
use std::time::Duration;

use libtest_mimic::Failed;
use vm_lifecycle::config::VmConfigBuilder;
use vm_lifecycle::event::EventKind;
use vm_lifecycle::memory::host::HostMemory;
use vm_lifecycle::state::State;
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
            "memory::a_guest_under_load_gives_what_it_can_and_loses_nothing",
            a_guest_under_load_gives_what_it_can,
        ),
        Body::new(
            "memory::what_a_guest_gives_back_returns_to_the_host",
            what_a_guest_gives_back_returns_to_the_host,
        ),
        Body::new(
            "memory::a_guest_without_drivers_is_told_as_such",
            a_guest_without_drivers_is_told_as_such,
        ),
        Body::new(
            "memory::a_reset_or_a_power_cut_on_the_way_loses_no_size",
            a_reset_or_a_power_cut_on_the_way_loses_no_size,
        ),
        Body::new(
            "memory::two_vms_are_not_promised_the_same_memory",
            two_vms_are_not_promised_the_same_memory,
        ),
    ]
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
        // The outcome waited for the guest to count what it was given.
        let (told, total) = (outcome.guest_total_bytes.unwrap_or(0), meminfo_total(&mut shell)?);
        assert!(told.abs_diff(total) < 8 * MIB, "told {told} bytes, says {total}");
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

fn small_and_odd_steps_add_up() -> Result<(), Failed> {
    let (guest, mut shell) = Guest::boot(elastic("steps")?)?;
    let steps = (1..=10u64).chain((0..10).rev());
    for step in steps {
        let target = 512 * MIB + step * 128 * MIB;
        assert_eq!(reach(&guest, target)?.reached_bytes, target);
    }
    agreed(&guest, &mut shell)?;
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
    let memory = agreed(&guest, &mut shell)?;
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
    let memory = agreed(&guest, &mut shell)?;
    assert_eq!(memory.assigned_bytes, outcome.requested_bytes);
    assert_eq!(guest.vm.config().memory().assigned_bytes, outcome.requested_bytes);
    // The guest is as able as before.
    reach(&guest, 512 * MIB)?;
    agreed(&guest, &mut shell)?;
    Ok(())
}

/// Fills a file in the guest's memory, a multiple of 8 MiB, with a repeated text.
fn fill(shell: &mut GuestShell, mib: u64) -> Result<(), Failed> {
    shell.succeed("mkdir -p /load && (mountpoint -q /load || mount -t tmpfs -o size=95% load /load)")?;
    // The size of the file system is a share of what the guest has now.
    shell.succeed("mount -o remount,size=95% /load")?;
    shell.succeed("yes | head -c 8388608 >/tmp/piece")?;
    shell.succeed(&format!(
        "for i in $(seq {}); do cat /tmp/piece; done >/load/file",
        mib / 8
    ))?;
    Ok(())
}

fn a_guest_under_load_gives_what_it_can() -> Result<(), Failed> {
    let (guest, mut shell) = Guest::boot(elastic("load")?.startup_bytes(256 * MIB).maximum_bytes(512 * MIB))?;
    reach(&guest, 512 * MIB)?;
    // Four fifths of what the guest has.
    fill(&mut shell, 400)?;
    let sum = shell.succeed("md5sum </load/file")?;
    let brief = ResizeOptions {
        within: Duration::from_secs(15),
        ..ResizeOptions::default()
    };
    let outcome = resize(&guest, 256 * MIB, brief)?;
    assert!(
        matches!(
            outcome.reason,
            MemoryReason::GuestRefused | MemoryReason::Deadline
        ),
        "{outcome}"
    );
    // Not less than it holds; what it gave is kept, and nothing more is asked for.
    assert!(
        (400 * MIB..=512 * MIB).contains(&outcome.reached_bytes),
        "{outcome}"
    );
    let memory = guest.vm.memory()?;
    assert_eq!(
        (memory.requested_bytes, memory.assigned_bytes),
        (outcome.reached_bytes, outcome.reached_bytes)
    );
    assert_eq!(shell.succeed("md5sum </load/file")?, sum, "the guest lost memory");
    shell.succeed("rm /load/file")?;
    assert_eq!(reach(&guest, 256 * MIB)?.reached_bytes, 256 * MIB);
    // It says what it could not move, and kills nobody for it.
    let complaints = shell.run("dmesg | grep -iE 'oom-kill|killed process|bug:'")?;
    assert_eq!(complaints.text, "");
    Ok(())
}

fn what_a_guest_gives_back_returns_to_the_host() -> Result<(), Failed> {
    let (guest, mut shell) = Guest::boot(elastic("return")?)?;
    let resident = || guest.vm.memory().map(|memory| memory.resident_bytes);
    reach(&guest, GIB)?;
    fill(&mut shell, 600)?;
    let full = resident()?;
    assert!(full >= 600 * MIB, "{full} bytes hold 600 MiB");
    // Memory that the guest does not use any more is reported by it, block by block.
    shell.succeed("rm /load/file")?;
    wait_for(WITHIN, "free pages to be reported", || {
        resident().ok().filter(|now| *now < 300 * MIB)
    })?;
    fill(&mut shell, 600)?;
    let full = resident()?;
    assert!(full >= 600 * MIB, "{full} bytes hold 600 MiB");
    shell.succeed("rm /load/file")?;
    for target in [512 * MIB, 256 * MIB] {
        reach(&guest, target)?;
        let left = resident()?;
        assert!(left <= target + MIB, "{left} bytes for a guest of {target}");
    }
    // The region above the start-up size is gone from the guest's address space, not only from its books.
    let inspect = guest.vm.inspect()?;
    assert_eq!(inspect["machine"]["runtime"]["live_slot_count"], 0, "{inspect:#}");
    assert_eq!(inspect["machine"]["runtime"]["resident_bytes"], 0, "{inspect:#}");
    Ok(())
}

fn a_guest_without_drivers_is_told_as_such() -> Result<(), Failed> {
    let cmdline = CMDLINE.replace("=all", "=virtio_pci,virtio_console");
    let cmdline = format!("{cmdline} memhp_default_state=online_movable");
    let (guest, mut shell) = Guest::boot(elastic("bare")?.cmdline(cmdline))?;
    // A guest that helps itself finds nothing where its memory will be, and costs the host nothing.
    let base = guest.vm.inspect()?["machine"]["runtime"]["base"].clone();
    let found = shell.succeed(&format!("devmem {base} 32 0x12345678; devmem {base} 32"))?;
    assert_eq!(found, "0xFFFFFFFF");
    let runtime = guest.vm.inspect()?["machine"]["runtime"].clone();
    assert_eq!(
        (&runtime["live_slot_count"], &runtime["resident_bytes"]),
        (&0.into(), &0.into())
    );
    let brief = ResizeOptions {
        within: Duration::from_secs(3),
        ..ResizeOptions::default()
    };
    for target in [GIB, 384 * MIB] {
        let outcome = resize(&guest, target, brief)?;
        assert_eq!(
            (outcome.reason, outcome.reached_bytes, outcome.guest_total_bytes),
            (MemoryReason::DriverAbsent, 512 * MIB, None)
        );
    }
    // Drivers that come later find what is asked for by then.
    let late = guest.vm.resize_memory(GIB, patient())?;
    for module in ["virtio_mem", "virtio_balloon"] {
        shell.succeed(&format!(
            "for f in $(cat /modules/{module}.order); do insmod /modules/$f; done"
        ))?;
    }
    let outcome = late.wait(WITHIN * 2).ok_or("the drivers are there")?;
    assert_eq!(outcome.reason, MemoryReason::Complete, "{outcome}");
    agreed(&guest, &mut shell)?;
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
    let (guest, _shell) = Guest::boot(elastic("cut")?)?;
    let growing = guest.vm.resize_memory(2 * GIB, patient())?;
    moving(&guest)?;
    done(guest.vm.reset())?;
    let outcome = growing.wait(WITHIN * 2).ok_or("it goes on over a reset")?;
    assert_eq!(
        (outcome.reason, outcome.reached_bytes),
        (MemoryReason::Complete, 2 * GIB)
    );
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
    let memory = agreed(&guest, &mut shell)?;
    assert_eq!(memory.assigned_bytes, 4 * GIB);
    Ok(())
}

fn two_vms_are_not_promised_the_same_memory() -> Result<(), Failed> {
    let memory = HostMemory::limited_to(3 * GIB / 2 + 256 * MIB);
    let guests = [
        Guest::make_sharing(elastic("first")?, memory.clone())?,
        Guest::make_sharing(elastic("second")?, memory)?,
    ];
    for guest in &guests {
        done(guest.vm.start())?;
        guest.shell()?;
    }
    let [first, second] = &guests;
    // Both at once: one of them gets it.
    let answers = thread::scope(|scope| {
        let asked = guests
            .each_ref()
            .map(|guest| scope.spawn(|| guest.vm.resize_memory(GIB, patient())));
        asked.map(|answer| answer.join().expect("it does not panic"))
    });
    let refusals: Vec<_> = answers
        .iter()
        .filter_map(|answer| answer.as_ref().err())
        .collect();
    assert_eq!(refusals.len(), 1, "{answers:?}");
    assert_eq!(refusals[0].to_string(), "target 1 GiB cannot be promised");
    assert_eq!(refusals[0].reason(), "host");
    let (winner, loser) = if answers[0].is_ok() {
        (first, second)
    } else {
        (second, first)
    };
    assert_eq!(reach(winner, GIB)?.reached_bytes, GIB);
    assert_eq!(loser.vm.memory()?.requested_bytes, 512 * MIB);
    // What one gives back the other can have.
    reach(winner, 512 * MIB)?;
    assert_eq!(reach(loser, GIB)?.reached_bytes, GIB);
    Ok(())
}
