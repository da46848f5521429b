//! A network card whose driver in the guest is busy when it is to let go: the host does not wait for it, and the guest
//! goes on from there when the driver does.
//!
//! What keeps it busy is the guest's own kernel. Whoever turns on a bridge's spanning tree has Linux run
//! `/sbin/bridge-stp` and wait for its end under the lock of all network interfaces (`net/bridge/br_stp_if.c`), which
//! `virtio_net` needs in its removal.

use std::net::Ipv4Addr;
use std::time::Duration;

use libtest_mimic::Failed;
use vm_lifecycle::config::NicSpec;
use vm_lifecycle::event::{EventKind, NicRemoval};
use vm_lifecycle::vm::nic::{NicState, RemoveNicOutcome};
use vm_lifecycle::vm::operation::Operation;

use crate::Body;
use crate::guest::{BOOT_WITHIN, Guest, WITHIN, small};
use crate::harness::guest_shell::GuestShell;
use crate::harness::tap::Tap;
use crate::nic::{add, ended, name, reached, remove};

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![Body::new(
        "nic_busy::a_card_whose_driver_is_busy_goes_late_comes_back_or_is_taken",
        a_card_whose_driver_is_busy,
    )]
}

/// Runs while the file `/busy` is there.
const HELPER: &str = r#"#!/bin/sh
/bin/touch /held
while [ -e /busy ]; do /bin/sleep 0.02; done
"#;

/// What turns on the spanning tree of the guest's bridge.
const SWITCH: &str = "/sys/class/net/br0/bridge/stp_state";

fn prepare(shell: &mut GuestShell) -> Result<(), Failed> {
    shell.succeed("while read -r file; do insmod /modules/$file || exit; done </modules/bridge.order")?;
    shell.succeed("ip link add br0 type bridge")?;
    shell.succeed(&format!(
        "printf '{}' >/sbin/bridge-stp; chmod 755 /sbin/bridge-stp",
        HELPER.replace('\n', "\\n")
    ))?;
    Ok(())
}

/// The guest's network drivers wait from now on.
fn make_busy(shell: &mut GuestShell) -> Result<(), Failed> {
    shell.succeed(&format!("echo 0 >{SWITCH} && rm -f /held && touch /busy"))?;
    shell.succeed(&format!("(echo 1 >{SWITCH}) >/dev/null 2>&1 &"))?;
    shell.wait_until("test -e /held", WITHIN)?;
    Ok(())
}

/// The driver has begun to let go of its card, and waits.
const WAITS: &str = "grep -qs unregister_netdev /proc/[0-9]*/stack";
const PING: &str = "ping -c 1 -W 1 10.213.93.1";

fn use_card(shell: &mut GuestShell) -> Result<(), Failed> {
    shell.wait_until("test -e /sys/class/net/eth0", WITHIN)?;
    shell.succeed("ip addr add 10.213.93.2/24 dev eth0 && ip link set eth0 up")?;
    shell.wait_until(PING, WITHIN)?;
    Ok(())
}

/// The next event that `pick` takes.
fn event<T>(guest: &Guest, what: &str, pick: impl Fn(&EventKind) -> Option<T>) -> Result<T, Failed> {
    while let Some(event) = guest.events.next(WITHIN) {
        if let Some(picked) = pick(&event.kind) {
            return Ok(picked);
        }
    }
    Err(format!("no {what}; {:#}", guest.vm.inspect()?["nics"]).into())
}

fn not_released(removal: &Operation<RemoveNicOutcome>) -> Result<(), Failed> {
    let outcome = ended(removal)?;
    assert!(
        matches!(outcome, RemoveNicOutcome::NotReleased { paused: false }),
        "{outcome}"
    );
    Ok(())
}

