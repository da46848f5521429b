//! Network cards added to and removed from a running VM by its user, as the guest and the host see it.

use std::net::Ipv4Addr;
use std::time::Duration;

use libtest_mimic::Failed;
use vm_lifecycle::config::{NICS_MAX, NicSpec};
use vm_lifecycle::event::{EventKind, NicRemoval};
use vm_lifecycle::ids::NicName;
use vm_lifecycle::state::State;
use vm_lifecycle::vm::nic::{AddNicOutcome, NicInfo, RemoveNicOutcome};
use vm_lifecycle::vm::operation::{Ended, Operation};

use crate::Body;
use crate::guest::{BOOT_WITHIN, Guest, WITHIN, done, small};
use crate::harness::guest_shell::GuestShell;
use crate::harness::tap::Tap;

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![
        Body::new(
            "nic::a_card_comes_carries_packets_and_goes",
            a_card_comes_carries_packets_and_goes,
        ),
        Body::new(
            "nic::sixty_four_cards_have_their_names_and_a_65th_is_refused",
            sixty_four_cards,
        ),
        Body::new(
            "nic::a_guest_that_ignores_hot_plug_is_told_of_and_may_obey_late",
            a_guest_that_ignores_hot_plug,
        ),
        Body::new(
            "nic::a_card_that_was_asked_for_goes_with_a_reset_and_with_the_end",
            a_card_that_was_asked_for_goes,
        ),
        Body::new(
            "nic::a_card_taken_by_force_under_traffic_harms_nobody",
            a_card_taken_by_force,
        ),
    ]
}

pub fn name(text: &str) -> Result<NicName, Failed> {
    Ok(NicName::new(text)?)
}

/// Waits for the end of an operation, which must have reached what was asked for.
pub fn reached<O: Ended>(operation: &Operation<O>) -> Result<O, Failed> {
    let outcome = ended(operation)?;
    if outcome.is_done() {
        Ok(outcome)
    } else {
        Err(format!("{operation:?}: {outcome}").into())
    }
}

/// Waits for the end of an operation, whatever it is.
pub fn ended<O: Ended>(operation: &Operation<O>) -> Result<O, Failed> {
    let outcome = operation.wait(BOOT_WITHIN);
    outcome.ok_or_else(|| format!("{operation:?} has not ended").into())
}

/// Adds a card and waits until the guest's driver has it.
pub fn add(guest: &Guest, spec: NicSpec) -> Result<NicInfo, Failed> {
    let (info, operation) = guest.vm.add_nic(spec, WITHIN)?;
    match reached(&operation)? {
        AddNicOutcome::DriverReady(_) => Ok(info),
        outcome => Err(format!("{outcome}").into()),
    }
}

/// Removes a card with the guest's help.
pub fn remove(guest: &Guest, text: &str) -> Result<(), Failed> {
    match reached(&guest.vm.remove_nic(&name(text)?, WITHIN)?)? {
        RemoveNicOutcome::Removed(NicRemoval::Released) => Ok(()),
        outcome => Err(format!("{outcome}").into()),
    }
}

/// The guest's directory of a card's PCI device.
fn sysfs(info: &NicInfo) -> String {
    format!("/sys/bus/pci/devices/{}", info.config.bdf)
}

/// What the `_STA` of a card's slot says in the guest, present or not.
fn status(shell: &mut GuestShell, info: &NicInfo) -> Result<String, Failed> {
    let bdf = info.config.bdf;
    let path = format!("\\_SB_.PC{:02X}.S{:02X}_", bdf.segment(), bdf.slot());
    let find = format!("grep -lxF '{path}' /sys/bus/acpi/devices/*/path");
    Ok(shell.succeed(&format!("cat $(dirname $({find}))/status"))?)
}

/// The events about cards so far, by their names in JSON.
fn told(guest: &Guest) -> Vec<String> {
    std::iter::from_fn(|| guest.events.next(Duration::ZERO))
        .filter_map(|event| {
            let value = serde_json::to_value(&event).ok()?;
            let text = value["event"].as_str()?.to_owned();
            text.starts_with("nic-").then_some(text)
        })
        .collect()
}

/// What the guest's kernel complains about; a card that is taken by surprise may be complained about.
pub fn complaints(shell: &mut GuestShell) -> Result<String, Failed> {
    Ok(shell.succeed("dmesg -r | grep -E '^<[0-3]>' || true")?)
}

