//! Guests that give or take less memory than asked: under load, short of memory, without drivers, deaf, slow.

use std::time::Duration;

use libtest_mimic::Failed;
use vm_lifecycle::event::{EventKind, EventStream};
use vm_lifecycle::vm::memory::{AtDeadline, MemoryReason, ResizeOptions};

use crate::Body;
use crate::guest::{CMDLINE, Guest, WITHIN, done};
use crate::harness::guest_shell::GuestShell;
use crate::harness::wait::wait_for;
use crate::memory::{GIB, MIB, agreed, elastic, meminfo_total, patient, reach, resize};

/// The memory device's place.
const MEM: &str = "/sys/bus/pci/devices/0000:00:03.0";

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![
        Body::new(
            "memory::a_guest_under_load_gives_what_it_can_and_loses_nothing",
            a_guest_under_load_gives_what_it_can,
        ),
        Body::new(
            "memory::a_guest_short_of_memory_empties_its_balloon_and_fills_it_when_asked_again",
            a_guest_short_of_memory_empties_its_balloon,
        ),
        Body::new(
            "memory::a_guest_without_drivers_is_told_as_such",
            a_guest_without_drivers_is_told_as_such,
        ),
        Body::new(
            "memory::a_driver_that_comes_anew_unplugs_everything_first",
            a_driver_that_comes_anew_unplugs_everything_first,
        ),
    ]
}

fn brief(seconds: u64, at_deadline: AtDeadline) -> ResizeOptions {
    ResizeOptions {
        within: Duration::from_secs(seconds),
        at_deadline,
    }
}

/// A command of the guest that writes so much of a repeated text, a multiple of 8 MiB. A pipe is slow for small pieces.
fn text(shell: &mut GuestShell, mib: u64) -> Result<String, Failed> {
    shell.succeed("[ -s /tmp/piece ] || yes | head -c 8388608 >/tmp/piece")?;
    Ok(format!("for i in $(seq {}); do cat /tmp/piece; done", mib / 8))
}

/// Fills a file in the guest's memory, a multiple of 8 MiB, with a repeated text.
pub fn fill(shell: &mut GuestShell, mib: u64) -> Result<(), Failed> {
    shell.succeed("mkdir -p /load && (mountpoint -q /load || mount -t tmpfs load /load)")?;
    shell.succeed(&format!("mount -o remount,size={}m /load", mib + 8))?;
    let text = text(shell, mib)?;
    shell.succeed(&format!("({text}) >/load/file"))?;
    Ok(())
}

/// Nobody was killed for memory, and the kernel is well.
fn no_harm(shell: &mut GuestShell) -> Result<(), Failed> {
    let complaints = shell.run("dmesg | grep -iE 'oom-kill|killed process|bug:'")?;
    assert_eq!(complaints.text, "");
    Ok(())
}

/// Waits until the guest has what it was asked for, though nobody waits for it.
fn settled(events: &EventStream) -> Result<u64, Failed> {
    let mut events = std::iter::from_fn(|| events.next(WITHIN));
    let reached = events.find_map(|event| match event.kind {
        EventKind::MemorySettled {
            reached_bytes,
            reason: "complete",
            ..
        } => Some(reached_bytes),
        _ => None,
    });
    reached.ok_or_else(|| "the guest does not get there".into())
}

/// Pieces of 64 KiB that [`HOLDER`] holds: four fifths of a guest of 768 MiB.
const PIECES: u64 = 9344;
/// A program that holds memory of which no two pages are the same, says so, and compares each when it is told to.
const HOLDER: &str = r#"
function piece(number, text) {
    text = sprintf("%08d", number)
    while (length(text) < 65536) text = text text
    return text
}
BEGIN {
    for (i = 0; i < pieces; i++) held[i] = piece(i)
    print "held" >"/tmp/held"
    close("/tmp/held")
    getline word <"/tmp/compare"
    for (i = 0; i < pieces; i++) if (held[i] != piece(i)) wrong++
    print i, wrong + 0 >"/tmp/said"
}
"#;

