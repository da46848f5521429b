//! A second network card for a guest that runs.

use std::net::Ipv4Addr;
use std::time::Duration;

use libtest_mimic::Failed;
use vm_lifecycle::config::NicSpec;
use vm_lifecycle::ids::NicName;
use vm_lifecycle::vm::nic::{AddNicOutcome, NicInfo};

use crate::guest::WITHIN;
use crate::harness::tap::Tap;
use crate::report::Report;
use crate::tour::Tour;

/// The host's address on the second network.
const HOST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 213, 91, 1);

/// Adds a card named Fred, lets the guest tell of it, uses it, gives it another name and takes it away.
pub fn run(tour: &mut Tour, report: &mut Report) -> Result<(), Failed> {
    let tap = Tap::create(HOST_ADDRESS)?;
    report.say(format!(
        "While the guest runs, it gets a second network card, which its owner calls Fred. The card is plugged into\n\
         another network of the host, `{}`. The operation ends when a driver in the guest has the card.",
        tap.name()
    ));
    let (guest, shell) = tour.shell()?;
    let (info, added) = guest.vm.add_nic(NicSpec::new("Fred", tap.name()), WITHIN)?;
    let outcome = added.wait(WITHIN + WITHIN).ok_or("it never ends")?;
    let is_ready = matches!(outcome, AddNicOutcome::DriverReady(_));
    report.check("adding it", "driver ready", &outcome, is_ready);
    shell.wait_until("test -e /sys/class/net/eth1", WITHIN)?;
    let said = shell.succeed(&label(&info))?;
    report.equal("what the guest calls it", "Fred".to_owned(), said);
    let said = shell.succeed("cat /sys/class/net/eth1/address")?;
    report.equal("its address in the guest", info.config.mac.to_string(), said);

    shell.succeed("ip addr add 10.213.91.2/24 dev eth1 && ip link set eth1 up")?;
    let said = shell.run(&format!("ping -c 3 -W 10 {HOST_ADDRESS}"))?.text;
    let answers = said.lines().filter(|line| line.contains(" bytes from ")).count();
    report.equal("answers from the host through Fred", 3, answers);

    report.say(
        "Its owner calls it Freda from now on. The guest sees that without the card being plugged again.",
    );
    let (fred, freda) = (NicName::new("Fred")?, NicName::new("Freda")?);
    let renamed = guest.vm.rename_nic(&fred, &freda)?.wait(WITHIN);
    let is_done = renamed.is_some_and(|outcome| outcome.is_done());
    report.check(
        "renaming it",
        "done",
        if is_done { "done" } else { "not done" },
        is_done,
    );
    let said = shell.succeed(&label(&info))?;
    report.equal("what the guest calls it now", "Freda".to_owned(), said);

    report.say("The guest is asked to let go of it, and the card is taken away.");
    let outcome = guest.vm.remove_nic(&freda, WITHIN)?.wait(WITHIN + WITHIN);
    let outcome = outcome.ok_or("it never ends")?.to_string();
    report.equal(
        "removing it",
        "removed: the guest let go of it".to_owned(),
        outcome,
    );
    let said = shell.succeed("ls /sys/class/net | tr '\\n' ' '")?;
    report.equal("the guest's interfaces", "eth0 lo".to_owned(), said);
    report.equal("network cards of the VM", 1, guest.vm.config().nics().len());
    let told = std::iter::from_fn(|| guest.events.next(Duration::ZERO)).count();
    report.say(format!("{told} events have told of all that."));
    Ok(())
}

/// The command by which the guest reads a card's name.
fn label(info: &NicInfo) -> String {
    format!("cat /sys/bus/pci/devices/{}/label", info.config.bdf)
}
