//! Network cards that come and go while the guest runs, and their names: asked of the guest.
//!
//! The machine is driven directly, as the supervisor does it.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use libtest_mimic::Failed;
use vm_lifecycle::config::{NicConfig, NicSpec, VmConfig, VmConfigBuilder};
use vm_lifecycle::ids::NicName;
use vm_lifecycle::vm::Vm;
use vm_lifecycle::vm::host::KvmPlatform;
use vm_lifecycle::vm::platform::Mailbox;
use vm_lifecycle::vm::platform::{BuildError, Machine, Platform};

use crate::Body;
use crate::guest::{Guest, TestHost, WITHIN, done, small};
use crate::harness::guest_shell::GuestShell;
use crate::harness::tap::Tap;
use crate::harness::wait::wait_for;

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![
        Body::new(
            "hotplug::a_card_comes_with_its_name_and_goes",
            a_card_comes_with_its_name_and_goes,
        ),
        Body::new(
            "hotplug::a_card_taken_by_force_leaves_a_guest_that_works",
            a_card_taken_by_force_leaves_a_guest_that_works,
        ),
        Body::new("hotplug::names_arrive_byte_for_byte", names_arrive_byte_for_byte),
    ]
}

/// A platform that keeps hold of the machine it made.
#[derive(Clone)]
struct Watched {
    inner: Arc<KvmPlatform<TestHost>>,
    machine: Arc<Mutex<Option<Weak<dyn Machine>>>>,
}

impl Platform for Watched {
    fn check(&self, config: &VmConfig) -> Result<(), BuildError> {
        self.inner.check(config)
    }

    fn build(&self, config: &VmConfig, mailbox: Mailbox) -> Result<Arc<dyn Machine>, BuildError> {
        let machine = self.inner.build(config, mailbox)?;
        let mut place = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        *place = Some(Arc::downgrade(&machine));
        Ok(machine)
    }
}

/// A running guest with its machine.
fn boot(builder: VmConfigBuilder) -> Result<(Guest, GuestShell, Arc<dyn Machine>), Failed> {
    let host = TestHost::default();
    let platform = Watched {
        inner: Arc::new(KvmPlatform::new(host.clone())),
        machine: Arc::default(),
    };
    let vm = Vm::new(builder.build()?, Arc::new(platform.clone()))?;
    let events = vm.events();
    done(vm.start())?;
    let guest = Guest { vm, host, events };
    let shell = guest.host.shell()?;
    let place = platform.machine.lock().unwrap_or_else(PoisonError::into_inner);
    let machine = place
        .as_ref()
        .and_then(Weak::upgrade)
        .ok_or("there is no machine")?;
    Ok((guest, shell, machine))
}

fn new_card(guest: &Guest, spec: NicSpec) -> Result<NicConfig, Failed> {
    let config = guest.vm.config().with_nic(spec)?;
    Ok(config.nics().last().cloned().ok_or("there is a card")?)
}

/// The guest's directory of the PCI device.
fn sysfs(nic: &NicConfig) -> String {
    format!("/sys/bus/pci/devices/{}", nic.bdf)
}

/// The guest's slot with the device: Linux names it by `_SUN`.
fn slot(nic: &NicConfig) -> String {
    let number = u32::from(nic.bdf.segment()) * 32 + u32::from(nic.bdf.slot());
    format!("/sys/bus/pci/slots/{number}")
}

/// The name as the guest sees it, as hexadecimal digits.
fn label(shell: &mut GuestShell, nic: &NicConfig) -> Result<String, Failed> {
    Ok(shell.succeed(&format!(
        "head -n 1 {}/label | tr -d '\\n' | od -An -v -tx1 | tr -d ' \\n'",
        sysfs(nic)
    ))?)
}

fn hex(name: &str) -> String {
    name.bytes().map(|byte| format!("{byte:02x}")).collect()
}