fn a_guest_under_load_gives_what_it_can() -> Result<(), Failed> {
    let (guest, mut shell) = Guest::boot(elastic("load")?.startup_bytes(256 * MIB).maximum_bytes(768 * MIB))?;
    let at_start = meminfo_total(&mut shell)?;
    reach(&guest, 768 * MIB)?;
    shell.succeed("mkfifo /tmp/held /tmp/compare /tmp/said")?;
    let started = format!("(awk -v pieces={PIECES} '{HOLDER}' >/dev/null 2>&1 &); read word </tmp/held");
    shell.succeed(&started)?;
    let outcome = resize(&guest, 256 * MIB, brief(15, AtDeadline::Keep))?;
    assert!(
        matches!(
            outcome.reason,
            MemoryReason::GuestRefused | MemoryReason::Deadline
        ),
        "{outcome}"
    );
    // Not less than it holds; what it gave is kept, and it is still asked for the rest.
    let holds = PIECES * 64 * 1024;
    assert!((holds..=768 * MIB).contains(&outcome.reached_bytes), "{outcome}");
    let memory = guest.vm.memory()?;
    assert_eq!(memory.requested_bytes, 256 * MIB);
    assert!(memory.assigned_bytes >= holds, "{memory:?}");
    let compared = shell.succeed("echo now >/tmp/compare; cat /tmp/said")?;
    assert_eq!(compared, format!("{PIECES} 0"), "the guest lost memory");
    // The program has ended: the same request comes to its end. Linux tries by itself too, but not within a minute.
    assert_eq!(reach(&guest, 256 * MIB)?.reached_bytes, 256 * MIB);
    agreed(&guest, &mut shell, at_start)?;
    no_harm(&mut shell)
}

fn a_guest_short_of_memory_empties_its_balloon() -> Result<(), Failed> {
    let (guest, mut shell) = Guest::boot(elastic("short")?.deflate_on_oom(true))?;
    reach(&guest, 200 * MIB)?;
    // More than it has free now. Linux empties the balloon by 1 MiB each time that it runs out.
    fill(&mut shell, 184)?;
    let sum = shell.succeed("md5sum </load/file")?;
    let memory = guest.vm.memory()?;
    assert!(memory.assigned_bytes > 200 * MIB, "{memory:?}");
    assert_eq!(memory.requested_bytes, 200 * MIB);
    let text = text(&mut shell, 184)?;
    assert_eq!(shell.succeed(&format!("({text}) | md5sum"))?, sum);
    let kills = shell.run("dmesg | grep -iE 'oom-kill|killed process'")?;
    assert_eq!(kills.text, "");
    // It does not fill the balloon again by itself, but when it is asked for the same again.
    shell.succeed("rm /load/file")?;
    assert_eq!(reach(&guest, 200 * MIB)?.reached_bytes, 200 * MIB);
    // Its total is no measure here: Linux counts a balloon that it may empty as its own memory.
    Ok(())
}

/// Whether the interrupts of the memory device are held back. Its driver then hears nothing.
fn deafen(shell: &mut GuestShell, deaf: bool) -> Result<(), Failed> {
    // The upper byte of MSI-X Message Control (PCI 3.0 §6.8.2.3): enabled, and masked as a whole.
    let control = if deaf { "\\300" } else { "\\200" };
    shell.succeed(&format!(
        "b() {{ od -An -tu1 -j$1 -N1 {MEM}/config | tr -d ' '; }}; p=$(b 52); \
         while [ $(b $p) != 17 ]; do p=$(b $((p + 1))); [ $p != 0 ] || exit 1; done; \
         printf '{control}' | dd of={MEM}/config bs=1 seek=$((p + 3)) conv=notrunc 2>/dev/null"
    ))?;
    Ok(())
}