fn a_card_comes_carries_packets_and_goes() -> Result<(), Failed> {
    let tap = Tap::create(Ipv4Addr::new(10, 213, 50, 1))?;
    let (guest, mut shell) = Guest::boot(small("hot")?)?;
    assert_eq!(shell.succeed("ls /sys/class/net")?, "lo");
    let before = complaints(&mut shell)?;
    let info = add(&guest, NicSpec::new("Fred", tap.name()))?;
    shell.wait_until("test -e /sys/class/net/eth0", WITHIN)?;
    let seen = format!(
        "cd {} && cat label acpi_index /sys/class/net/eth0/address",
        sysfs(&info)
    );
    let expected = format!("Fred\n1\n{}", info.config.mac);
    assert_eq!(shell.succeed(&seen)?, expected);
    assert_eq!(
        status(&mut shell, &info)?,
        "15",
        "present, enabled, shown, functioning"
    );
    shell.succeed("ip addr add 10.213.50.2/24 dev eth0 && ip link set eth0 up")?;
    shell.wait_until("ping -c 1 -W 1 10.213.50.1", WITHIN)?;

    reached(&guest.vm.set_nic_link(&name("Fred")?, false)?)?;
    shell.wait_until("test $(cat /sys/class/net/eth0/carrier) = 0", WITHIN)?;
    reached(&guest.vm.set_nic_link(&name("Fred")?, true)?)?;
    shell.wait_until("ping -c 1 -W 1 10.213.50.1", WITHIN)?;
    reached(&guest.vm.rename_nic(&name("Fred")?, &name("Freda 2")?)?)?;
    let after = format!("Freda 2\n1\n{}", info.config.mac);
    assert_eq!(shell.succeed(&seen)?, after, "without being plugged again");

    // A card that goes during a pause, beside one that cannot come: the guest does its part when it goes on.
    done(guest.vm.pause())?;
    let (_, added) = guest.vm.add_nic(NicSpec::new("second", "lo"), Duration::ZERO)?;
    let outcome = ended(&added)?.to_string();
    assert!(
        outcome.contains("the network card could not be added: "),
        "{outcome}"
    );
    let removed = guest.vm.remove_nic(&name("Freda 2")?, WITHIN)?;
    let error = guest.vm.remove_nic(&name("Freda 2")?, WITHIN).err();
    assert!(error.is_some_and(|error| error.to_string().ends_with("is being removed")));
    done(guest.vm.resume())?;
    reached(&removed)?;
    assert_eq!(shell.succeed("ls /sys/class/net")?, "lo");
    assert_eq!(status(&mut shell, &info)?, "0", "an empty slot");
    assert_eq!(guest.vm.config().nics(), []);
    let expected = [
        "nic-attached",
        "nic-driver-ready",
        "nic-link",
        "nic-link",
        "nic-renamed",
        "nic-eject-requested",
        "nic-removed",
    ];
    assert_eq!(told(&guest), expected);
    assert_eq!(complaints(&mut shell)?, before, "the guest's kernel complains");
    Ok(())
}

/// Names of 1 to 64 bytes of which no two are alike.
fn names() -> Vec<String> {
    let odd = [
        "x",
        "with spaces in it",
        "\"quoted\" 'twice'",
        "back\\slash\\\\",
        "Büro-Übertragung ß",
        "機房網路",
        "👩‍💻 🖧",
        "$HOME `id` %n *",
    ];
    let long = [
        "y".repeat(NicName::MAX_BYTES),
        "é".repeat(NicName::MAX_BYTES / 2),
        "🦀".repeat(NicName::MAX_BYTES / 4),
    ];
    let odd = odd.into_iter().map(str::to_owned).chain(long);
    let plain = (0..).map(|index| format!("card {index}"));
    odd.chain(plain).take(NICS_MAX).collect()
}

fn hex(text: &str) -> String {
    text.bytes().map(|byte| format!("{byte:02x}")).collect()
}

