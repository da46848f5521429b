//! Where a VM's devices get their host side from: the embedder's say in how a machine is built.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;

use crate::config::{DiskConfig, NicConfig, VmConfig};
use crate::ids::PortName;
use crate::net::NetBackend;
use crate::net::tap::{Tap, TapError};
use crate::storage::DiskBackend;
use crate::storage::{OpenError, RawConfig, RawDisk, RawEngine};
use crate::vm::thread_role::ThreadRole;

pub use crate::virtio::console::PORTS_MAX;
pub use crate::vm::builder::KvmPlatform;

/// Gives devices their host side. Asked anew at each start, on a worker thread, for the VM of the configuration that it
/// is shown: several VMs may share one. Every answer has a default, so an embedder says only what it wants otherwise.
pub trait HostDevices: Send + Sync {
    /// Where the serial port's output goes. It is written on a thread of its own and may block; output that it has no
    /// room for is lost and counted.
    ///
    /// # Errors
    /// The host's error; the start fails with it.
    fn serial_output(&self, _vm: &VmConfig) -> io::Result<Box<dyn Write + Send>> {
        Ok(Box::new(io::sink()))
    }

    /// The host's ends of the console device's ports, at most [`PORTS_MAX`]. Without ports there is no console device.
    ///
    /// # Errors
    /// The host's error; the start fails with it.
    fn ports(&self, _vm: &VmConfig) -> io::Result<Vec<HostPort>> {
        Ok(Vec::new())
    }

    /// The backend of a disk: by default the raw file or block device at its path.
    ///
    /// # Errors
    /// Why the disk cannot be opened.
    fn disk(&self, disk: &DiskConfig) -> Result<Box<dyn DiskBackend>, OpenError> {
        let config = RawConfig {
            path: disk.path.clone(),
            read_only: disk.read_only,
            engine: RawEngine::Auto,
        };
        Ok(Box::new(RawDisk::open(&config)?))
    }

    /// The backend of a network card: by default the tap of its configuration.
    ///
    /// # Errors
    /// Why the tap cannot be opened.
    fn nic(&self, nic: &NicConfig) -> Result<Box<dyn NetBackend>, TapError> {
        Ok(Box::new(Tap::open(&nic.tap, nic.queue_pairs)?))
    }

    /// A thread of a VM begins, the calling one, before it does anything of its role: the place to put a seccomp filter
    /// on it ([`ThreadRole::syscalls`]), a name, a priority or a set of CPUs. By default nothing is done.
    ///
    /// A panic is logged, and the thread goes on. An embedder that will not have a thread without its filter ends the
    /// process itself.
    fn thread_started(&self, _role: ThreadRole) {}
}

/// A port of the console device and the host's end of it.
#[derive(Debug)]
pub struct HostPort {
    /// The name the guest sees.
    pub name: PortName,
    /// Whether the port is a console (`/dev/hvc0`) rather than a byte channel.
    pub console: bool,
    /// The stream that the device reads and writes.
    pub stream: UnixStream,
}

/// The defaults of [`HostDevices`] and nothing else: raw disks, taps, no serial output, no ports.
#[derive(Debug, Clone, Copy, Default)]
pub struct DefaultHost;

impl HostDevices for DefaultHost {}