fn a_guest_without_drivers_is_told_as_such() -> Result<(), Failed> {
    let cmdline = CMDLINE.replace("=all", "=virtio_pci,virtio_console");
    let cmdline = format!("{cmdline} memhp_default_state=online_movable");
    let (guest, mut shell) = Guest::boot(elastic("bare")?.cmdline(cmdline))?;
    let at_start = meminfo_total(&mut shell)?;
    // A guest that helps itself finds nothing where its memory will be, and costs the host nothing.
    let base = guest.vm.inspect()?["machine"]["runtime"]["base"].clone();
    let found = shell.succeed(&format!("devmem {base} 32 0x12345678; devmem {base} 32"))?;
    assert_eq!(found, "0xFFFFFFFF");
    let runtime = guest.vm.inspect()?["machine"]["runtime"].clone();
    assert_eq!(
        (&runtime["live_slot_count"], &runtime["resident_bytes"]),
        (&0.into(), &0.into())
    );
    for target in [GIB, 384 * MIB] {
        let outcome = resize(&guest, target, brief(3, AtDeadline::Withdraw))?;
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
    agreed(&guest, &mut shell, at_start)?;

    a_deaf_driver_is_not_an_absent_one(&guest, &mut shell)?;
    agreed(&guest, &mut shell, at_start)?;
    a_paused_guest_is_neither(&guest)?;
    // What the guest told is nothing that is known when its driver has gone.
    shell.succeed("rmmod virtio_balloon")?;
    let unknown = wait_for(WITHIN, "the guest's total to be unknown", || {
        guest
            .vm
            .memory()
            .ok()
            .filter(|memory| memory.guest_total_bytes.is_none())
    });
    unknown.map(drop).map_err(|error| error.to_string().into())
}

fn a_deaf_driver_is_not_an_absent_one(guest: &Guest, shell: &mut GuestShell) -> Result<(), Failed> {
    deafen(shell, true)?;
    let events = guest.vm.events();
    let deaf = resize(guest, 2 * GIB, brief(3, AtDeadline::Keep))?;
    assert_eq!(
        (deaf.reason, deaf.reached_bytes),
        (MemoryReason::GuestRefused, GIB)
    );
    deafen(shell, false)?;
    assert_eq!(settled(&events)?, 2 * GIB);
    Ok(())
}

/// A guest that stands still for its owner refuses nothing: it had too little time, and goes on when it may.
fn a_paused_guest_is_neither(guest: &Guest) -> Result<(), Failed> {
    done(guest.vm.pause())?;
    let events = guest.vm.events();
    let late = resize(guest, 4 * GIB, brief(1, AtDeadline::Keep))?;
    assert_eq!(
        (late.reason, late.reached_bytes),
        (MemoryReason::Deadline, 2 * GIB)
    );
    done(guest.vm.resume())?;
    assert_eq!(settled(&events)?, 4 * GIB);
    Ok(())
}

fn a_driver_that_comes_anew_unplugs_everything_first() -> Result<(), Failed> {
    // A guest that leaves what it is given offline, so that its driver can go.
    let (guest, mut shell) = Guest::boot(elastic("anew")?.cmdline(CMDLINE))?;
    let at_start = meminfo_total(&mut shell)?;
    let usable_mib = || -> Result<u64, Failed> {
        let usable = guest.vm.inspect()?["machine"]["units"]["mem"]["device"]["usable_bytes"].as_u64();
        Ok(usable.ok_or("the device tells")? / MIB)
    };
    let outcome = reach(&guest, GIB)?;
    assert!(
        outcome
            .guest_total_bytes
            .is_some_and(|total| total < at_start + 8 * MIB),
        "offline memory does not count: {outcome:?}"
    );
    // Half a memory block of Linux is left: its driver takes that out of use when it goes, but no whole ones, and then
    // does not come again.
    let kept = 576 * MIB;
    reach(&guest, kept)?;
    assert_eq!(usable_mib()?, 640, "it does not shrink while anything is plugged");
    shell.succeed("rmmod virtio_mem")?;
    assert_eq!(
        guest.vm.memory()?.assigned_bytes,
        kept,
        "the blocks may be in use, for all that is known"
    );
    shell.succeed("insmod /modules/$(tail -n 1 /modules/virtio_mem.order)")?;
    // UNPLUG ALL is what lets the usable part shrink (virtio 1.2 §5.15.6.3); then it plugs what is asked for.
    let begun = wait_for(WITHIN, "the new driver to begin anew", || {
        (usable_mib().ok()? == 256).then_some(())
    });
    if let Err(error) = begun {
        let words = shell.run("dmesg | grep virtio_mem")?.text;
        return Err(format!("{error}; its kernel says:\n{words}").into());
    }
    wait_for(WITHIN, "the new driver to plug", || {
        (guest.vm.memory().ok()?.assigned_bytes == kept).then_some(())
    })?;
    assert_eq!(reach(&guest, 512 * MIB)?.reached_bytes, 512 * MIB);
    // Linux takes no more than 1 GiB that nobody puts to use (its `offline_threshold`). It keeps what it has by then.
    drop(guest.vm.resize_memory(4 * GIB, patient())?);
    wait_for(WITHIN, "the guest to have enough", || {
        (guest.vm.memory().ok()?.assigned_bytes == 512 * MIB + GIB).then_some(())
    })?;
    let outcome = resize(&guest, 3 * GIB, brief(4, AtDeadline::Withdraw))?;
    assert_eq!(
        (outcome.reason, outcome.reached_bytes),
        (MemoryReason::GuestRefused, 512 * MIB + GIB)
    );
    assert_eq!(guest.vm.memory()?.requested_bytes, 512 * MIB + GIB);
    no_harm(&mut shell)
}
