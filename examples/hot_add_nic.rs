//! Adds a network card to a running guest, gives it another name, and takes it away again.
//!
//! ```text
//! cargo run --example hot_add_nic -- KERNEL INITRD TAP
//! ```
//! The guest needs a driver for virtio network cards, loaded or built in.

use std::sync::Arc;
use std::time::Duration;

use vm_lifecycle::config::{NicSpec, VmConfig};
use vm_lifecycle::event::EventKind;
use vm_lifecycle::ids::NicName;
use vm_lifecycle::vm::Vm;
use vm_lifecycle::vm::host::{DefaultHost, KvmPlatform};
use vm_lifecycle::vm::nic::{AddNicOutcome, RemoveNicOutcome};

const WITHIN: Duration = Duration::from_secs(300);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let usage = "usage: hot_add_nic KERNEL INITRD TAP";
    let mut words = std::env::args().skip(1);
    let config = VmConfig::builder("hot-add", words.next().ok_or(usage)?)
        .initrd(words.next().ok_or(usage)?)
        .cmdline("quiet panic=-1")
        .startup_bytes(256 << 20)
        .build()?;
    let tap = words.next().ok_or(usage)?;
    let vm = Vm::new(config, Arc::new(KvmPlatform::new(DefaultHost)))?;
    let events = vm.events();
    let started = vm.start()?.wait(WITHIN).ok_or("the start takes too long")?;
    assert!(started.is_done(), "{started}");

    // The guest may still be booting: it finds the card when it looks, and the operation waits for its driver.
    let (card, operation) = vm.add_nic(NicSpec::new("Fred", tap), WITHIN)?;
    println!("Fred has {} at {}", card.config.mac, card.config.bdf);
    match operation.wait(WITHIN + WITHIN).ok_or("the host takes too long")? {
        AddNicOutcome::DriverReady(_) => println!("a driver in the guest has it"),
        outcome => return Err(outcome.to_string().into()),
    }

    // The guest's `/sys/bus/pci/devices/…/label` says the new name as soon as it is read again.
    let (fred, freda) = (NicName::new("Fred")?, NicName::new("Freda")?);
    let renamed = vm.rename_nic(&fred, &freda)?.wait(WITHIN).ok_or("no answer")?;
    assert!(renamed.is_done(), "{renamed}");

    match vm
        .remove_nic(&freda, WITHIN)?
        .wait(WITHIN + WITHIN)
        .ok_or("no answer")?
    {
        RemoveNicOutcome::Removed(how) => println!("it is gone: {}", how.as_str()),
        // It is still there and works: try later, or take it by force.
        RemoveNicOutcome::NotReleased { .. } => {
            let forced = vm.force_remove_nic(&freda)?.wait(WITHIN).ok_or("no answer")?;
            println!("the guest did not let go of it: {forced}");
        }
        outcome => return Err(outcome.to_string().into()),
    }
    assert!(vm.config().nics().is_empty(), "the configuration follows");
    drop(vm);
    while let Some(event) = events.next(WITHIN) {
        if let EventKind::NicAttached { .. } | EventKind::NicRemoved { .. } = event.kind {
            println!("{event:?}");
        }
    }
    Ok(())
}
