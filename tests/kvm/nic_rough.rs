//! Network cards in rough hands: of owners who ask twice, force and add at once, and of guests that eject what they
//! were not asked for, look everywhere all the time and write nonsense into the hot-plug registers.
//!
//! Boots are dear: each guest goes through many checks.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use vm_lifecycle::config::{DiskSpec, NicSpec};
use vm_lifecycle::event::{EventKind, NicRemoval};
use vm_lifecycle::guest_log;
use vm_lifecycle::state::State;
use vm_lifecycle::vm::NicRequestError;
use vm_lifecycle::vm::nic::{AddNicOutcome, NicInfo, NicState, RemoveNicOutcome};

use crate::Body;
use crate::guest::{BOOT_WITHIN, Guest, WITHIN, done, small};
use crate::harness::guest_shell::GuestShell;
use crate::harness::tap::Tap;
use crate::log_lines;
use crate::nic::{add, complaints, ended, name, reached, remove, stop_listening};

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![
        Body::new(
            "nic_rough::a_guest_keeps_up_with_an_owner_in_a_hurry",
            an_owner_in_a_hurry,
        ),
        Body::new(
            "nic_rough::nonsense_in_the_hot_plug_registers_harms_nobody_else",
            nonsense_in_the_registers,
        ),
    ]
}

const CARD: &str = "test -e /sys/class/net/eth0";
const NO_CARD: &str = "test $(ls /sys/class/net | grep -c eth) = 0";

/// The guest's switch of a card's slot: Linux names slots by `_SUN`.
fn switch(info: &NicInfo) -> String {
    let bdf = info.config.bdf;
    let number = u32::from(bdf.segment()) * 32 + u32::from(bdf.slot());
    format!("/sys/bus/pci/slots/{number}/power")
}

fn wait_for(guest: &Guest, what: &str, is: impl Fn(&EventKind) -> bool) -> Result<(), Failed> {
    while let Some(event) = guest.events.next(WITHIN) {
        if is(&event.kind) {
            return Ok(());
        }
    }
    Err(format!("no {what}; {:#}", guest.vm.inspect()?["nics"]).into())
}

fn an_owner_in_a_hurry() -> Result<(), Failed> {
    let tap = Tap::create(Ipv4Addr::new(10, 213, 80, 1))?;
    let pairs = Tap::create_multi_queue(Ipv4Addr::new(10, 213, 81, 1))?;
    let (guest, mut shell) = Guest::boot(small("hurry")?)?;
    shell.succeed("dmesg -c >/dev/null")?;
    force_while_the_driver_begins(&guest, &mut shell, &pairs)?;
    ask_force_and_add(&guest, &mut shell, &tap)?;
    let info = let_go_unasked(&guest, &mut shell)?;
    add_in_a_pause(&guest, &mut shell, &tap)?;
    force_with_many_queues(&guest, &mut shell, &pairs)?;
    look_all_the_time(&guest, &mut shell, &tap)?;
    assert_eq!(guest.vm.config().nics(), []);
    drop(info);
    no_crash(&mut shell)
}

fn no_crash(shell: &mut GuestShell) -> Result<(), Failed> {
    let crashed = shell.succeed("dmesg | grep -E -A20 'BUG|Oops|WARNING|Call Trace' || true")?;
    assert_eq!(crashed, "", "the guest's kernel is in trouble");
    Ok(())
}

/// Taken by force at any moment of the driver's first steps, in which it also sends a command and waits for the answer
/// without sleeping: whatever it was at, the guest goes on. With nobody at the card's addresses Linux 6.1 took all ones
/// for the wish to announce the card and crashed, or waited for ever.
fn force_while_the_driver_begins(guest: &Guest, shell: &mut GuestShell, pairs: &Tap) -> Result<(), Failed> {
    let spec = || NicSpec::new("wide", pairs.name()).queue_pairs(2);
    for round in 0..100 {
        let (info, addition) = guest.vm.add_nic(spec(), WITHIN)?;
        wait_for(guest, "card", |event| {
            matches!(event, EventKind::NicAttached { .. })
        })?;
        // The driver begins some 20 ms later and is done after 70, in the emulated host.
        drop(addition.wait(Duration::from_micros(10_000 + round * 2777 % 90_000)));
        drop(reached(&guest.vm.force_remove_nic(&info.config.name)?)?);
    }
    add(guest, spec())?;
    shell.wait_until(CARD, WITHIN)?;
    remove(guest, "wide")?;
    no_crash(shell)?;
    // Its driver complains of every card that went from under it, and is right.
    shell.succeed("dmesg -c >/dev/null")?;
    Ok(())
}

