//! The files of `docs/guest/` in a real Debian: its interfaces are called what the host called the cards.

use std::net::Ipv4Addr;
use std::process::Command;

use libtest_mimic::Failed;
use vm_lifecycle::config::{DiskSpec, NicConfig, NicSpec};

use crate::Body;
use crate::guest::{BOOT_WITHIN, Guest, WITHIN, small};
use crate::harness::artefacts;
use crate::harness::base64;
use crate::harness::guest_shell::GuestShell;
use crate::harness::tap::Tap;
use crate::nic::{add, name, reached};

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![Body::new(
        "labels::a_debian_guest_calls_its_interfaces_what_the_host_does",
        a_debian_guest_calls_its_interfaces,
    )]
}

const SCRIPT: &str = include_str!("../../docs/guest/nic-label");
const RULE: &str = include_str!("../../docs/guest/76-nic-label.rules");
const LINK: &str = include_str!("../../docs/guest/70-nic-label.link");

fn install(shell: &mut GuestShell, path: &str, text: &str) -> Result<(), Failed> {
    let text = base64::encode(text.as_bytes());
    shell.succeed(&format!(
        "mkdir -p $(dirname {path}) && echo {text} | base64 -d >{path}"
    ))?;
    Ok(())
}

/// What udev knows of the interface with this address.
fn properties(shell: &mut GuestShell, mac: &str) -> Result<String, Failed> {
    let find = format!("basename $(dirname $(grep -lx {mac} /sys/class/net/*/address))");
    shell.wait_until(&find, WITHIN)?;
    shell.succeed("udevadm settle")?;
    Ok(shell.succeed(&format!(
        "i=$({find}); udevadm info -q property /sys/class/net/$i; ip -o link show dev $i"
    ))?)
}

fn a_debian_guest_calls_its_interfaces() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("debian.img");
    let copied = Command::new("cp")
        .arg("--sparse=always")
        .arg(artefacts::debian_image()?)
        .arg(&disk)
        .status()?;
    assert!(copied.success(), "the guest's disk cannot be copied");
    let taps = (0..5u8).map(|index| Tap::create(Ipv4Addr::new(10, 213, 70 + index, 1)));
    let taps: Vec<Tap> = taps.collect::<Result<_, _>>()?;
    let builder = small("debian")?
        .cmdline("console=ttyS0 quiet panic=-1 harness.root=/dev/vda")
        .startup_bytes(512 << 20)
        .disk(DiskSpec::new("root", &disk))
        .nic(NicSpec::new("at boot", taps[0].name()));
    let (guest, mut shell) = Guest::boot(builder)?;
    shell.run_within("systemctl is-system-running --wait", BOOT_WITHIN)?;

    // Without the files udev knows the name, and calls the interface by its index.
    let mac = guest.vm.config().nics()[0].mac.to_string();
    let told = properties(&mut shell, &mac)?;
    for expected in [
        "ID_NET_LABEL_ONBOARD=at boot",
        "ID_NET_NAME_ONBOARD=eno1",
        "INTERFACE=eno1",
    ] {
        assert!(told.contains(expected), "no {expected} in\n{told}");
    }
    install(&mut shell, "/usr/local/lib/nic-label", SCRIPT)?;
    shell.succeed("chmod 755 /usr/local/lib/nic-label")?;
    install(&mut shell, "/etc/udev/rules.d/76-nic-label.rules", RULE)?;
    install(&mut shell, "/etc/systemd/network/70-nic-label.link", LINK)?;
    shell.succeed("udevadm control --reload")?;

    let cases = [
        ("Fred", "INTERFACE=Fred"),
        ("the red one", "INTERFACE=the_red_one"),
        ("a-name-of-more-than-15-bytes", "INTERFACE=eno4"),
        ("Büro", "INTERFACE=eno5"),
    ];
    for ((label, expected), tap) in cases.iter().zip(&taps[1..]) {
        let info = add(&guest, NicSpec::new(*label, tap.name()))?;
        let told = properties(&mut shell, &info.config.mac.to_string())?;
        let onboard = format!("ID_NET_LABEL_ONBOARD={label}");
        assert!(told.contains(&onboard), "no {onboard} in\n{told}");
        assert!(told.contains(expected), "no {expected} in\n{told}");
        let has_long_name = told.contains("altname a-name-of-more-than-15-bytes");
        assert_eq!(has_long_name, label.len() > 15, "{told}");
    }

    rename_while_it_is_up(&guest, &mut shell)?;
    names_that_are_taken(&guest, &mut shell)
}

