//! A guest that drives the memory device and the balloon by hand and asks for what is not its own.
//!
//! Its rings lie in RAM that its kernel was told to leave alone, and a few shell functions stand in for the drivers:
//! `begin` is the initialization of virtio 1.2 §3.1.1, `offer` puts one chain into the ring and waits until it is used.

use libtest_mimic::Failed;
use vm_lifecycle::event::EventKind;
use vm_lifecycle::state::State;
use vm_lifecycle::vm::memory::{AtDeadline, MemoryReason, ResizeOptions};

use crate::Body;
use crate::guest::{CMDLINE, Guest, WITHIN, small};
use crate::harness::guest_shell::GuestShell;
use crate::memory::MIB;

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![Body::new(
        "memory::forged_requests_give_no_memory_and_take_none",
        forged_requests_give_no_memory_and_take_none,
    )]
}

/// Where the rings are; the megabyte is kept out of the kernel's sight by its command line.
const PLACE: &str = "memmap=1M$0x08000000";
/// Register offsets of virtio 1.2 §4.1.4.3, and the parts of BAR 0 by the device's capabilities.
const DRIVER: &str = r#"
place=$((0x08000000))
w() { devmem $(($1)) $2 $(printf 0x%x $(($3))); }
r() { echo $(($(devmem $(($1)) $2))); }
begin() {
    d=/sys/bus/pci/devices/$1
    [ -e $d/driver ] && echo $1 >$d/driver/unbind
    printf '\006' | dd of=$d/config bs=1 seek=4 conv=notrunc 2>/dev/null
    bar=$(head -n 1 $d/resource | cut -d ' ' -f 1)
    for status in 0 1 3; do w bar+20 8 $status; done
    w bar+8 32 0; w bar+12 32 0; w bar+8 32 1; w bar+12 32 1
    w bar+20 8 11
    for a in 0x1000 0x2000; do w place+$a 32 0; done
    w bar+22 16 0; w bar+24 16 8
    for at in 32:0 40:0x1000 48:0x2000; do w bar+${at%:*} 32 place+${at#*:}; w bar+${at%:*}+4 32 0; done
    w bar+28 16 1; w bar+20 8 15
    used=0
}
part() { w place+$1*16 64 $2; w place+$1*16+8 32 $3; w place+$1*16+12 16 $4; w place+$1*16+14 16 $1+1; }
offer() {
    w place+0x1004+used%8*2 16 0
    used=$((used + 1)); w place+0x1002 16 used; w bar+0x3000 16 0
    until [ $(r place+0x2002 16) = $used ]; do
        [ $(($(r bar+20 8) & 64)) = 64 ] && { echo needs-reset; return; }
    done
}
request() {
    w place+0x3000 64 $1; w place+0x3008 64 $2; w place+0x3010 64 $3; w place+0x3100 64 0xFF
    part 0 place+0x3000 24 1; part 1 place+0x3100 10 2
    offer; r place+0x3100 16
}
"#;
/// The requests and responses of virtio 1.2 §5.15.6.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: &str = "0";
const NACK: &str = "1";
const ERROR: &str = "3";

const MEM: &str = "0000:00:03.0";
const BALLOON: &str = "0000:00:04.0";
const STARTUP: u64 = 256 * MIB;

/// A guest whose kernel has no driver for the devices; its shell knows [`DRIVER`].
fn bare(name: &str) -> Result<(Guest, GuestShell), Failed> {
    let cmdline = CMDLINE.replace("=all", "=virtio_pci,virtio_console");
    let builder = small(name)?
        .cmdline(format!("{cmdline} {PLACE} iomem=relaxed"))
        .maximum_bytes(1024 * MIB);
    let (guest, mut shell) = Guest::boot(builder)?;
    learn(&mut shell)?;
    Ok((guest, shell))
}

fn learn(shell: &mut GuestShell) -> Result<(), Failed> {
    shell.succeed(&format!(
        "[ -e /dev/mem ] || mknod /dev/mem c 1 1; cat >/driver <<'END'\n{DRIVER}\nEND"
    ))?;
    Ok(())
}

fn assigned(guest: &Guest) -> Result<u64, Failed> {
    Ok(guest.vm.memory()?.assigned_bytes)
}

fn forged_requests_give_no_memory_and_take_none() -> Result<(), Failed> {
    let (guest, mut shell) = bare("forger")?;
    let (neighbour, mut neighbours_shell) = Guest::boot(small("neighbour")?)?;
    forge_plugs(&guest, &mut shell)?;
    forge_inflations(&guest, &mut shell)?;
    // It, its neighbour and this process live on, and both get what they are given.
    assert_eq!(neighbours_shell.succeed("echo alive")?, "alive");
    assert_eq!(
        (guest.vm.state(), neighbour.vm.state()),
        (State::Running, State::Running)
    );
    Ok(())
}

fn forge_plugs(guest: &Guest, shell: &mut GuestShell) -> Result<(), Failed> {
    let base = guest.vm.inspect()?["machine"]["runtime"]["base"].clone();
    let base = base.as_u64().ok_or("the region has a place")?;
    shell.succeed(&format!(
        ". /driver; begin {MEM}; echo bar=$bar used=$used >/state"
    ))?;
    let mut ask = |kind: u16, address: u64, count: u64| {
        shell.succeed(&format!(
            ". /driver; . /state; request {kind} {address:#x} {count}; echo bar=$bar used=$used >/state"
        ))
    };
    // What was not offered: none of the region is of use yet.
    assert_eq!(ask(PLUG, base, 1)?, ERROR);
    assert_eq!(assigned(guest)?, STARTUP);
    let options = ResizeOptions {
        within: 20 * WITHIN,
        at_deadline: AtDeadline::Keep,
    };
    let operation = guest.vm.resize_memory(STARTUP + 128 * MIB, options)?;
    assert_eq!(ask(PLUG, base, 2)?, ACK);
    let offered = STARTUP + 4 * MIB;
    assert_eq!(assigned(guest)?, offered);
    // What is plugged already or in part, what nobody has, what is RAM, and what goes round the end of all addresses.
    for (address, count) in [
        (base, 1),
        (base + 2 * MIB, 2),
        (base + 1024 * MIB, 1),
        (base - 2 * MIB, 2),
        (base + 4 * MIB + 4096, 1),
        (base + 4 * MIB, 0),
        (0, 1),
        (0x0fe0_0000, 1),
        (u64::MAX - 2 * MIB + 1, 2),
    ] {
        assert_eq!(
            ask(PLUG, address, count)?,
            ERROR,
            "{count} blocks at {address:#x}"
        );
        assert_eq!(assigned(guest)?, offered);
    }
    // More than the rest of what is offered.
    for count in [63, 64, 300, 65_535] {
        let answer = ask(PLUG, base + 4 * MIB, count)?;
        assert!(
            [NACK, ERROR].contains(&answer.as_str()),
            "{answer} to {count} blocks"
        );
        assert_eq!(assigned(guest)?, offered);
    }
    assert_eq!(ask(UNPLUG, base + 4 * MIB, 1)?, ERROR);
    assert_eq!(ask(STATE, base, 2)?, ACK);
    assert_eq!(ask(77, base, 1)?, ERROR);
    assert_eq!(ask(PLUG, base + 4 * MIB, 62)?, ACK);
    let outcome = operation.wait(WITHIN).ok_or("it has not ended")?;
    assert_eq!(outcome.reason, MemoryReason::Complete, "{outcome}");
    assert_eq!(ask(UNPLUG_ALL, 0, 0)?, ACK);
    assert_eq!(assigned(guest)?, STARTUP);
    // A ring whose chain ends before its response.
    let told = shell.succeed(". /driver; . /state; part 0 place+0x3000 8 0; offer")?;
    assert_eq!(told, "needs-reset");
    assert!(needs_reset(guest, "mem"), "the host is told");
    Ok(())
}

fn forge_inflations(guest: &Guest, shell: &mut GuestShell) -> Result<(), Failed> {
    shell.succeed(&format!(
        ". /driver; begin {BALLOON}; echo bar=$bar used=$used >/state"
    ))?;
    let inflate = |shell: &mut GuestShell, pages: &[u64]| {
        let list = pages.iter().map(u64::to_string).collect::<Vec<_>>().join(" ");
        shell.succeed(&format!(
            ". /driver; . /state; n=0; for page in {list}; do w place+0x3000+n*4 32 page; n=$((n + 1)); done; \
             part 0 place+0x3000 n*4 0; offer; echo bar=$bar used=$used >/state"
        ))
    };
    let base = guest.vm.inspect()?["machine"]["runtime"]["base"].clone();
    let base = base.as_u64().ok_or("the region has a place")?;
    // Registers, the region that virtio-mem rules, what is behind all, and nothing at all.
    let foreign = [
        0xFEA0_0000,
        0xC000_0000,
        0xE000_0000,
        base,
        base + 512 * MIB,
        4096 * 4096 * 4096,
    ];
    let foreign: Vec<u64> = foreign
        .iter()
        .map(|address| address / 4096)
        .chain([0xFFFF_FFFF])
        .collect();
    inflate(shell, &foreign)?;
    assert_eq!(assigned(guest)?, STARTUP);
    // A page of its own counts once, however often it is given.
    shell.succeed("devmem 0x08080000 64 0x1234")?;
    inflate(shell, &[0x8080, 0x8080, 0x8080])?;
    inflate(shell, &[0x8080])?;
    assert_eq!(assigned(guest)?, STARTUP - 4096);
    assert_eq!(shell.succeed("devmem 0x08080000 64")?, "0x0000000000000000");
    // A list that is not whole page numbers.
    let told = shell.succeed(". /driver; . /state; part 0 place+0x3000 7 0; offer; true")?;
    assert_eq!(told, "needs-reset");
    assert!(needs_reset(guest, "balloon"), "the host is told");
    Ok(())
}

/// Whether a device of this name has asked for a reset since this was asked last.
fn needs_reset(guest: &Guest, unit: &str) -> bool {
    let mut events = std::iter::from_fn(|| guest.events.next(WITHIN));
    events.any(|event| matches!(event.kind, EventKind::DeviceNeedsReset { unit: ref named, .. } if named.as_str() == unit))
}
