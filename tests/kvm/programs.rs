//! The example programs, as their users run them.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use libtest_mimic::Failed;
use serde_json::Value;

use crate::Body;
use crate::harness::artefacts::{Flavour, GuestKernel, INIT_REACHED};

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
            "programs::vmm_obeys_text_and_keeps_its_vm",
            vmm_obeys_text_and_keeps_its_vm,
        ),
        Body::new(
            "programs::vmm_names_what_is_wrong_and_creates_nothing",
            vmm_names_what_is_wrong,
        ),
    ]
}

/// The program of an example, beside this test's own.
fn example(name: &str) -> Result<PathBuf, Failed> {
    let test = std::env::current_exe()?;
    let folder = test
        .parent()
        .and_then(Path::parent)
        .ok_or("a test lies in target/PROFILE/deps")?;
    let program = folder.join("examples").join(name);
    if program.exists() {
        Ok(program)
    } else {
        Err(format!("{} is not built", program.display()).into())
    }
}

fn boot_ends_with_the_guest() -> Result<(), Failed> {
    let kernel = GuestKernel::find(Flavour::Cloud)?;
    let cmdline = "console=ttyS0 quiet panic=-1 harness.modules=none harness.exit=poweroff";
    let output = Command::new(example("boot")?)
        .arg(&kernel.bzimage)
        .arg(&kernel.initramfs)
        .arg(cmdline)
        .output()?;
    let (said, errors) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(
        output.status.success() && said.contains(INIT_REACHED),
        "{said}\n{errors}"
    );
    assert!(errors.contains("the guest ended: GuestPowerOff"), "{errors}");
    Ok(())
}

fn many_vms_leave_nothing_behind() -> Result<(), Failed> {
    let kernel = GuestKernel::find(Flavour::Cloud)?;
    let output = Command::new(example("many")?)
        .arg(&kernel.elf)
        .arg(&kernel.initramfs)
        .arg("20")
        .output()?;
    let (said, errors) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(
        output.status.success() && said.contains("20 guests run"),
        "{said}\n{errors}"
    );
    Ok(())
}

/// A running `vmm` and the words it exchanges.
struct Vmm {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    events: Vec<Value>,
}

impl Vmm {
    fn start(arguments: &[&str]) -> Result<Self, Failed> {
        let mut command = Command::new(example("vmm")?);
        let mut child = command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().ok_or("stdin is a pipe")?;
        let output = BufReader::new(child.stdout.take().ok_or("stdout is a pipe")?);
        Ok(Self {
            child,
            input,
            output,
            events: Vec::new(),
        })
    }

    /// Sends `command` and returns its reply; events that come before it are kept.
    fn ask(&mut self, command: &str) -> Result<Value, Failed> {
        writeln!(self.input, "{command}")?;
        loop {
            let mut line = String::new();
            if self.output.read_line(&mut line)? == 0 {
                return Err(format!("vmm ended before it answered {command:?}").into());
            }
            let value: Value = serde_json::from_str(&line)?;
            if value.get("event").is_some() {
                self.events.push(value);
            } else {
                assert_eq!(
                    value["reply"],
                    command.split(' ').next().unwrap_or_default(),
                    "{value}"
                );
                return Ok(value);
            }
        }
    }

    fn accept(&mut self, command: &str) -> Result<Value, Failed> {
        let reply = self.ask(command)?;
        if reply["ok"] == true {
            Ok(reply)
        } else {
            Err(format!("{command}: {reply}").into())
        }
    }

    fn refuse(&mut self, command: &str) -> Result<String, Failed> {
        let reply = self.ask(command)?;
        assert_eq!(reply["ok"], false, "{command}: {reply}");
        Ok(reply["error"].as_str().unwrap_or_default().to_owned())
    }
}

/// Where the `vmm` of a test keeps what.
struct Places {
    folder: tempfile::TempDir,
}

impl Places {
    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_string_lossy().into_owned()
    }

    /// Makes a VM in the directory `vm` with a read-only disk, and starts the program on it.
    fn make_vm(&self) -> Result<Vmm, Failed> {
        let kernel = GuestKernel::find(Flavour::Cloud)?;
        fs::write(self.path("disk.img"), vec![0; 1 << 20])?;
        let pairs = [
            ("--state-dir", self.path("vm")),
            ("--name", "web 1".to_owned()),
            ("--kernel", kernel.elf.to_string_lossy().into_owned()),
            ("--initrd", kernel.initramfs.to_string_lossy().into_owned()),
            ("--cmdline", "console=ttyS0 quiet panic=-1".to_owned()),
            ("--cpus", "2".to_owned()),
            ("--memory", "256M".to_owned()),
            (
                "--disk",
                format!("name=data,path={},readonly", self.path("disk.img")),
            ),
            ("--config-version", "1.0".to_owned()),
            ("--console", self.path("console")),
        ];
        let words: Vec<&str> = pairs
            .iter()
            .flat_map(|(option, value)| [*option, value])
            .collect();
        Vmm::start(&words)
    }
}