fn sixty_four_cards() -> Result<(), Failed> {
    let names = names();
    let taps = (0..64u8).map(|index| Tap::create(Ipv4Addr::new(10, 214, index, 1)));
    let taps: Vec<Tap> = taps.collect::<Result<_, _>>()?;
    let (guest, mut shell) = Guest::boot(small("full")?)?;
    let before = complaints(&mut shell)?;
    let mut cards = Vec::new();
    for (text, tap) in names.iter().zip(&taps) {
        cards.push(add(&guest, NicSpec::new(text, tap.name()))?);
    }
    let one_more = guest.vm.add_nic(NicSpec::new("one more", "tap"), WITHIN).err();
    assert_eq!(
        one_more.map(|error| error.to_string()).as_deref(),
        Some("network card one more is one too many: a vm can have 64")
    );
    assert_eq!(shell.succeed("ls /sys/class/net | grep -vx lo | wc -l")?, "64");
    let all = "for card in /sys/class/net/eth*; do \
               d=$(readlink -f $card/device/..); echo $(basename $d) \
               $(cat $d/acpi_index) \
               $(head -n 1 $d/label | tr -d '\\n' | od -An -v -tx1 | tr -d ' \\n'); done | sort";
    let mut expected: Vec<String> = cards
        .iter()
        .map(|NicInfo { config, .. }| {
            let index = config.acpi_index.unwrap_or_default();
            format!("{} {index} {}", config.bdf, hex(config.name.as_str()))
        })
        .collect();
    expected.sort();
    assert_eq!(shell.succeed(all)?.lines().collect::<Vec<_>>(), expected);

    // All go, at once.
    let removals = names
        .iter()
        .map(|text| Ok(guest.vm.remove_nic(&name(text)?, BOOT_WITHIN)?));
    let removals: Vec<_> = removals.collect::<Result<_, Failed>>()?;
    for removal in &removals {
        reached(removal)?;
    }
    assert_eq!(shell.succeed("ls /sys/class/net")?, "lo");
    let again = add(&guest, NicSpec::new("again", taps[0].name()))?;
    assert_eq!(
        again.config.bdf, cards[0].config.bdf,
        "the first slot is used again"
    );
    shell.wait_until("test -e /sys/class/net/eth0", WITHIN)?;
    for index in [1, 30, 31, 62, 63] {
        let spec = NicSpec::new(format!("again {index}"), taps[index].name());
        let card = add(&guest, spec.bdf(cards[index].config.bdf))?;
        let label = format!("cat {}/label", sysfs(&card));
        assert_eq!(shell.wait_until(&label, WITHIN)?, format!("again {index}"));
    }
    assert_eq!(complaints(&mut shell)?, before, "the guest's kernel complains");
    Ok(())
}

/// The device by which the guest's kernel hears of hot-plug.
const GED: &str = "/sys/bus/platform/drivers/acpi-ged";

/// Makes the guest's kernel deaf to hot-plug; returns the name of the device for [`listen`].
pub fn stop_listening(shell: &mut GuestShell) -> Result<String, Failed> {
    let device = shell.succeed(&format!("basename {GED}/ACPI0013:*"))?;
    shell.succeed(&format!("echo {device} >{GED}/unbind"))?;
    Ok(device)
}

fn listen(shell: &mut GuestShell, device: &str) -> Result<(), Failed> {
    shell.succeed(&format!("echo {device} >{GED}/bind"))?;
    Ok(())
}

fn a_guest_that_ignores_hot_plug() -> Result<(), Failed> {
    let tap = Tap::create(Ipv4Addr::new(10, 213, 51, 1))?;
    let other = Tap::create(Ipv4Addr::new(10, 213, 52, 1))?;
    let (guest, mut shell) = Guest::boot(small("deaf")?.nic(NicSpec::new("lan", tap.name())))?;
    shell.succeed("ip addr add 10.213.51.2/24 dev eth0 && ip link set eth0 up")?;
    let device = stop_listening(&mut shell)?;

    let removal = guest.vm.remove_nic(&name("lan")?, Duration::ZERO)?;
    let outcome = ended(&removal)?;
    assert!(
        matches!(outcome, RemoveNicOutcome::NotReleased { paused: false }),
        "{outcome}"
    );
    shell.wait_until("ping -c 1 -W 1 10.213.51.1", WITHIN)?;
    let spec = NicSpec::new("new", other.name());
    let (_, addition) = guest.vm.add_nic(spec, Duration::ZERO)?;
    let outcome = ended(&addition)?;
    assert!(
        matches!(outcome, AddNicOutcome::NoDriver { paused: false }),
        "{outcome}"
    );
    assert_eq!(shell.succeed("ls /sys/class/net | grep -c eth")?, "1");

    // It hears of both when it listens again: late, and the events say so.
    listen(&mut shell, &device)?;
    let (mut gone, mut ready) = (None, false);
    while gone.is_none() || !ready {
        let event = guest
            .events
            .next(WITHIN)
            .ok_or("the guest does not do its part")?;
        match event.kind {
            EventKind::NicRemoved { name, how } => gone = Some((name.to_string(), how)),
            EventKind::NicDriverReady { name } if name.as_str() == "new" => ready = true,
            _ => {}
        }
    }
    assert_eq!(gone, Some(("lan".to_owned(), NicRemoval::ReleasedLate)));
    let names: Vec<_> = guest
        .vm
        .config()
        .nics()
        .iter()
        .map(|nic| nic.name.to_string())
        .collect();
    assert_eq!(names, ["new"]);
    shell.wait_until("test $(ls /sys/class/net | grep -c eth) = 1", WITHIN)?;
    Ok(())
}

