//! A small complete VMM in the crate's public API: one VM, driven by text.
//!
//! ```text
//! vmm --state-dir DIR [--name NAME --kernel FILE [--initrd FILE] [--cmdline STR] [--cpus N] [--memory SIZE]
//!     [--memory-max SIZE] [--memory-min SIZE] [--overcommit true|false] [--deflate-on-oom true|false]
//!     [--disk name=N,path=P[,readonly]]... [--nic name=N,tap=T[,mac=M]]...
//!     [--config-version V]] [--console FILE]
//! ```
//! With `--name` a new VM is made in DIR; without it the VM in DIR is opened. The guest is not started by itself.
//! Standard input takes one command per line, standard output carries one JSON object per line: replies in command
//! order, events at any time. A command takes effect when those before it are answered; but while `memory` waits for the
//! guest, `power-off`, `quit` and another `memory` take effect at once. The end of input is `quit` when everything is
//! answered. The exit status is 0 unless the VM could not be made.
//! Words are quoted as in a shell: `nic remove "the \"red\" one" 10`; `name='a b',tap=tap0` is one word. A comma in a
//! value of `name=N,tap=T` is written twice.

mod arguments;
mod commands;
mod memory;
mod nics;
mod session;
mod words;

use std::fs::File;
use std::io::{self, BufReader, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use vm_lifecycle::config::VmConfig;
use vm_lifecycle::event::EventStream;
use vm_lifecycle::vm::Vm;
use vm_lifecycle::vm::host::{HostDevices, KvmPlatform};
use vm_lifecycle::vm::operation::ErrorChain;

use crate::arguments::Arguments;
use crate::session::Session;

/// Gives the guest a file as its serial port; a restarted guest goes on at its end.
struct Console {
    path: Option<PathBuf>,
}

impl Console {
    /// Opens the file, or a sink where there is none. A pipe is opened for both ways: that does not wait for its reader,
    /// who may be away for a while.
    fn open(&self) -> io::Result<Box<dyn Write + Send>> {
        let Some(path) = &self.path else {
            return Ok(Box::new(io::sink()));
        };
        let is_pipe = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo());
        let mut options = File::options();
        let file = options.create(true).append(true).read(is_pipe).open(path);
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        Ok(Box::new(file.map_err(named)?))
    }
}

impl HostDevices for Console {
    fn serial_output(&self, _vm: &VmConfig) -> io::Result<Box<dyn Write + Send>> {
        self.open()
    }
}

fn main() -> ExitCode {
    match make_vm() {
        Ok(vm) => {
            serve(vm);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("vmm: {}", ErrorChain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn make_vm() -> Result<Vm, Box<dyn std::error::Error>> {
    let words = std::env::args_os().skip(1);
    let words: Result<Vec<_>, _> = words.map(|word| word.into_string()).collect();
    let words = words.map_err(|word| format!("the argument {word:?} is not UTF-8"))?;
    let arguments = Arguments::parse(words.into_iter())?;
    let console = Console {
        path: arguments.console,
    };
    // A console file that cannot be written is told now, not at the first start.
    console.open().map_err(|error| format!("--console {error}"))?;
    let platform = Arc::new(KvmPlatform::new(console));
    Ok(match arguments.new_vm {
        Some(config) => Vm::create(&arguments.state_dir, config.build()?, platform)?,
        None => Vm::open(&arguments.state_dir, platform)?,
    })
}

fn serve(vm: Vm) {
    let events = vm.events();
    let printer = std::thread::spawn(move || print_events(&events));
    Session::new(vm).run(BufReader::new(io::stdin()));
    if printer.join().is_err() {
        eprintln!("vmm: the event printer panicked");
    }
}

fn print_events(events: &EventStream) {
    while let Some(event) = events.next(Duration::MAX) {
        match serde_json::to_value(&event) {
            Ok(value) => print(&value),
            Err(error) => eprintln!("vmm: event {} cannot be written: {error}", event.number),
        }
    }
}

fn print(value: &Value) {
    let mut output = io::stdout().lock();
    // A reader that went away does not stop the VM; the end of input does.
    let _ = writeln!(output, "{value}").and_then(|()| output.flush());
}
