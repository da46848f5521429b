//! The example programs, as their users run them.

use std::fs;
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Output, Stdio};

use libtest_mimic::Failed;
use serde_json::Value;

use crate::Body;
use crate::guest::WITHIN;
use crate::harness::artefacts::{Flavour, GuestKernel, INIT_REACHED};
use crate::harness::tap::Tap;
use crate::harness::wait::wait_for;
use crate::vmm::{Places, Vmm, example};

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![
        Body::new("programs::vmm_resizes_memory", vmm_resizes_memory),
        Body::new(
            "programs::vmm_shrinks_the_memory_of_an_old_vm",
            vmm_shrinks_an_old_vm,
        ),
        Body::new(
            "programs::the_resize_example_keeps_its_word",
            the_resize_example_keeps_its_word,
        ),
        Body::new(
            "programs::boot_shows_the_console_and_ends_with_the_guest",
            boot_ends_with_the_guest,
        ),
        Body::new(
            "programs::many_vms_leave_nothing_behind",
            many_vms_leave_nothing_behind,
        ),
        Body::new(
            "programs::a_vm_calls_for_what_its_threads_publish",
            a_vm_calls_for_what_its_threads_publish,
        ),
        Body::new(
            "programs::hot_add_nic_adds_renames_and_removes",
            hot_add_nic_adds_renames_and_removes,
        ),
        Body::new("programs::vmm_changes_network_cards_by_text", vmm_changes_cards),
        Body::new(
            "programs::vmm_obeys_text_and_keeps_its_vm",
            vmm_obeys_text_and_keeps_its_vm,
        ),
    ]
}

/// The program came to a good end and said `words` on its way.
fn says(output: &Output, words: &str) {
    let (said, errors) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(
        output.status.success() && said.contains(words),
        "{}: {said}\n{errors}",
        output.status
    );
}

fn boot_ends_with_the_guest() -> Result<(), Failed> {
    let kernel = GuestKernel::find(Flavour::Cloud)?;
    let cmdline = "console=ttyS0 quiet panic=-1 harness.modules=none harness.exit=poweroff";
    let output = Command::new(example("boot")?)
        .arg(&kernel.bzimage)
        .arg(&kernel.initramfs)
        .arg(cmdline)
        .output()?;
    says(&output, INIT_REACHED);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("the guest ended: GuestPowerOff"), "{errors}");
    Ok(())
}

fn hot_add_nic_adds_renames_and_removes() -> Result<(), Failed> {
    let kernel = GuestKernel::find(Flavour::Cloud)?;
    let tap = Tap::create(Ipv4Addr::new(10, 213, 60, 1))?;
    let output = Command::new(example("hot_add_nic")?)
        .arg(&kernel.elf)
        .arg(&kernel.initramfs)
        .arg(tap.name())
        .output()?;
    says(&output, "it is gone: the guest let go of it");
    Ok(())
}

fn a_vm_calls_for_what_its_threads_publish() -> Result<(), Failed> {
    let kernel = GuestKernel::find(Flavour::Cloud)?;
    let tap = Tap::create(Ipv4Addr::new(10, 213, 63, 1))?;
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("disk.img");
    fs::File::create(&disk)?.set_len(8 << 20)?;
    let output = Command::new(example("seccomp")?)
        .args([&kernel.elf, &kernel.initramfs, &disk])
        .arg(tap.name())
        .output()?;
    says(&output, "nothing that it had not published");
    Ok(())
}

fn many_vms_leave_nothing_behind() -> Result<(), Failed> {
    let kernel = GuestKernel::find(Flavour::Cloud)?;
    let output = Command::new(example("many")?)
        .arg(&kernel.elf)
        .arg(&kernel.initramfs)
        .arg("20")
        .output()?;
    says(&output, "20 guests run");
    Ok(())
}