fn vmm_obeys_text_and_keeps_its_vm() -> Result<(), Failed> {
    let places = Places {
        folder: tempfile::tempdir()?,
    };
    let (state, console) = (places.path("vm"), places.path("console"));
    let mut vmm = places.make_vm()?;
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

    // It is there again, and the end of input ends it.
    let mut vmm = Vmm::start(&["--state-dir", &state])?;
    let again = vmm.accept("status")?;
    assert_eq!(
        (&again["name"], &again["disks"]),
        (&status["name"], &status["disks"])
    );
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
    let memory = vmm.accept("status")?["memory"].clone();
    assert_eq!((&memory["startup"], &memory["maximum"]), (&mib(256), &mib(1024)));
    assert_eq!(
        (&memory["requested"], &memory["assigned"]),
        (&mib(768), &mib(768))
    );
    assert!(
        memory["guest_total"].is_u64() && memory["resident"].is_u64(),
        "{memory}"
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
    vmm.accept("quit")?;
    assert!(vmm.child.wait()?.success());
    let count = |name: &str| vmm.events.iter().filter(|event| event["event"] == name).count();
    assert_eq!(count("memory-settled"), 2);
    assert!(count("memory-progress") >= 2, "{:?}", vmm.events);
    // The size is a setting of the VM.
    let mut vmm = Vmm::start(&["--state-dir", &places.path("vm")])?;
    assert_eq!(vmm.accept("status")?["memory"]["requested"], mib(192));
    vmm.accept("quit")?;
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

fn vmm_names_what_is_wrong() -> Result<(), Failed> {
    let kernel = GuestKernel::find(Flavour::Cloud)?;
    let elf = kernel.elf.to_string_lossy().into_owned();
    let places = Places {
        folder: tempfile::tempdir()?,
    };
    fs::write(places.path("text"), "not a kernel at all")?;
    fs::write(places.path("odd"), vec![0; 700])?;
    fs::write(places.path("empty"), "")?;
    fs::write(places.path("disk"), vec![0; 4096])?;
    let long = "x".repeat(3000);
    let cases: Vec<(Vec<&str>, &str)> = vec![
        (vec!["--kernel", "/nowhere"], "/nowhere"),
        (vec!["--kernel", "text"], "not a kernel"),
        (vec!["--memory", "32M"], "below the minimum 64 MiB"),
        (vec!["--memory", "1000G"], "exceeds the host's memory"),
        (vec!["--memory", "200000K"], "multiple"),
        (vec!["--cmdline", &long], "3000"),
        (vec!["--cpus", "0"], "from 1 to 64"),
        (vec!["--cpus", "1000"], "1000 vcpus"),
        (vec!["--disk", "absent"], "absent"),
        (vec!["--disk", "empty"], "empty"),
        (vec!["--disk", "odd"], "512"),
        (vec!["--disk", "disk", "--disk", "disk"], "two disks are called d"),
        (vec!["--nic", "name=n,tap=nosuchtap"], "nosuchtap"),
        (vec!["--nic", "name=n,tap=lo"], "lo"),
        (vec!["--nic", "name=n,tap=t,mac=ff:ff:ff:ff:ff:ff"], "multicast"),
        (vec!["--config-version", "9.0"], "9.0"),
        (
            vec![
                "--memory",
                "512M",
                "--memory-max",
                "1G",
                "--config-version",
                "1.0",
            ],
            "2.0",
        ),
    ];
    for (words, expected) in cases {
        refused(&places, &elf, &words, expected)?;
    }
    Ok(())
}

/// Asks for a VM with these options, which must be refused with `expected` in the reason and leave nothing behind.
fn refused(places: &Places, elf: &str, words: &[&str], expected: &str) -> Result<(), Failed> {
    let mut command = Command::new(example("vmm")?);
    command.args(["--state-dir", &places.path("vm"), "--name", "n"]);
    if words[0] != "--kernel" {
        command.args(["--kernel", elf]);
    }
    for pair in words.chunks(2) {
        let value = match pair {
            ["--disk", name] => format!("name=d,path={}", places.path(name)),
            ["--kernel", "text"] => places.path("text"),
            [_, value] => (*value).to_owned(),
            _ => return Err("options come in pairs".into()),
        };
        command.args([pair[0], &value]);
    }
    let output = command.stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && said.contains(expected),
        "{words:?} says {said:?}"
    );
    let left = Path::new(&places.path("vm")).exists();
    assert!(!left, "{words:?} left something behind");
    Ok(())
}
