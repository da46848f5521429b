//! Boots a kernel, shows its serial console, and ends when the guest ends.
//!
//! ```text
//! cargo run --example boot -- KERNEL [INITRD] [COMMAND LINE]
//! ```

use std::io::{self, Write};
use std::path::absolute;
use std::sync::Arc;
use std::time::Duration;

use vm_lifecycle::config::VmConfig;
use vm_lifecycle::event::{EndCause, EventKind};
use vm_lifecycle::vm::Vm;
use vm_lifecycle::vm::host::{HostDevices, KvmPlatform};

/// Gives the guest this program's standard output as its serial port.
struct Terminal;

impl HostDevices for Terminal {
    fn serial_output(&self, _vm: &VmConfig) -> io::Result<Box<dyn Write + Send>> {
        Ok(Box::new(io::stdout()))
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let kernel = arguments
        .next()
        .ok_or("usage: boot KERNEL [INITRD] [COMMAND LINE]")?;
    let mut builder = VmConfig::builder("boot", absolute(kernel)?).startup_bytes(256 << 20);
    if let Some(initrd) = arguments.next() {
        builder = builder.initrd(absolute(initrd)?);
    }
    if let Some(cmdline) = arguments.next() {
        builder = builder.cmdline(cmdline);
    }

    let vm = Vm::new(builder.build()?, Arc::new(KvmPlatform::new(Terminal)))?;
    let events = vm.events();
    let started = vm
        .start()?
        .wait(Duration::MAX)
        .ok_or("the start goes on for ever")?;
    assert!(started.is_done(), "{started}");

    while let Some(event) = events.next(Duration::MAX) {
        if let EventKind::Ended { cause } = event.kind {
            eprintln!("the guest ended: {cause:?}");
            assert_eq!(
                cause,
                EndCause::GuestPowerOff,
                "the guest was to switch itself off"
            );
            return Ok(());
        }
    }
    Err("the vm went away without an end".into())
}