fn vmm_obeys_text_and_keeps_its_vm() -> Result<(), Failed> {
    let places = Places {
        folder: tempfile::tempdir()?,
    };
    let (state, console) = (places.path("vm"), places.path("console"));
    let mut vmm = places.make_vm(&[("--config-version", "1.0")])?;
    let status = vmm.accept("status")?;
    assert_eq!(
        (&status["state"], &status["operation"], &status["name"]),
        (&"off".into(), &Value::Null, &"web 1".into())
    );
    assert_eq!(
        (&status["config_version"], &status["cpus"]),
        (&"1.0".into(), &2.into())
    );
    assert_eq!(status["disks"][0]["readonly"], true);
    assert_eq!(vmm.refuse("pause")?, "cannot pause: the vm is off");
    assert!(vmm.refuse("dance")?.starts_with("unknown command \"dance\""));
    vmm.accept("start")?;
    vmm.accept("wait running 10")?;
    assert!(
        vmm.refuse("wait off 0.01")?
            .starts_with("the vm is running after 0.01 seconds")
    );
    vmm.accept("pause")?;
    assert_eq!(vmm.accept("status")?["state"], "paused");
    vmm.accept("resume")?;
    vmm.accept("reset")?;
    assert!(vmm.accept("inspect")?["inspect"]["machine"]["units"]["serial"].is_object());
    // The VM is in use: a second process is refused, and told why.
    let second = Command::new(example("vmm")?)
        .args(["--state-dir", &state])
        .stdin(Stdio::null())
        .output()?;
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success() && said.contains("in use"), "{said}");
    crate::harness::wait::wait_for(crate::guest::BOOT_WITHIN, "the guest's init", || {
        fs::read_to_string(&console)
            .is_ok_and(|text| text.contains(INIT_REACHED))
            .then_some(())
    })?;
    vmm.accept("power-off")?;
    vmm.accept("wait off")?;
    vmm.accept("quit")?;
    assert!(vmm.child.wait()?.success());
    assert!(
        vmm.events
            .iter()
            .any(|event| event["event"] == "reset" && event["cause"] == "host")
    );

    // It is there again, and the end of input ends it, also when nobody reads the guest's console any more.
    let pipe = places.path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status()?.success());
    let mut reader = fs::File::options();
    let reader = reader.read(true).custom_flags(libc::O_NONBLOCK).open(&pipe)?;
    let mut vmm = Vmm::start(&["--state-dir", &state, "--console", &pipe])?;
    let again = vmm.accept("status")?;
    assert_eq!(
        (&again["name"], &again["disks"]),
        (&status["name"], &status["disks"])
    );
    drop(reader);
    vmm.accept("start")?;
    drop(vmm.input);
    assert!(vmm.child.wait()?.success());
    Ok(())
}

/// A `vmm` with a VM of 256 MiB in the directory `vm`, whose guest uses what it is given.
fn elastic_vmm(places: &Places, words: &[&str]) -> Result<Vmm, Failed> {
    let kernel = GuestKernel::find(Flavour::Cloud)?;
    let (state, elf) = (places.path("vm"), kernel.elf.to_string_lossy().into_owned());
    let initrd = kernel.initramfs.to_string_lossy().into_owned();
    let fixed = [
        ["--state-dir", &state],
        ["--name", "m"],
        ["--kernel", &elf],
        ["--initrd", &initrd],
        ["--cmdline", "quiet memhp_default_state=online_movable"],
        ["--memory", "256M"],
    ];
    Vmm::start(&[&fixed.concat()[..], words].concat())
}

fn mib(mib: u64) -> Value {
    (mib << 20).into()
}