fn a_card_that_was_asked_for_goes() -> Result<(), Failed> {
    let taps = [
        Tap::create(Ipv4Addr::new(10, 213, 53, 1))?,
        Tap::create(Ipv4Addr::new(10, 213, 54, 1))?,
    ];
    let builder = small("asked")?
        .nic(NicSpec::new("first", taps[0].name()))
        .nic(NicSpec::new("second", taps[1].name()));
    let (guest, mut shell) = Guest::boot(builder)?;
    stop_listening(&mut shell)?;
    let removal = guest.vm.remove_nic(&name("first")?, BOOT_WITHIN)?;
    done(guest.vm.reset())?;
    let outcome = ended(&removal)?;
    assert!(
        matches!(outcome, RemoveNicOutcome::Removed(NicRemoval::Reset)),
        "{outcome}"
    );
    // The port is as it was before the reset; a late answer is the new guest's.
    let left = shell.run_within("cat /sys/class/net/eth*/device/../label", BOOT_WITHIN)?;
    assert_eq!(left.text.trim(), "second");
    stop_listening(&mut shell)?;
    let removal = guest.vm.remove_nic(&name("second")?, BOOT_WITHIN)?;
    done(guest.vm.power_off())?;
    let outcome = ended(&removal)?;
    assert!(
        matches!(outcome, RemoveNicOutcome::Removed(NicRemoval::GuestEnded)),
        "{outcome}"
    );
    assert_eq!(
        (guest.vm.state(), guest.vm.config().nics()),
        (State::Off, &[][..])
    );
    Ok(())
}

fn a_card_taken_by_force() -> Result<(), Failed> {
    let tap = Tap::create(Ipv4Addr::new(10, 213, 55, 1))?;
    let (guest, mut shell) = Guest::boot(small("force")?.nic(NicSpec::new("lan", tap.name())))?;
    // What the kernel said at its boot is not about cards.
    shell.succeed("dmesg -c >/dev/null")?;
    for round in 0..3 {
        shell.wait_until("test -e /sys/class/net/eth0", WITHIN)?;
        shell.succeed("ip addr add 10.213.55.2/24 dev eth0 && ip link set eth0 up")?;
        shell.wait_until("ping -c 1 -W 1 10.213.55.1", WITHIN)?;
        shell.succeed(
            "(yes | nc -u 10.213.55.1 9 >/dev/null 2>&1) & ping -A -q 10.213.55.1 >/dev/null 2>&1 &",
        )?;
        let sent = "cat /sys/class/net/eth0/statistics/tx_packets";
        let count: u64 = shell.succeed(sent)?.parse()?;
        shell.wait_until(&format!("test $({sent}) -gt {}", count + 100), WITHIN)?;
        let outcome = reached(&guest.vm.force_remove_nic(&name("lan")?)?)?;
        assert!(
            matches!(outcome, RemoveNicOutcome::Removed(NicRemoval::Forced)),
            "{outcome}"
        );
        shell.wait_until("test ! -e /sys/class/net/eth0", WITHIN)?;
        assert_eq!(shell.succeed("ls /sys/class/net")?, "lo", "round {round}");
        add(&guest, NicSpec::new("lan", tap.name()))?;
    }
    let crashed = shell.succeed("dmesg | grep -E -A20 'BUG|Oops|WARNING|Call Trace' || true")?;
    assert_eq!(crashed, "", "the guest's kernel is in trouble");
    remove(&guest, "lan")
}
