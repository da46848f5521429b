//! The `vmm` example as its users drive it, by text; and where a test keeps what.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use libtest_mimic::Failed;
use serde_json::Value;

use crate::harness::artefacts::{Flavour, GuestKernel};

/// The program of an example, beside this test's own.
pub fn example(name: &str) -> Result<PathBuf, Failed> {
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

/// A running `vmm` and the words it exchanges.
pub struct Vmm {
    pub child: Child,
    pub input: ChildStdin,
    output: BufReader<ChildStdout>,
    pub events: Vec<Value>,
}

impl Vmm {
    pub fn start(arguments: &[&str]) -> Result<Self, Failed> {
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
    pub fn ask(&mut self, command: &str) -> Result<Value, Failed> {
        writeln!(self.input, "{command}")?;
        self.reply(command)
    }

    /// The next reply, which must be that to `command`.
    pub fn reply(&mut self, command: &str) -> Result<Value, Failed> {
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

    pub fn accept(&mut self, command: &str) -> Result<Value, Failed> {
        let reply = self.ask(command)?;
        if reply["ok"] == true {
            Ok(reply)
        } else {
            Err(format!("{command}: {reply}").into())
        }
    }

    pub fn refuse(&mut self, command: &str) -> Result<String, Failed> {
        let reply = self.ask(command)?;
        assert_eq!(reply["ok"], false, "{command}: {reply}");
        Ok(reply["error"].as_str().unwrap_or_default().to_owned())
    }
}

/// Where the `vmm` of a test keeps what.
pub struct Places {
    pub folder: tempfile::TempDir,
}

impl Places {
    pub fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_string_lossy().into_owned()
    }

    /// Makes a VM in the directory `vm` with a read-only disk, and starts the program on it.
    pub fn make_vm(&self, options: &[(&str, &str)]) -> Result<Vmm, Failed> {
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
            ("--console", self.path("console")),
        ];
        let pairs = pairs.iter().map(|(option, value)| (*option, value.as_str()));
        let pairs = pairs.chain(options.iter().copied());
        let words: Vec<&str> = pairs.flat_map(|(option, value)| [option, value]).collect();
        Vmm::start(&words)
    }
}