fn vmm_resizes_memory() -> Result<(), Failed> {
    let places = Places {
        folder: tempfile::tempdir()?,
    };
    let mut vmm = elastic_vmm(&places, &["--memory-max", "1G"])?;
    vmm.accept("start")?;
    let grown = vmm.accept("memory 768M 180")?;
    assert_eq!(
        (&grown["requested"], &grown["reached"], &grown["reason"]),
        (&mib(768), &mib(768), &"complete".into())
    );
    // The balloon's driver, which tells the guest's total, may come after the other one has obeyed.
    let memory = wait_for(WITHIN, "the guest's total", || {
        let memory = vmm.accept("status").ok()?["memory"].clone();
        memory["guest_total"].is_u64().then_some(memory)
    });
    let memory = memory.map_err(|error| error.to_string())?;
    assert_eq!((&memory["startup"], &memory["maximum"]), (&mib(256), &mib(1024)));
    assert_eq!(
        (&memory["requested"], &memory["assigned"]),
        (&mib(768), &mib(768))
    );
    assert!(memory["resident"].is_u64(), "{memory}");
    assert_eq!(vmm.accept("memory 192M 180")?["reached"], mib(192));
    // Too short a time for anything.
    let late = vmm.ask("memory 1G 0")?;
    assert_eq!(late["ok"], false, "{late}");
    assert_eq!(late["requested"], mib(1024), "{late}");
    assert!(
        late["reached"].as_u64().is_some_and(|reached| reached < 1 << 30)
            && ["deadline", "guest-refused"].contains(&late["reason"].as_str().unwrap_or_default())
            && late["error"].is_string(),
        "{late}"
    );
    assert_eq!(vmm.accept("memory 192M 180")?["reached"], mib(192));
    let refused = vmm.ask("memory 64M")?;
    assert_eq!(
        (&refused["ok"], &refused["reason"]),
        (&false.into(), &"floor".into())
    );
    assert_eq!(
        (&refused["requested"], &refused["reached"]),
        (&mib(64), &mib(192))
    );
    assert_eq!(refused["error"], "target 64 MiB is below the floor 104 MiB");
    nobody_waits_with_memory(&mut vmm)?;
    let stored = vmm.accept("memory 192M")?;
    assert_eq!(
        (&stored["reason"], &stored["reached"]),
        (&"stored".into(), &0.into())
    );
    vmm.accept("quit")?;
    assert!(vmm.child.wait()?.success());
    let count = |name: &str| vmm.events.iter().filter(|event| event["event"] == name).count();
    assert!(count("memory-settled") >= 5, "{:?}", vmm.events);
    assert!(count("memory-progress") >= 2, "{:?}", vmm.events);
    // The size is a setting of the VM.
    let mut vmm = Vmm::start(&["--state-dir", &places.path("vm")])?;
    assert_eq!(vmm.accept("status")?["memory"]["requested"], mib(192));
    vmm.accept("quit")?;
    Ok(())
}

/// While a guest that stands still is waited for, another size and the power cut take effect; replies keep their order.
fn nobody_waits_with_memory(vmm: &mut Vmm) -> Result<(), Failed> {
    vmm.accept("pause")?;
    let waiting = ["memory 512M 600", "memory 1G 600", "status", "power-off"];
    for command in waiting {
        writeln!(vmm.input, "{command}")?;
    }
    let replies = waiting.map(|command| vmm.reply(command));
    let [first, second, status, off] = replies;
    assert_eq!(first?["reason"], "withdrawn");
    assert_eq!(second?["reason"], "guest-ended");
    assert_eq!(status?["state"], "off");
    assert_eq!(off?["ok"], true);
    Ok(())
}

fn vmm_shrinks_an_old_vm() -> Result<(), Failed> {
    let places = Places {
        folder: tempfile::tempdir()?,
    };
    let mut vmm = elastic_vmm(&places, &["--config-version", "1.0"])?;
    vmm.accept("start")?;
    let refused = vmm.ask("memory 512M")?;
    assert_eq!(
        (&refused["ok"], &refused["reason"]),
        (&false.into(), &"version".into())
    );
    assert_eq!(vmm.accept("memory 192M 180")?["reached"], mib(192));
    assert_eq!(vmm.accept("memory 256M 180")?["reached"], mib(256));
    vmm.accept("quit")?;
    Ok(())
}

fn the_resize_example_keeps_its_word() -> Result<(), Failed> {
    let kernel = GuestKernel::find(Flavour::Cloud)?;
    let output = Command::new(example("resize_memory")?)
        .args([&kernel.elf, &kernel.initramfs])
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        said.ends_with("target 96 MiB is below the floor 168 MiB\n"),
        "{said}"
    );
    Ok(())
}