fn a_card_comes_with_its_name_and_goes() -> Result<(), Failed> {
    let tap = Tap::create(Ipv4Addr::new(10, 213, 40, 1))?;
    let (guest, mut shell, machine) = boot(small("hotplug")?)?;
    assert_eq!(shell.succeed("ls /sys/class/net")?, "lo");
    for (bdf, by_guest) in [
        ("0000:00:1f.0", false),
        ("0003:00:1f.0", true),
        ("0000:00:1f.0", true),
    ] {
        let nic = new_card(&guest, NicSpec::new("lan", tap.name()).bdf(bdf.parse()?))?;
        machine.add_nic(&nic)?;
        machine.announce(&nic.unit_name());
        shell.wait_until("test -e /sys/class/net/eth0/address", WITHIN)?;
        assert_eq!(
            shell.succeed("cat /sys/class/net/eth0/device/../label")?,
            "lan",
            "{bdf}"
        );
        assert_eq!(shell.succeed(&format!("cat {}/acpi_index", sysfs(&nic)))?, "1");
        assert_eq!(
            shell.succeed("cat /sys/class/net/eth0/address")?,
            nic.mac.to_string()
        );
        shell.succeed("ip addr add 10.213.40.2/24 dev eth0 && ip link set eth0 up")?;
        shell.wait_until("ping -c 1 -W 1 10.213.40.1", WITHIN)?;
        if by_guest {
            shell.succeed(&format!("echo 0 >{}/power", slot(&nic)))?;
        } else {
            assert!(machine.request_eject(&nic.unit_name()), "there is a card");
        }
        shell.wait_until(&format!("test ! -e {}", sysfs(&nic)), WITHIN)?;
        // The configuration does not know the card, so the machine alone is asked.
        let ejected = || (!machine.request_eject(&nic.unit_name())).then_some(());
        wait_for(WITHIN, "the eject", ejected)?;
        assert!(machine.remove_device(&nic.unit_name()), "it is there until now");
        assert!(!machine.remove_device(&nic.unit_name()), "it is gone");
        assert_eq!(shell.succeed("ls /sys/class/net")?, "lo");
    }
    Ok(())
}

fn a_card_taken_by_force_leaves_a_guest_that_works() -> Result<(), Failed> {
    let tap = Tap::create(Ipv4Addr::new(10, 213, 43, 1))?;
    let (guest, mut shell, machine) = boot(small("force")?)?;
    let nic = new_card(&guest, NicSpec::new("lan", tap.name()))?;
    for round in 0..3 {
        machine.add_nic(&nic)?;
        machine.announce(&nic.unit_name());
        shell.wait_until("test -e /sys/class/net/eth0/address", WITHIN)?;
        shell.succeed("ip addr add 10.213.43.2/24 dev eth0 && ip link set eth0 up")?;
        shell.wait_until("ping -c 1 -W 1 10.213.43.1", WITHIN)?;
        assert!(machine.remove_device(&nic.unit_name()), "round {round}");
        // The tap is free at once, whatever the guest does.
        drop(tap.open()?);
        shell.wait_until(&format!("test ! -e {}", sysfs(&nic)), WITHIN)?;
        assert_eq!(shell.succeed("ls /sys/class/net")?, "lo", "round {round}");
    }
    Ok(())
}

fn names_arrive_byte_for_byte() -> Result<(), Failed> {
    let names = [
        "\"LAN\" 'b' \\ $x",
        "Büro-Übertragung ß",
        "機房網路",
        "🖧 link 👩‍💻",
        "𐍈\u{10FFFF}\u{FFFE}e\u{301}",
        &"x".repeat(64),
        &"é".repeat(32),
        &"🦀".repeat(16),
    ];
    let (tap, other) = (
        Tap::create(Ipv4Addr::new(10, 213, 41, 1))?,
        Tap::create(Ipv4Addr::new(10, 213, 42, 1))?,
    );
    let builder = small("labels")?.nic(NicSpec::new(names[0], tap.name()).acpi_index(16383));
    let (guest, mut shell, machine) = boot(builder)?;
    let nic = guest.vm.config().nics()[0].clone();
    assert_eq!(label(&mut shell, &nic)?, hex(names[0]), "at boot");
    assert_eq!(
        shell.succeed(&format!("cat {}/acpi_index", sysfs(&nic)))?,
        "16383"
    );
    for name in &names[1..] {
        machine.rename_nic(&nic.unit_name(), &NicName::new(*name)?);
        assert_eq!(label(&mut shell, &nic)?, hex(name), "after a rename to {name:?}");
    }
    let added = new_card(&guest, NicSpec::new(names[3], other.name()))?;
    machine.add_nic(&added)?;
    machine.announce(&added.unit_name());
    shell.wait_until(&format!("test -e {}/label", sysfs(&added)), WITHIN)?;
    assert_eq!(label(&mut shell, &added)?, hex(names[3]), "after hot-add");
    Ok(())
}
