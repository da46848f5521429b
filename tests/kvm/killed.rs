//! A VM whose process is killed, with the power failing or not, when the guest has a new card that is not stored yet.
//!
//! The state directory lies on a volume that hangs: the configuration is being written for as long as that. The guest
//! looks for cards by itself, over and over, and tells on its console what it finds.

use std::fs;
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use libtest_mimic::Failed;
use serde_json::Value;

use crate::Body;
use crate::guest::{BOOT_WITHIN, WITHIN};
use crate::harness::tap::Tap;
use crate::harness::wait::wait_for;
use crate::vmm::{Places, Vmm};
use crate::volume::{Mounted, Volume};

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![Body::new(
        "killed::a_card_that_was_not_stored_is_not_there_and_can_be_added_again",
        killed_before_a_card_is_stored,
    )]
}

const FIRST: &str = "52:54:00:00:00:01";
const SECOND: &str = "52:54:00:00:00:02";

/// Waits until the guest has exactly these cards.
fn wait_for_cards(console: &str, cards: &[&str]) -> Result<(), Failed> {
    let last = || -> Option<String> {
        let text = fs::read_to_string(console).ok()?;
        let mut found = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("GUEST-SEES "));
        found.next_back().map(str::to_owned)
    };
    let expected = cards.join(" ");
    let seen = wait_for(BOOT_WITHIN, &expected, || (last()? == expected).then_some(()));
    seen.map_err(|error| format!("{error}; the guest sees {:?}", last()).into())
}

/// Whether the thread of the process that stores the configuration waits for a disk.
fn waits_for_a_disk(process: u32) -> Option<()> {
    let threads = fs::read_dir(format!("/proc/{process}/task")).ok()?;
    let mut states = threads.flatten().map(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        stat.contains(" (vm-store) D ")
    });
    states.any(|waits| waits).then_some(())
}

fn files(folder: &Path) -> Result<Vec<String>, Failed> {
    let names = fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names: Vec<String> = names.collect::<Result<_, Failed>>()?;
    names.sort();
    Ok(names)
}

fn names(vmm: &mut Vmm) -> Result<Vec<Value>, Failed> {
    let status = vmm.accept("status")?;
    let nics = status["nics"].as_array().ok_or("status tells of cards")?;
    Ok(nics.iter().map(|nic| nic["name"].clone()).collect())
}

/// Adds a card to the running VM of `vmm` while the volume hangs, and kills the program when the guest has the card.
fn kill_before_it_is_stored(vmm: &mut Vmm, volume: &Volume, console: &str, tap: &Tap) -> Result<(), Failed> {
    wait_for_cards(console, &[FIRST])?;
    volume.hang()?;
    writeln!(
        vmm.input,
        "nic add name=second,tap={},mac={SECOND} 300",
        tap.name()
    )?;
    wait_for_cards(console, &[FIRST, SECOND])?;
    let process = vmm.child.id();
    wait_for(WITHIN, "the configuration to be written", || {
        waits_for_a_disk(process)
    })
    .map_err(|error| error.to_string())?;
    assert!(tap.open().is_err(), "the host has given it to the guest");
    vmm.child.kill()?;
    Ok(())
}

/// The program is gone, and has not said that the card is there.
fn is_gone(vmm: &mut Vmm, tap: &Tap) -> Result<(), Failed> {
    let answer = vmm.reply("nic").err();
    assert!(answer.is_some(), "the card was not stored");
    assert_eq!(vmm.child.wait()?.signal(), Some(libc::SIGKILL));
    let attached = vmm.events.iter().filter(|event| event["event"] == "nic-attached");
    assert_eq!(attached.count(), 0, "the card was not stored");
    drop(tap.open()?);
    Ok(())
}

fn killed_before_a_card_is_stored() -> Result<(), Failed> {
    let places = Places {
        folder: tempfile::tempdir()?,
    };
    let volume = Volume::create()?;
    let mounted = Mounted::create(&volume, Path::new(&places.path("volume")))?;
    let taps = [
        Tap::create(Ipv4Addr::new(10, 213, 94, 1))?,
        Tap::create(Ipv4Addr::new(10, 213, 95, 1))?,
    ];
    let (state, console) = (places.path("volume/vm"), places.path("console"));
    let mut vmm = places.make_vm(&[
        ("--state-dir", &state),
        ("--cmdline", "console=ttyS0 quiet panic=-1 harness.exit=look"),
        ("--nic", &format!("name=first,tap={},mac={FIRST}", taps[0].name())),
    ])?;
    vmm.accept("start")?;
    kill_before_it_is_stored(&mut vmm, &volume, &console, &taps[1])?;
    volume.go_on()?;
    is_gone(&mut vmm, &taps[1])?;
    let left = ["config.json", "config.json.new", "lock"];
    assert_eq!(files(Path::new(&state))?, left, "it was killed in between");

    // The old configuration is in force; the same again, and the power fails.
    let console = places.path("second console");
    let again = ["--state-dir", &state, "--console", &console];
    let mut vmm = Vmm::start(&again)?;
    assert_eq!(names(&mut vmm)?, ["first"]);
    vmm.accept("start")?;
    kill_before_it_is_stored(&mut vmm, &volume, &console, &taps[1])?;
    volume.lose()?;
    is_gone(&mut vmm, &taps[1])?;
    mounted.recover()?;

    let console = places.path("third console");
    let mut vmm = Vmm::start(&["--state-dir", &state, "--console", &console])?;
    assert_eq!(names(&mut vmm)?, ["first"]);
    vmm.accept("start")?;
    wait_for_cards(&console, &[FIRST])?;
    vmm.accept(&format!(
        "nic add name=second,tap={},mac={SECOND} 300",
        taps[1].name()
    ))?;
    wait_for_cards(&console, &[FIRST, SECOND])?;
    assert_eq!(names(&mut vmm)?, ["first", "second"]);
    vmm.accept("quit")?;
    assert!(vmm.child.wait()?.success());
    assert_eq!(files(Path::new(&state))?, ["config.json", "lock"]);
    Ok(())
}