/// Asked, not waited for, taken by force and there again: the guest is told of the first request and of the force, and
/// answers the second when the next card is in the slot.
fn ask_force_and_add(guest: &Guest, shell: &mut GuestShell, tap: &Tap) -> Result<(), Failed> {
    let mut info = add(guest, NicSpec::new("lan", tap.name()))?;
    for round in 0..20 {
        let asked = guest.vm.remove_nic(&name("lan")?, Duration::ZERO)?;
        let outcome = ended(&asked)?;
        let released = matches!(outcome, RemoveNicOutcome::Removed(_));
        if round % 4 == 1 && !released {
            // Twice asked.
            drop(guest.vm.remove_nic(&name("lan")?, Duration::ZERO));
        }
        match guest.vm.force_remove_nic(&name("lan")?) {
            Ok(forced) => drop(reached(&forced)?),
            // It went by itself, just now.
            Err(NicRequestError::Config(_)) => {}
            Err(error) => return Err(format!("round {round}: {error}").into()),
        }
        info = add(guest, NicSpec::new("lan", tap.name()))?;
        shell.wait_until(CARD, WITHIN)?;
    }
    // What is left of earlier requests has been answered when a later one is.
    let seen = shell.succeed("ls /sys/class/net | grep -c eth")?;
    assert_eq!(seen, "1");
    let listed = guest.vm.nics()?;
    assert_eq!(
        listed.iter().map(|nic| nic.state).collect::<Vec<_>>(),
        [Some(NicState::DriverReady)],
        "{info:?}"
    );
    shell.succeed("ip addr add 10.213.80.2/24 dev eth0 && ip link set eth0 up")?;
    shell.wait_until("ping -c 1 -W 1 10.213.80.1", WITHIN)?;
    Ok(())
}

/// The guest switches the slot off by itself.
fn let_go_unasked(guest: &Guest, shell: &mut GuestShell) -> Result<NicInfo, Failed> {
    let info = guest.vm.nics()?.remove(0);
    for _ in 0..3 {
        shell.succeed(&format!("echo 0 >{}", switch(&info)))?;
        wait_for(guest, "word of it", |event| {
            matches!(event, EventKind::NicReleasedByGuest { .. })
        })?;
        assert_eq!(guest.vm.nics()?[0].state, Some(NicState::Released));
        shell.succeed(NO_CARD)?;
        guest.vm.offer_nic(&name("lan")?)?;
        wait_for(guest, "a driver", |event| {
            matches!(event, EventKind::NicDriverReady { .. })
        })?;
        shell.wait_until(CARD, WITHIN)?;
    }
    Ok(info)
}

/// What is asked for in a pause is done behind it, and a name on its way out is taken.
fn add_in_a_pause(guest: &Guest, shell: &mut GuestShell, tap: &Tap) -> Result<(), Failed> {
    let other = Tap::create(Ipv4Addr::new(10, 213, 82, 1))?;
    done(guest.vm.pause())?;
    let removal = guest.vm.remove_nic(&name("lan")?, WITHIN)?;
    let busy = guest.vm.add_nic(NicSpec::new("lan", tap.name()), WITHIN).err();
    let expected = NicRequestError::BeingRemoved { name: name("lan")? };
    assert_eq!(busy, Some(expected));
    let (_, addition) = guest.vm.add_nic(NicSpec::new("second", other.name()), WITHIN)?;
    done(guest.vm.resume())?;
    reached(&removal)?;
    let outcome = reached(&addition)?;
    assert!(matches!(outcome, AddNicOutcome::DriverReady(_)), "{outcome}");
    shell.wait_until("test $(ls /sys/class/net | grep -c eth) = 1", WITHIN)?;
    remove(guest, "second")?;
    shell.succeed(NO_CARD)?;
    Ok(())
}

fn force_with_many_queues(guest: &Guest, shell: &mut GuestShell, tap: &Tap) -> Result<(), Failed> {
    for _ in 0..2 {
        add(guest, NicSpec::new("wide", tap.name()).queue_pairs(2))?;
        shell.wait_until(CARD, WITHIN)?;
        shell.succeed("ip addr add 10.213.81.2/24 dev eth0 && ip link set eth0 up")?;
        shell.wait_until("ping -c 1 -W 1 10.213.81.1", WITHIN)?;
        shell.succeed("ping -A -q 10.213.81.1 >/dev/null 2>&1 & true")?;
        reached(&guest.vm.force_remove_nic(&name("wide")?)?)?;
        shell.wait_until(NO_CARD, WITHIN)?;
    }
    Ok(())
}

/// A guest that looks at every slot without being told meets no card that is half there.
fn look_all_the_time(guest: &Guest, shell: &mut GuestShell, tap: &Tap) -> Result<(), Failed> {
    shell.succeed("touch /looking; (while [ -e /looking ]; do echo 1 >/sys/bus/pci/rescan; done) >/dev/null 2>&1 & true")?;
    for _ in 0..10 {
        let info = add(guest, NicSpec::new("lan", tap.name()))?;
        let label = format!("cat /sys/bus/pci/devices/{}/label", info.config.bdf);
        assert_eq!(shell.wait_until(&label, WITHIN)?, "lan");
        remove(guest, "lan")?;
    }
    shell.succeed("rm /looking")?;
    let complaints = complaints(shell)?;
    assert_eq!(complaints, "", "the guest's kernel complains");
    Ok(())
}