fn rename_while_it_is_up(guest: &Guest, shell: &mut GuestShell) -> Result<(), Failed> {
    // A card that is renamed is called its new name when udev looks again and the interface is down.
    let look = |interface: &str| {
        format!("udevadm trigger --action=add /sys/class/net/{interface} && udevadm settle")
    };
    shell.succeed("ip link set Fred up")?;
    reached(&guest.vm.rename_nic(&name("Fred")?, &name("Freda")?)?)?;
    shell.succeed(&look("Fred"))?;
    assert_eq!(
        shell.succeed("ls /sys/class/net | grep Fred")?,
        "Fred",
        "it is up"
    );
    shell.succeed(&format!("ip link set Fred down && {}", look("Fred")))?;
    shell.succeed("ip link set Freda up")?;
    Ok(())
}

/// Two labels that become the same name, and one that is the kernel's to give: each card is udev's all the same, which
/// knows its label, and works.
fn names_that_are_taken(guest: &Guest, shell: &mut GuestShell) -> Result<(), Failed> {
    let taps = (0..3u8).map(|index| Tap::create(Ipv4Addr::new(10, 213, 75 + index, 1)));
    let taps: Vec<Tap> = taps.collect::<Result<_, _>>()?;
    let cases = [("web lan", "web_lan"), ("web/lan", "eno7"), ("eth0", "eno8")];
    let mut cards = Vec::new();
    for ((label, interface), tap) in cases.into_iter().zip(&taps) {
        let config = add(guest, NicSpec::new(label, tap.name()))?.config;
        is_called(shell, &config, interface)?;
        cards.push((config, interface));
    }
    // The same, whichever of them udev meets first, as at a boot.
    let drive = |card: &NicConfig, how: &str| {
        format!(
            "cd /sys/bus/virtio/drivers/virtio_net && \
             basename /sys/bus/pci/devices/{}/virtio* >{how} && udevadm settle",
            card.bdf
        )
    };
    for (card, _) in &cards {
        shell.succeed(&drive(card, "unbind"))?;
    }
    for (card, interface) in cards.iter().rev() {
        shell.succeed(&drive(card, "bind"))?;
        is_called(shell, card, interface)?;
    }
    for ((_, interface), tap) in cards.iter().zip(&taps) {
        let [a, b, c, _] = tap.address().octets();
        shell.succeed(&format!(
            "ip addr add {a}.{b}.{c}.2/24 dev {interface} && ip link set {interface} up"
        ))?;
        shell.wait_until(
            &format!("ping -c 1 -W 1 -I {interface} {}", tap.address()),
            WITHIN,
        )?;
    }
    Ok(())
}

fn is_called(shell: &mut GuestShell, card: &NicConfig, interface: &str) -> Result<(), Failed> {
    let told = properties(shell, &card.mac.to_string())?;
    for expected in [
        format!("INTERFACE={interface}"),
        format!("ID_NET_NAME={interface}"),
        format!("ID_NET_LABEL_ONBOARD={}", card.name),
    ] {
        assert!(
            told.lines().any(|line| line == expected),
            "no {expected} in\n{told}"
        );
    }
    assert!(!told.contains("ID_RENAMING"), "udev gave up on it:\n{told}");
    let label = shell.succeed(&format!("cat /sys/class/net/{interface}/device/../label"))?;
    assert_eq!(label, card.name.as_str());
    Ok(())
}
