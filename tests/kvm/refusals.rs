//! What cannot be is refused by the `vmm` before anything is made, in a sentence that names the thing and the limit.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};

use libtest_mimic::Failed;
use vm_lifecycle::storage::{RawConfig, RawDisk, RawEngine};

use crate::Body;
use crate::harness::artefacts::{Flavour, GuestKernel};
use crate::harness::tap::Tap;
use crate::vmm::{Places, example};

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![
        Body::new("refusals::of_what_the_vm_is_made_of", what_the_vm_is_made_of),
        Body::new("refusals::of_its_disks_and_cards", its_disks_and_cards),
        Body::new("refusals::of_what_others_have", what_others_have),
        Body::new("refusals::of_a_host_without_kvm", a_host_without_kvm),
    ]
}

/// Options and a part of the sentence that refuses them.
struct Case<'a>(&'a [&'a str], &'a str);

fn what_the_vm_is_made_of() -> Result<(), Failed> {
    let (places, kernel) = (places()?, GuestKernel::find(Flavour::Cloud)?);
    let bzimage = kernel.bzimage.to_string_lossy();
    fs::write(places.path("text"), "not a kernel at all")?;
    fs::write(places.path("empty"), "")?;
    File::create(places.path("large"))?.set_len(300 << 20)?;
    let long = "x".repeat(3000);
    let [text, empty, large] = ["text", "empty", "large"].map(|name| places.path(name));
    let small = ["--kernel", &bzimage, "--memory", "64M"];
    let old = [
        "--memory",
        "512M",
        "--memory-max",
        "1G",
        "--config-version",
        "1.0",
    ];
    let cpus = |count: &str| format!("{count} vcpus are asked for, from 1 to 64 are possible");
    let (none, many) = (cpus("0"), cpus("1000"));
    let no_kernel = "is not a kernel that can be started: it is neither a bzImage nor an ELF image";
    let cases = [
        Case(
            &["--kernel", "/nowhere"],
            "cannot open kernel /nowhere: No such file",
        ),
        Case(&["--kernel", &text], no_kernel),
        Case(&["--kernel", &empty], "empty is empty"),
        Case(&small, "ram below 4 GiB ends at 0x4000000"),
        Case(
            &["--initrd", &large],
            "large has 314572800 bytes, there is room for",
        ),
        Case(
            &["--memory", "32M"],
            "start-up memory 32 MiB is below the minimum 64 MiB",
        ),
        Case(&["--memory", "1000G"], "exceeds the host's memory of"),
        Case(&["--memory", "200000K"], "is not a multiple of 1 MiB"),
        Case(&["--cmdline", &long], "has 3000 bytes, the limit is 2047"),
        Case(&["--cpus", "0"], &none),
        Case(&["--cpus", "1000"], &many),
        Case(&["--config-version", "9.0"], "9.0"),
        Case(&old, "needs configuration version 2.0, the vm has 1.0"),
    ];
    cases.iter().try_for_each(|case| refused(&places, &[], case))
}

fn its_disks_and_cards() -> Result<(), Failed> {
    let places = places()?;
    fs::write(places.path("odd"), vec![0; 700])?;
    fs::write(places.path("empty"), "")?;
    fs::write(places.path("disk"), vec![0; 4096])?;
    let [odd, empty, disk] =
        ["odd", "empty", "disk"].map(|name| format!("name=d,path={}", places.path(name)));
    let (one, other) = (
        "name=n,tap=t,mac=02:00:00:00:00:01",
        "name=m,tap=u,mac=02:00:00:00:00:01",
    );
    let same_mac = "have the same mac address 02:00:00:00:00:01";
    let (twice, macs) = (["--disk", &disk, "--disk", &disk], ["--nic", one, "--nic", other]);
    let names = ["--nic", "name=n,tap=a", "--nic", "name=n,tap=b"];
    let cases = [
        Case(
            &["--disk", "name=d,path=/absent/disk"],
            "/absent/disk does not exist",
        ),
        Case(&["--disk", &empty], "is empty"),
        Case(&["--disk", &odd], "has 700 bytes, which is not a multiple of 512"),
        Case(&twice, "two disks are called d"),
        Case(
            &["--nic", "name=n,tap=nosuchtap"],
            "tap \"nosuchtap\" does not exist",
        ),
        Case(&["--nic", "name=n,tap=lo"], "\"lo\" is not a tap"),
        Case(&names, "two network cards are called n"),
        Case(&["--nic", "name=n,tap=t,mac=ff:ff:ff:ff:ff:ff"], "multicast"),
        Case(&macs, same_mac),
    ];
    cases.iter().try_for_each(|case| refused(&places, &[], case))
}

fn what_others_have() -> Result<(), Failed> {
    let places = places()?;
    let path = places.path("disk");
    fs::write(&path, vec![0; 4096])?;
    let config = RawConfig {
        path: path.clone().into(),
        read_only: false,
        engine: RawEngine::Auto,
    };
    let held = RawDisk::open(&config)?;
    let disk = format!("name=d,path={path}");
    let in_use = format!("disk image {path} is in use by another vm or process");
    refused(&places, &[], &Case(&["--disk", &disk], &in_use))?;
    drop(held);
    for tap in [
        Tap::create(Ipv4Addr::new(10, 213, 90, 1))?,
        Tap::create_multi_queue(Ipv4Addr::new(10, 213, 91, 1))?,
    ] {
        let _held = tap.open()?;
        let nic = format!("name=n,tap={}", tap.name());
        let in_use = format!("tap {:?} is in use", tap.name());
        refused(&places, &[], &Case(&["--nic", &nic], &in_use))?;
    }
    Ok(())
}

fn a_host_without_kvm() -> Result<(), Failed> {
    let places = places()?;
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let may_not = "/dev/kvm may not be opened by this process";
    refused(&places, &nobody, &Case(&["--memory", "256M"], may_not))?;
    let without = [
        "unshare",
        "-m",
        "sh",
        "-c",
        "mount -t tmpfs none /dev && exec \"$@\"",
        "sh",
    ];
    refused(
        &places,
        &without,
        &Case(&["--memory", "256M"], "/dev/kvm does not exist"),
    )
}

fn places() -> Result<Places, Failed> {
    let folder = tempfile::tempdir()?;
    Ok(Places { folder })
}

/// Asks for a VM with these options, by way of the program `through`; it must be refused and leave nothing behind.
fn refused(places: &Places, through: &[&str], Case(words, expected): &Case) -> Result<(), Failed> {
    let vmm = example("vmm")?;
    let mut command = match through {
        [] => Command::new(&vmm),
        [program, words @ ..] => {
            let mut command = Command::new(program);
            command.args(words).arg(&vmm);
            command
        }
    };
    command.args(["--state-dir", &places.path("vm"), "--name", "n"]);
    if !words.contains(&"--memory") {
        command.args(["--memory", "256M"]);
    }
    if !words.contains(&"--kernel") {
        command
            .arg("--kernel")
            .arg(GuestKernel::find(Flavour::Cloud)?.elf);
    }
    let output = command.args(*words).stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && said.contains(expected),
        "{words:?} says {said:?}, not {expected:?}"
    );
    let left = Path::new(&places.path("vm")).exists();
    assert!(!left, "{words:?} left something behind");
    Ok(())
}
