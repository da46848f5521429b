//! Guests of this crate for the tests: a VM, its console's text and a shell in it.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use libtest_mimic::Failed;
use serde_json::Value;
use vm_lifecycle::config::{VmConfig, VmConfigBuilder};
use vm_lifecycle::event::{EndCause, EventKind, EventStream};
use vm_lifecycle::ids::PortName;
use vm_lifecycle::memory::host::HostMemory;
use vm_lifecycle::state::State;
use vm_lifecycle::vm::RequestError;
use vm_lifecycle::vm::Vm;
use vm_lifecycle::vm::host::{HostDevices, HostPort, KvmPlatform};
use vm_lifecycle::vm::operation::{Operation, Outcome};

use crate::harness::artefacts::{Flavour, GuestKernel, PORT_NAME};
use crate::harness::guest_shell::GuestShell;
use crate::harness::wait::Signal;

/// Long enough for a boot on a busy machine; a test that waits this long has failed.
pub const BOOT_WITHIN: Duration = Duration::from_secs(300);
/// Long enough for anything else.
pub const WITHIN: Duration = Duration::from_secs(180);
/// The command line that every test guest has.
pub const CMDLINE: &str = "console=ttyS0 quiet loglevel=3 panic=-1 harness.modules=all";

/// The host side of a test guest's devices: its console is kept in memory, its port is a socket pair.
#[derive(Clone, Default)]
pub struct TestHost {
    console: Arc<Signal<String>>,
    streams: Arc<Mutex<VecDeque<UnixStream>>>,
}

impl TestHost {
    /// What the guest has written on its serial console so far.
    pub fn console(&self) -> String {
        self.console
            .wait_for(Duration::ZERO, "the console", |text| Some(text.clone()))
            .unwrap_or_default()
    }

    /// Waits until the console holds `text`.
    pub fn wait_for_console(&self, text: &str, within: Duration) -> Result<(), Failed> {
        let found = self
            .console
            .wait_for(within, text, |console| console.contains(text).then_some(()));
        found.map_err(|error| format!("{error}; the console says:\n{}", self.console()).into())
    }

    /// Waits until the guest's ticker has written `count` lines.
    pub fn wait_for_ticks(&self, count: usize, within: Duration) -> Result<(), Failed> {
        let enough = |console: &mut String| (console.matches("tick").count() >= count).then_some(());
        self.console
            .wait_for(within, "the guest's ticker", enough)
            .map_err(|error| error.to_string().into())
    }

    /// The shell of the guest that was started last.
    pub fn shell(&self) -> Result<GuestShell, Failed> {
        let stream = self
            .streams
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front();
        let stream = stream.ok_or("the guest has no port")?;
        let shell = GuestShell::connect(stream, BOOT_WITHIN);
        shell.map_err(|error| format!("{error}; the console says:\n{}", self.console()).into())
    }
}

struct ConsoleWriter(Arc<Signal<String>>);

impl Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .update(|text| text.push_str(&String::from_utf8_lossy(bytes)));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl HostDevices for TestHost {
    fn serial_output(&self, _vm: &VmConfig) -> io::Result<Box<dyn Write + Send>> {
        Ok(Box::new(ConsoleWriter(self.console.clone())))
    }

    fn ports(&self, _vm: &VmConfig) -> io::Result<Vec<HostPort>> {
        let (ours, stream) = UnixStream::pair()?;
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams.clear();
        streams.push_back(ours);
        let name = PortName::new(PORT_NAME).map_err(io::Error::other)?;
        Ok(vec![HostPort {
            name,
            console: false,
            stream,
        }])
    }
}

/// A VM with what a test needs to ask it.
pub struct Guest {
    pub vm: Vm,
    pub host: TestHost,
    pub events: EventStream,
}

/// The configuration of a small guest of Debian's cloud kernel (ELF).
pub fn small(name: &str) -> Result<VmConfigBuilder, Failed> {
    let kernel = GuestKernel::find(Flavour::Cloud)?;
    Ok(VmConfig::builder(name, &kernel.elf)
        .initrd(&kernel.initramfs)
        .cmdline(CMDLINE)
        .startup_bytes(256 << 20))
}

impl Guest {
    /// Makes and starts the VM of `builder`.
    pub fn start(builder: VmConfigBuilder) -> Result<Self, Failed> {
        let guest = Self::make(builder)?;
        done(guest.vm.start())?;
        Ok(guest)
    }

    /// Makes the VM of `builder` and leaves it off.
    pub fn make(builder: VmConfigBuilder) -> Result<Self, Failed> {
        Self::make_sharing(builder, HostMemory::default())
    }

    /// The same, of a VM that shares what the host can promise with others.
    pub fn make_sharing(builder: VmConfigBuilder, memory: HostMemory) -> Result<Self, Failed> {
        let host = TestHost::default();
        Self::make_on(builder, host.clone(), host, memory)
    }

    /// The same, with devices whose host side is `devices`, which has the console and the shell's port of `host`.
    pub fn make_on(
        builder: VmConfigBuilder,
        host: TestHost,
        devices: impl HostDevices + 'static,
        memory: HostMemory,
    ) -> Result<Self, Failed> {
        let platform = KvmPlatform::with_memory(devices, memory);
        let vm = Vm::new(builder.build()?, Arc::new(platform))?;
        let events = vm.events();
        Ok(Self { vm, host, events })
    }

    /// Makes and starts the VM of `builder` and waits until its init serves commands.
    pub fn boot(builder: VmConfigBuilder) -> Result<(Self, GuestShell), Failed> {
        let guest = Self::start(builder)?;
        let shell = guest.shell()?;
        Ok((guest, shell))
    }

    /// What the unit `name` tells of itself.
    pub fn unit(&self, name: impl ToString) -> Result<Value, Failed> {
        let unit = self.vm.inspect()?["machine"]["units"][name.to_string()].clone();
        if unit.is_null() {
            return Err(format!("there is no unit {}", name.to_string()).into());
        }
        Ok(unit)
    }

    /// Waits until the init of the guest that was started last serves commands.
    pub fn shell(&self) -> Result<GuestShell, Failed> {
        match self.host.shell() {
            Ok(shell) => Ok(shell),
            Err(error) => Err(format!("{error:?}\n{:#}", self.vm.inspect()?).into()),
        }
    }

    /// Waits for the end of the guest and tells its cause.
    pub fn end(&self, within: Duration) -> Result<EndCause, Failed> {
        loop {
            let event = self.events.next(within);
            let event =
                event.ok_or_else(|| format!("no end in time; the console says:\n{}", self.host.console()))?;
            if let EventKind::Ended { cause } = event.kind {
                return Ok(cause);
            }
        }
    }

    /// Waits for a state.
    pub fn wait_for(&self, state: State) -> Result<(), Failed> {
        if self.vm.wait_for(state, WITHIN) {
            return Ok(());
        }
        Err(format!(
            "the vm is {}, not {state}; the console says:\n{}",
            self.vm.state(),
            self.host.console()
        )
        .into())
    }
}

/// Waits for the outcome of an operation, which must be done.
pub fn done(operation: Result<Operation, RequestError>) -> Result<(), Failed> {
    let operation = operation?;
    match operation.wait(BOOT_WITHIN) {
        Some(Outcome::Done) => Ok(()),
        Some(outcome) => Err(format!("{operation:?}: {outcome}").into()),
        None => Err(format!("{operation:?} has not ended").into()),
    }
}