fn a_card_whose_driver_is_busy() -> Result<(), Failed> {
    let tap = Tap::create(Ipv4Addr::new(10, 213, 93, 1))?;
    let (guest, mut shell) = Guest::boot(small("busy")?.nic(NicSpec::new("lan", tap.name())))?;
    prepare(&mut shell)?;
    shell.succeed("dmesg -c >/dev/null")?;
    use_card(&mut shell)?;
    it_goes_late(&guest, &mut shell, &tap)?;
    it_comes_back(&guest, &mut shell)?;
    it_is_taken(&guest, &mut shell, &tap)?;
    shell.succeed("rm /busy")?;
    shell.wait_until("test ! -e /sys/class/net/eth0", WITHIN)?;
    add(&guest, NicSpec::new("lan", tap.name()))?;
    use_card(&mut shell)?;
    // The next card may be in its place before the guest has let go of this one.
    it_is_taken(&guest, &mut shell, &tap)?;
    let (_, addition) = guest.vm.add_nic(NicSpec::new("lan", tap.name()), BOOT_WITHIN)?;
    event(&guest, "card", |event| {
        matches!(event, EventKind::NicAttached { .. }).then_some(())
    })?;
    shell.succeed(&format!("{WAITS} && rm /busy"))?;
    reached(&addition)?;
    use_card(&mut shell)?;
    let crashed = shell.succeed("dmesg | grep -E -A20 'BUG|Oops|WARNING|Call Trace' || true")?;
    assert_eq!(crashed, "", "the guest's kernel is in trouble");
    remove(&guest, "lan")
}

/// Asked, and not obeyed in time: the card works on until the driver lets go of it.
fn it_goes_late(guest: &Guest, shell: &mut GuestShell, tap: &Tap) -> Result<(), Failed> {
    make_busy(shell)?;
    let removal = guest.vm.remove_nic(&name("lan")?, Duration::from_secs(2))?;
    shell.wait_until(WAITS, WITHIN)?;
    not_released(&removal)?;
    let nic = guest.vm.nics()?.remove(0);
    assert_eq!((nic.state, nic.driver_ready), (Some(NicState::DriverReady), true));
    assert_eq!(guest.vm.config().nics(), [nic.config]);
    shell.succeed("test -e /sys/class/net/eth0")?;
    shell.wait_until(PING, WITHIN)?;
    assert!(tap.open().is_err(), "the host has it still");
    shell.succeed(&format!("{WAITS} && rm /busy"))?;
    let how = event(guest, "end of the card", |event| match event {
        EventKind::NicRemoved { how, .. } => Some(*how),
        _ => None,
    })?;
    assert_eq!(how, NicRemoval::ReleasedLate);
    assert_eq!(guest.vm.config().nics(), []);
    shell.wait_until("test ! -e /sys/class/net/eth0", WITHIN)?;
    add(guest, NicSpec::new("lan", tap.name()))?;
    use_card(shell)
}

/// Asked, and withdrawn while the driver is at it: it lets go, and the guest has the card again.
fn it_comes_back(guest: &Guest, shell: &mut GuestShell) -> Result<(), Failed> {
    let number = "cat /sys/class/net/eth0/ifindex";
    let before = shell.succeed(number)?;
    make_busy(shell)?;
    not_released(&guest.vm.remove_nic(&name("lan")?, Duration::ZERO)?)?;
    shell.wait_until(WAITS, WITHIN)?;
    guest.vm.offer_nic(&name("lan")?)?;
    while guest.events.next(Duration::ZERO).is_some() {}
    shell.succeed(&format!("{WAITS} && rm /busy"))?;
    event(guest, "driver", |event| match event {
        EventKind::NicDriverReady { .. } => Some(Ok(())),
        EventKind::NicRemoved { .. } => Some(Err("the card is gone")),
        _ => None,
    })??;
    use_card(shell)?;
    assert_ne!(shell.succeed(number)?, before, "it is another interface");
    Ok(())
}

/// Asked, and taken by force while the driver is at it: the host has everything back at once.
fn it_is_taken(guest: &Guest, shell: &mut GuestShell, tap: &Tap) -> Result<(), Failed> {
    make_busy(shell)?;
    let removal = guest.vm.remove_nic(&name("lan")?, BOOT_WITHIN)?;
    shell.wait_until(WAITS, WITHIN)?;
    let force = guest.vm.force_remove_nic(&name("lan")?)?;
    let outcome = ended(&removal)?;
    assert!(matches!(outcome, RemoveNicOutcome::Overtaken), "{outcome}");
    let outcome = reached(&force)?;
    assert!(
        matches!(outcome, RemoveNicOutcome::Removed(NicRemoval::Forced)),
        "{outcome}"
    );
    drop(tap.open()?);
    assert_eq!(guest.vm.config().nics(), []);
    shell.succeed(&format!("{WAITS} && test -e /sys/class/net/eth0"))?;
    while guest.events.next(Duration::ZERO).is_some() {}
    Ok(())
}
