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

fn vmm_obeys_text_and_keeps_its_vm() -> Result<(), Failed> {
    let kernel = GuestKernel::find(Flavour::Cloud)?;
    let folder = tempfile::tempdir()?;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let (state, console, disk) = (
        text(&folder.path().join("vm")),
        text(&folder.path().join("console")),
        folder.path().join("disk.img"),
    );
    fs::write(&disk, vec![0; 1 << 20])?;
    let (elf, initrd) = (text(&kernel.elf), text(&kernel.initramfs));
    let disk = format!("name=data,path={},readonly", text(&disk));
    let cmdline = "console=ttyS0 quiet panic=-1";
    let mut vmm = Vmm::start(&[
        "--state-dir",
        &state,
        "--name",
        "web 1",
        "--kernel",
        &elf,
        "--initrd",
        &initrd,
        "--cmdline",
        cmdline,
        "--cpus",
        "2",
        "--memory",
        "256M",
        "--disk",
        &disk,
        "--config-version",
        "1.0",
        "--console",
        &console,
    ])?;
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

fn vmm_names_what_is_wrong() -> Result<(), Failed> {
    let kernel = GuestKernel::find(Flavour::Cloud)?;
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    fs::write(path("text"), "not a kernel at all")?;
    fs::write(path("odd"), vec![0; 700])?;
    fs::write(path("empty"), "")?;
    fs::write(path("disk"), vec![0; 4096])?;
    let elf = kernel.elf.to_string_lossy().into_owned();
    let disk = |name: &str| format!("name=d,path={}", path(name));
    let long = "x".repeat(3000);
    let cases: Vec<(Vec<&str>, &str)> = vec![
        (vec!["--kernel", "/nowhere"], "/nowhere"),
        (vec!["--kernel", "text"], "not a kernel"),
        (vec!["--memory", "64M"], "67108864"),
        (vec!["--memory", "100000G"], "exceeds"),
        (vec!["--memory", "200000K"], "multiple"),
        (vec!["--cmdline", &long], "3000"),
        (vec!["--cpus", "0"], "0"),
        (vec!["--cpus", "1000"], "1000"),
        (vec!["--disk", "absent"], "absent"),
        (vec!["--disk", "empty"], "empty"),
        (vec!["--disk", "odd"], "512"),
        (vec!["--disk", "disk", "--disk", "disk"], "d"),
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
        let mut arguments = vec![
            "--state-dir".to_owned(),
            path("vm"),
            "--name".to_owned(),
            "n".to_owned(),
        ];
        if words[0] != "--kernel" {
            arguments.extend(["--kernel".to_owned(), elf.clone()]);
        }
        for pair in words.chunks(2) {
            let value = match pair {
                ["--disk", name] => disk(name),
                ["--kernel", "text"] => path("text"),
                [_, value] => (*value).to_owned(),
                _ => return Err("options come in pairs".into()),
            };
            arguments.extend([pair[0].to_owned(), value]);
        }
        let output = Command::new(example("vmm")?)
            .args(&arguments)
            .stdin(Stdio::null())
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && said.contains(expected),
            "{words:?} says {said:?}"
        );
        assert!(
            !folder.path().join("vm").exists(),
            "{words:?} left something behind"
        );
    }
    Ok(())
}
