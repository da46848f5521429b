//! How long a network card takes to come and to go, beside QEMU's `q35` in the same run, as ratios.
//!
//! Two guests with the same kernel run all the time and take turns: one of this crate, in this process, and one of
//! QEMU with ACPI hot-plug behind a PCI Express root port (`netdev_add`, `device_add`, `device_del`). Measured is from
//! the call until the guest has the interface, or has none any more; both guests look every 5 ms.

#[path = "../tests/kvm/guest.rs"]
#[allow(dead_code)]
mod guest;
#[path = "../tests/harness/mod.rs"]
mod harness;
mod report;

use std::error::Error;
use std::net::Ipv4Addr;
use std::time::Instant;

use vm_lifecycle::config::NicSpec;
use vm_lifecycle::event::NicRemoval;
use vm_lifecycle::ids::NicName;
use vm_lifecycle::vm::nic::{AddNicOutcome, RemoveNicOutcome};

use guest::{BOOT_WITHIN, CMDLINE, Guest, WITHIN, small};
use harness::artefacts::{Flavour, GuestKernel};
use harness::guest_shell::GuestShell;
use harness::kvm::{self, Verdict};
use harness::qemu::{QemuGuest, QemuOptions};
use harness::tap::Tap;

/// Seconds until a card is there, and until it is gone.
#[derive(Default)]
struct Samples {
    come: Vec<f64>,
    go: Vec<f64>,
}

fn main() -> Result<(), Box<dyn Error>> {
    if cfg!(debug_assertions) {
        return Err("a build for debugging says nothing about speed".into());
    }
    match kvm::verdict() {
        Verdict::Run => {}
        Verdict::Ignore(why) => {
            println!("not measured: {why}");
            return Ok(());
        }
        Verdict::Fail(why) => return Err(why.into()),
    }
    let (our_tap, qemu_tap) = (
        Tap::create(Ipv4Addr::new(10, 213, 44, 1))?,
        Tap::create(Ipv4Addr::new(10, 213, 45, 1))?,
    );
    let builder = small("hot-plug").map_err(failed)?;
    let (guest, mut our_shell) = Guest::boot(builder).map_err(failed)?;
    let (qemu, mut qemu_shell) = start_qemu()?;
    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    for round in 0..=report::rounds() {
        let ours_now = our_card(&guest, &mut our_shell, &our_tap)?;
        let theirs_now = qemu_card(&qemu, &mut qemu_shell, &qemu_tap)?;
        eprintln!("round {round}: ours {ours_now:?}, q35 {theirs_now:?}");
        if round > 0 {
            ours.add(ours_now);
            theirs.add(theirs_now);
        }
    }
    show(&ours, &theirs);
    Ok(())
}

fn failed(error: libtest_mimic::Failed) -> String {
    error.message().unwrap_or("it does not say why").to_owned()
}

fn start_qemu() -> Result<(QemuGuest, GuestShell), Box<dyn Error>> {
    let options = QemuOptions {
        cmdline: CMDLINE.to_string(),
        arguments: ["-device", "pcie-root-port,id=socket,slot=1"]
            .map(str::to_string)
            .to_vec(),
        ..QemuOptions::default()
    };
    let guest = QemuGuest::start(&GuestKernel::find(Flavour::Cloud)?, &options)?;
    match GuestShell::connect(guest.port()?, BOOT_WITHIN) {
        Ok(shell) => Ok((guest, shell)),
        Err(error) => Err(format!("{error}\n{}", guest.console()).into()),
    }
}

/// Does `call` while the guest waits for `until`, and tells the seconds from the call to the guest's answer.
fn timed(
    shell: &mut GuestShell,
    until: &str,
    call: impl FnOnce() -> Result<(), Box<dyn Error>>,
) -> Result<f64, Box<dyn Error>> {
    let id = shell.send(&format!("until {until}; do sleep 0.005; done"))?;
    let began = Instant::now();
    call()?;
    shell.answer(id, until, WITHIN)?;
    Ok(began.elapsed().as_secs_f64())
}

const THERE: &str = "test -e /sys/class/net/eth0";
const GONE: &str = "test ! -e /sys/class/net/eth0";

fn our_card(guest: &Guest, shell: &mut GuestShell, tap: &Tap) -> Result<(f64, f64), Box<dyn Error>> {
    let mut added = None;
    let come = timed(shell, THERE, || {
        added = Some(guest.vm.add_nic(NicSpec::new("card", tap.name()), WITHIN)?.1);
        Ok(())
    })?;
    let outcome = added.and_then(|operation| operation.wait(WITHIN));
    match outcome.ok_or("adding the card has no end")? {
        AddNicOutcome::DriverReady(_) => {}
        outcome => return Err(outcome.to_string().into()),
    }
    let mut removed = None;
    let go = timed(shell, GONE, || {
        removed = Some(guest.vm.remove_nic(&NicName::new("card")?, WITHIN)?);
        Ok(())
    })?;
    let outcome = removed.and_then(|operation| operation.wait(WITHIN));
    match outcome.ok_or("removing the card has no end")? {
        RemoveNicOutcome::Removed(NicRemoval::Released) => {}
        outcome => return Err(outcome.to_string().into()),
    }
    Ok((come, go))
}

fn qemu_card(qemu: &QemuGuest, shell: &mut GuestShell, tap: &Tap) -> Result<(f64, f64), Box<dyn Error>> {
    let come = timed(shell, THERE, || {
        let netdev = format!(
            "netdev_add tap,id=n,ifname={},script=no,downscript=no,vhost=off",
            tap.name()
        );
        qemu.command(&netdev)?;
        qemu.command("device_add virtio-net-pci,netdev=n,id=card,bus=socket,romfile=")?;
        Ok(())
    })?;
    let go = timed(shell, GONE, || {
        qemu.command("device_del card")?;
        Ok(())
    })?;
    // The device goes a moment after the guest has let go of it; its id is free then.
    harness::wait::wait_for(WITHIN, "qemu to let go of the card", || {
        let devices = qemu.command("info qtree").ok()?;
        (!devices.contains("id \"card\"")).then_some(())
    })?;
    qemu.command("netdev_del n")?;
    Ok((come, go))
}

impl Samples {
    fn add(&mut self, (come, go): (f64, f64)) {
        self.come.push(come);
        self.go.push(go);
    }
}

fn show(ours: &Samples, theirs: &Samples) {
    let titles = ["hot-plug, medians", "ours ms", "q35 ms", "ours to q35"];
    let mut rows = vec![titles.map(str::to_string).to_vec()];
    let pairs = [
        ("call to interface", &ours.come, &theirs.come),
        ("call to gone", &ours.go, &theirs.go),
    ];
    for (name, ours, theirs) in pairs {
        let (ours, theirs) = (report::median(ours), report::median(theirs));
        rows.push(vec![
            name.to_string(),
            format!("{:.1}", ours * 1e3),
            format!("{:.1}", theirs * 1e3),
            report::ratio(ours, theirs),
        ]);
    }
    report::print(&rows);
}
