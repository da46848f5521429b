//! What the host gives to guests and gets back from them, by its own kernel's books.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use libtest_mimic::Failed;
use vm_lifecycle::event::EventKind;
use vm_lifecycle::memory::host::{HostMemory, HostMemoryError};
use vm_lifecycle::vm::Vm;
use vm_lifecycle::vm::host::KvmPlatform;
use vm_lifecycle::vm::memory::{MemoryReason, ResizeError};

use crate::Body;
use crate::guest::{Guest, TestHost, WITHIN, done};
use crate::harness::wait::wait_for;
use crate::memory::{GIB, MIB, elastic, patient, reach};
use crate::memory_refusals::fill;

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![
        Body::new(
            "memory::what_a_guest_gives_back_returns_to_the_host",
            what_a_guest_gives_back_returns_to_the_host,
        ),
        Body::new(
            "memory::two_vms_are_not_promised_the_same_memory",
            two_vms_are_not_promised_the_same_memory,
        ),
        Body::new(
            "memory::a_vm_is_not_promised_what_the_host_does_not_have",
            a_vm_is_not_promised_what_the_host_does_not_have,
        ),
        Body::new(
            "memory::a_size_that_cannot_be_stored_is_told_and_stored_later",
            a_size_that_cannot_be_stored_is_told_and_stored_later,
        ),
    ]
}

/// What the one file of which this process has `size_bytes` mapped costs the host, by its page tables.
fn mapped_bytes(size_bytes: u64) -> Result<u64, Failed> {
    let text = fs::read_to_string("/proc/self/smaps")?;
    let kib = |line: &str, name: &str| -> Option<u64> {
        line.strip_prefix(name)?.split_whitespace().next()?.parse().ok()
    };
    let mut files: BTreeMap<(String, String), (u64, u64)> = BTreeMap::new();
    let mut file = None;
    for line in text.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        if let [range, _, _, device, inode, ..] = words[..]
            && range.contains('-')
        {
            file = Some((device.to_owned(), inode.to_owned()));
        } else if let Some(file) = &file {
            let (size, resident) = files.entry(file.clone()).or_default();
            *size += kib(line, "Size:").unwrap_or(0) * 1024;
            *resident += kib(line, "Rss:").unwrap_or(0) * 1024;
        }
    }
    let mut found = files.values().filter(|(size, _)| *size == size_bytes);
    match (found.next(), found.next()) {
        (Some((_, resident)), None) => Ok(*resident),
        _ => Err(format!("not one file of {size_bytes} bytes is mapped").into()),
    }
}

fn what_a_guest_gives_back_returns_to_the_host() -> Result<(), Failed> {
    // No other trial has so much.
    let ram_bytes = 520 * MIB;
    let builder = elastic("return")?.startup_bytes(ram_bytes);
    let (guest, mut shell) = Guest::boot(builder.maximum_bytes(ram_bytes + 1024 * MIB))?;
    let resident = || guest.vm.memory().map(|memory| memory.resident_bytes);
    // Below the start-up size: the host's own books beside ours. What is left of a huge page that was given back in part
    // leaves the page tables until it is touched, and costs memory all the same.
    let agree = || -> Result<u64, Failed> {
        let (mapped, counted) = (mapped_bytes(ram_bytes)?, resident()?);
        assert!(
            (counted.saturating_sub(64 * MIB)..=counted + 8 * MIB).contains(&mapped),
            "{mapped} bytes by the host's page tables, {counted} by ours"
        );
        Ok(mapped.max(counted))
    };
    fill(&mut shell, 296)?;
    let full = agree()?;
    assert!(full >= 296 * MIB, "{full} bytes hold 296 MiB");
    // Memory that the guest does not use any more is reported by it, 2 MiB at a time: what is less stays.
    shell.succeed("rm /load/file")?;
    wait_for(WITHIN, "free pages to be reported", || {
        let now = mapped_bytes(ram_bytes).ok()?.max(resident().ok()?);
        (now + 296 * MIB <= full + 24 * MIB).then_some(())
    })?;
    fill(&mut shell, 296)?;
    shell.succeed("rm /load/file")?;
    reach(&guest, 200 * MIB)?;
    let left = agree()?;
    assert!(left <= 200 * MIB + MIB, "{left} bytes for a guest of 200 MiB");

    // Above it.
    reach(&guest, ram_bytes + 512 * MIB)?;
    fill(&mut shell, 600)?;
    let full = resident()?;
    assert!(full >= 600 * MIB, "{full} bytes hold 600 MiB");
    shell.succeed("rm /load/file")?;
    wait_for(WITHIN, "free pages to be reported", || {
        resident().ok().filter(|now| *now + 600 * MIB <= full + 48 * MIB)
    })?;
    fill(&mut shell, 600)?;
    shell.succeed("rm /load/file")?;
    reach(&guest, ram_bytes)?;
    let left = agree()?;
    assert!(
        left <= ram_bytes && resident()? <= ram_bytes,
        "{left} bytes for the start-up size"
    );
    // The region above the start-up size is gone from the guest's address space, not only from its books.
    let inspect = guest.vm.inspect()?;
    assert_eq!(inspect["machine"]["runtime"]["live_slot_count"], 0, "{inspect:#}");
    assert_eq!(inspect["machine"]["runtime"]["resident_bytes"], 0, "{inspect:#}");
    Ok(())
}