/// Writes to the eject register that are about nobody, or about what cannot be ejected: the host bridge, the entropy
/// device, the console, the disk, empty slots, segments that do not exist.
const NOBODYS: &str = "0 1 2 8 11 31 63 95 126 127 128 160 65545 2147483648 4294967295";

/// Ejects of nothing are worth a line each, but not hundreds of lines.
fn a_flood_of_nonsense_fills_no_log(shell: &mut GuestShell) -> Result<(), Failed> {
    let (before, began) = (log_lines::count("pci-hotplug"), Instant::now());
    shell.succeed("for i in $(seq 400); do devmem 0xfea01040 32 77; done")?;
    let lines = log_lines::count("pci-hotplug") - before;
    let windows = began.elapsed().as_secs() / guest_log::WINDOW.as_secs() + 2;
    // Other guests of this process may be told of too.
    let most = u64::from(guest_log::BURST_COUNT) * windows + 100;
    assert!(lines <= most, "{lines} lines for 400 mistakes of the guest");
    // The guest made its first mistakes before: without a line of them nobody counts.
    assert!(before > 0, "the library's lines do not come here");
    Ok(())
}

fn nonsense_in_the_registers() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk.img");
    std::fs::write(&path, vec![7; 1 << 20])?;
    let taps = [
        Tap::create(Ipv4Addr::new(10, 213, 83, 1))?,
        Tap::create(Ipv4Addr::new(10, 213, 84, 1))?,
    ];
    let builder = small("nonsense")?
        .disk(DiskSpec::new("data", &path))
        .nic(NicSpec::new("first", taps[0].name()))
        .nic(NicSpec::new("second", taps[1].name()));
    let (guest, mut shell) = Guest::boot(builder)?;
    shell.succeed("mknod /dev/mem c 1 1; ip addr add 10.213.83.2/24 dev eth0 && ip link set eth0 up")?;
    let before = shell.succeed("ls /sys/bus/pci/devices")?;
    shell.succeed(&format!(
        "for n in {NOBODYS}; do devmem 0xfea01040 32 $n; devmem 0xfea01044 32 $n; \
         for w in 8 16 32 64; do devmem 0xfea01048 $w >/dev/null; devmem 0xfea01050 $w >/dev/null; done; done"
    ))?;
    a_flood_of_nonsense_fills_no_log(&mut shell)?;
    // Everything but ejects, at every offset: the slots of the cards are 9 and 10.
    shell.succeed(
        "for o in $(seq 0 4 60) $(seq 68 4 220) 4092; do for w in 8 16 32 64; do \
         devmem $((0xfea01000 + o)) $w $(od -An -N1 -tu1 /dev/urandom) 2>/dev/null; \
         devmem $((0xfea01000 + o)) $w >/dev/null 2>&1; done; done; true",
    )?;
    shell.wait_until("ping -c 1 -W 1 10.213.83.1", WITHIN)?;
    assert_eq!(
        shell.succeed("head -c 1048576 /dev/vda | tr -d '\\007' | wc -c")?,
        "0"
    );
    assert_eq!(shell.succeed("ls /sys/bus/pci/devices")?, before);
    let states = |guest: &Guest| -> Result<Vec<_>, Failed> {
        Ok(guest.vm.nics()?.iter().map(|nic| nic.state).collect())
    };
    assert_eq!(states(&guest)?, [Some(NicState::DriverReady); 2]);

    // One that nobody asked for is the guest's own affair, and one that was asked for goes with the guest's reset.
    let second = guest.vm.nics()?.remove(1);
    let number = u32::from(second.config.bdf.slot());
    shell.succeed(&format!(
        "devmem 0xfea01040 32 {number}; devmem 0xfea01040 32 {number}"
    ))?;
    wait_for(
        &guest,
        "word of it",
        |event| matches!(event, EventKind::NicReleasedByGuest { name } if name.as_str() == "second"),
    )?;
    stop_listening(&mut shell)?;
    let removal = guest.vm.remove_nic(&name("first")?, BOOT_WITHIN)?;
    shell.send("reboot -f")?;
    let outcome = ended(&removal)?;
    assert!(
        matches!(outcome, RemoveNicOutcome::Removed(NicRemoval::Reset)),
        "{outcome}"
    );
    let left = shell.run_within("cat /sys/class/net/eth*/device/../label", BOOT_WITHIN)?;
    assert_eq!(left.text.trim(), "second", "it is there again");
    assert_eq!(guest.vm.state(), State::Running);
    remove(&guest, "second")
}
