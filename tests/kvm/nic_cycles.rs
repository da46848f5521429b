//! A network card that is added and removed hundreds of times in one VM: nothing of it stays, in the guest or here.

use std::net::Ipv4Addr;
use std::process::Command;

use libtest_mimic::Failed;
use vm_lifecycle::config::NicSpec;

use crate::Body;
use crate::guest::{Guest, WITHIN, small};
use crate::harness::resources::Usage;
use crate::harness::tap::Tap;
use crate::harness::wait::wait_for;
use crate::nic::{add, complaints, remove};

/// How often the card comes and goes.
const CYCLE_COUNT: usize = 300;
const NAME: &str = "nic_cycles::three_hundred_cycles_leave_nothing_behind";
/// Set in the process that runs the cycles alone, so that what is counted is only theirs.
const ALONE: &str = "VM_LIFECYCLE_TRIAL_ALONE";

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![Body::new(NAME, three_hundred_cycles)]
}

fn three_hundred_cycles() -> Result<(), Failed> {
    if std::env::var_os(ALONE).is_some() {
        return cycles();
    }
    let output = Command::new(std::env::current_exe()?)
        .args([NAME, "--exact"])
        .env(ALONE, "1")
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
    .into())
}

/// What this process and the machine hold: descriptors (taps, irqfds), threads, slots; and what is the kernel's and the
/// bus's, as [`registrations`] tells.
fn holdings(guest: &Guest) -> Result<(u64, u64, usize, [u64; 3]), Failed> {
    let (usage, told) = (Usage::of_self()?, guest.vm.inspect()?);
    let slots = told["machine"]["units"]["pci-hotplug"]["slots"].as_array();
    let slot_count = slots.ok_or("the hot-plug registers tell of slots")?.len();
    Ok((
        usage.fd_count,
        usage.thread_count,
        slot_count,
        registrations(guest)?,
    ))
}

/// Interrupts, ioeventfds, which hold no descriptor of their own, and ranges of the bus.
fn registrations(guest: &Guest) -> Result<[u64; 3], Failed> {
    let machine = guest.vm.inspect()?["machine"].take();
    let count = |what: &str| machine[what].as_u64().ok_or(format!("no {what} in {machine}"));
    Ok([
        count("msi_count")?,
        count("ioevent_count")?,
        count("mmio_range_count")?,
    ])
}

fn cycles() -> Result<(), Failed> {
    let tap = Tap::create(Ipv4Addr::new(10, 213, 56, 1))?;
    let (guest, mut shell) = Guest::boot(small("cycles")?)?;
    let said = complaints(&mut shell)?;
    // The first card makes what all later ones share.
    add(&guest, NicSpec::new("card", tap.name()))?;
    remove(&guest, "card")?;
    let before = holdings(&guest)?;
    let (mut first_bdf, mut first_registrations) = (None, None);
    for cycle in 0..CYCLE_COUNT {
        let info = add(&guest, NicSpec::new("card", tap.name()))?;
        assert_eq!(
            *first_bdf.get_or_insert(info.config.bdf),
            info.config.bdf,
            "cycle {cycle}"
        );
        if cycle % 2 == 0 {
            shell.wait_until("test -e /sys/class/net/eth0", WITHIN)?;
            shell.succeed("ip addr add 10.213.56.2/24 dev eth0 && ip link set eth0 up")?;
            shell.wait_until("ping -c 1 -W 1 10.213.56.1", WITHIN)?;
            // A card without its ioeventfds works too, only slower.
            let now = registrations(&guest)?;
            assert_eq!(*first_registrations.get_or_insert(now), now, "cycle {cycle}");
            assert_eq!(now[1], before.3[1] + 2, "ioeventfds of one pair of queues");
            shell.succeed("ping -A -q 10.213.56.1 >/dev/null 2>&1 & true")?;
        }
        // It goes in the middle of the traffic.
        remove(&guest, "card")?;
        if cycle % 2 == 0 {
            shell.succeed("killall -q ping; true")?;
        }
        // The tap has one queue, and nobody else holds it.
        drop(
            tap.open()
                .map_err(|error| format!("after cycle {cycle}: {error}"))?,
        );
    }
    // A worker that has reported is joined a moment later.
    let after = wait_for(WITHIN, "what the cards held to be given back", || {
        holdings(&guest).ok().filter(|after| *after == before)
    });
    if after.is_err() {
        assert_eq!(holdings(&guest)?, before, "something is left behind");
    }
    assert_eq!(shell.succeed("ls /sys/class/net")?, "lo");
    assert_eq!(complaints(&mut shell)?, said, "the guest's kernel complains");
    Ok(())
}