/// What the host says that it has.
fn host_available() -> Result<u64, Failed> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let word = line.and_then(|rest| rest.split_whitespace().next());
    Ok(word.ok_or("the host tells")?.parse::<u64>()? * 1024)
}

/// Why a target is refused: what it needs, and what the host can promise.
fn unavailable(guest: &Guest, target_bytes: u64) -> Result<(u64, u64), Failed> {
    match guest.vm.resize_memory(target_bytes, patient()) {
        Err(ResizeError::Host {
            source:
                HostMemoryError::Unavailable {
                    need_bytes,
                    available_bytes,
                },
            ..
        }) => Ok((need_bytes, available_bytes)),
        other => Err(format!("{other:?} for {target_bytes} bytes").into()),
    }
}

fn a_vm_is_not_promised_what_the_host_does_not_have() -> Result<(), Failed> {
    let available = host_available()?;
    // Of 128 MiB each, as all that is plugged.
    let whole = |bytes: u64| bytes / (128 * MIB) * (128 * MIB);
    let too_much = 512 * MIB + whole(available + GIB);
    let memory = HostMemory::default();
    let modest = Guest::make_sharing(elastic("modest")?.maximum_bytes(too_much), memory.clone())?;
    let generous = elastic("generous")?.maximum_bytes(too_much).overcommit(true);
    let generous = Guest::make_sharing(generous, memory)?;
    for guest in [&modest, &generous] {
        done(guest.vm.start())?;
        guest.shell()?;
    }
    let (need, told) = unavailable(&modest, too_much)?;
    assert!(need > told, "{need} bytes needed, {told} there");
    let now = host_available()?;
    assert!(told.abs_diff(now) < GIB, "{told} bytes told, the host says {now}");
    // Who allows for over-commit gets it promised, though no host could keep that.
    let most = 512 * MIB + whole(available / 10 * 6);
    drop(generous.vm.resize_memory(too_much, patient())?);
    let accepted = generous.vm.resize_memory(most, patient())?;
    // What one was promised the other is not, as long as it is not given back.
    let (need, told) = unavailable(&modest, most)?;
    assert!(
        need > told && told + available / 2 < now,
        "{need} needed, {told} left of {now}"
    );
    let outcome = accepted.wait(WITHIN * 2).ok_or("it has not ended")?;
    assert_eq!(outcome.reason, MemoryReason::Complete, "{outcome}");
    reach(&generous, 512 * MIB)?;
    assert_eq!(reach(&modest, most)?.reached_bytes, most);
    Ok(())
}

/// A file system of 64 KiB, until it is dropped.
struct Small(tempfile::TempDir);

impl Small {
    fn mount() -> Result<Self, Failed> {
        let folder = tempfile::tempdir()?;
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=64k", "none"]);
        if !mount.arg(folder.path()).status()?.success() {
            return Err("the host mounts no tmpfs".into());
        }
        Ok(Self(folder))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(self.0.path()).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", self.0.path().display());
        }
    }
}

fn a_size_that_cannot_be_stored_is_told_and_stored_later() -> Result<(), Failed> {
    let small = Small::mount()?;
    let platform = Arc::new(KvmPlatform::new(TestHost::default()));
    let place = small.0.path().join("vm");
    let vm = Vm::create(&place, elastic("stored")?.build()?, platform.clone())?;
    let events = vm.events();
    let ballast = small.0.path().join("ballast");
    assert!(
        fs::write(&ballast, vec![1; 1 << 20]).is_err(),
        "the file system is full"
    );
    let resize = |target| {
        let outcome = vm.resize_memory(target, patient())?.wait(WITHIN);
        outcome.ok_or_else(|| Failed::from("it has not ended"))
    };
    assert_eq!(resize(GIB)?.reason, MemoryReason::NotStored);
    let told = std::iter::from_fn(|| events.next(WITHIN)).find_map(|event| match event.kind {
        EventKind::ConfigNotStored { reason } => Some(reason),
        _ => None,
    });
    assert!(
        told.as_ref()
            .is_some_and(|reason| reason.contains("No space left")),
        "{told:?}"
    );
    let memory = vm.memory()?;
    assert_eq!((memory.requested_bytes, memory.stored), (GIB, false));
    fs::remove_file(ballast)?;
    assert_eq!(resize(GIB)?.reason, MemoryReason::Stored);
    drop(vm);
    let vm = Vm::open(&place, platform)?;
    assert_eq!(vm.memory()?.requested_bytes, GIB);
    drop(vm);
    Ok(())
}

fn two_vms_are_not_promised_the_same_memory() -> Result<(), Failed> {
    let memory = HostMemory::limited_to(3 * GIB / 2 + 256 * MIB);
    let third = Guest::make_sharing(elastic("third")?.startup_bytes(GIB), memory.clone())?;
    let guests = [
        Guest::make_sharing(elastic("first")?, memory.clone())?,
        Guest::make_sharing(elastic("second")?, memory)?,
    ];
    for guest in &guests {
        done(guest.vm.start())?;
        guest.shell()?;
    }
    let refused = third.vm.start()?.wait(WITHIN).ok_or("the start goes on")?;
    let told = refused.to_string();
    assert!(told.contains("for all vms exceed the limit"), "{told}");
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