fn vmm_changes_cards() -> Result<(), Failed> {
    let places = Places {
        folder: tempfile::tempdir()?,
    };
    let taps = [
        Tap::create(Ipv4Addr::new(10, 213, 61, 1))?,
        Tap::create(Ipv4Addr::new(10, 213, 62, 1))?,
    ];
    let mut vmm = places.make_vm(&[("--config-version", "2.0")])?;
    let (first, second) = (taps[0].name(), taps[1].name());
    vmm.accept(&format!("nic add name='the \"red\" one',tap={first}"))?;
    let status = vmm.accept("status")?;
    let nic = &status["nics"][0];
    assert_eq!(
        (&nic["name"], &nic["acpi_index"], &nic["link"], &nic["state"]),
        (&"the \"red\" one".into(), &1.into(), &"up".into(), &Value::Null)
    );
    vmm.accept("start")?;
    let added = vmm.accept(&format!(
        r#"nic add "name=a\\b,, c,tap={second},mac=52:54:00:00:00:07" 300"#
    ))?;
    assert_eq!(
        (&added["nic"]["name"], &added["nic"]["mac"]),
        (&"a\\b, c".into(), &"52:54:00:00:00:07".into())
    );
    let status = vmm.accept("status")?;
    assert_eq!(
        (
            &status["nics"][1]["acpi_index"],
            &status["nics"][1]["driver_ready"]
        ),
        (&2.into(), &true.into())
    );
    vmm.accept(r#"nic rename 'a\b, c' Fred"#)?;
    vmm.accept("nic link Fred down")?;
    assert_eq!(vmm.accept("status")?["nics"][1]["link"], "down");
    assert_eq!(
        vmm.refuse(r#"nic rename Fred "the \"red\" one""#)?,
        "two network cards are called the \"red\" one"
    );
    assert_eq!(
        vmm.refuse("nic remove nobody")?,
        "the vm has no network card nobody"
    );
    assert_eq!(vmm.refuse("nic link Fred 'up")?, "the quote ' is not closed");
    assert!(vmm.refuse("nic dance")?.starts_with("the commands are nic add "));
    vmm.accept("nic link Fred up")?;
    assert_eq!(vmm.accept("status")?["nics"][1]["link"], "up");
    vmm.accept("nic remove Fred 300")?;
    // Nobody has time: the card comes all the same, and goes by force.
    assert_eq!(
        vmm.refuse(&format!("nic add name=hasty,tap={second} 0"))?,
        "no driver in the guest took the network card before the deadline"
    );
    assert_eq!(vmm.accept("status")?["nics"][1]["name"], "hasty");
    vmm.accept("nic offer hasty")?;
    vmm.accept("nic remove hasty 0 force")?;
    vmm.accept("nic remove 'the \"red\" one' force")?;
    assert_eq!(vmm.accept("status")?["nics"], Value::Array(Vec::new()));
    vmm.accept(&format!("nic add name=last,tap={second} 300"))?;
    vmm.accept("quit")?;
    assert!(vmm.child.wait()?.success());
    tells_of_cards(&vmm);
    // What was added while the guest ran is there again.
    let mut vmm = Vmm::start(&["--state-dir", &places.path("vm")])?;
    let status = vmm.accept("status")?;
    assert_eq!(status["nics"].as_array().map(Vec::len), Some(1), "{status}");
    assert_eq!(status["nics"][0]["name"], "last");
    Ok(())
}

/// Every kind of event that a network card has was told.
fn tells_of_cards(vmm: &Vmm) {
    let events: Vec<_> = vmm
        .events
        .iter()
        .filter_map(|event| event["event"].as_str())
        .collect();
    for expected in [
        "nic-attached",
        "nic-driver-ready",
        "nic-eject-requested",
        "nic-remove-refused",
        "nic-removed",
        "nic-renamed",
        "nic-link",
    ] {
        assert!(events.contains(&expected), "no {expected} in {events:?}");
    }
}
