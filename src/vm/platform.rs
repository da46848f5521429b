//! What a supervisor needs of the machine under it. KVM is one platform; the fake for tests and fuzzing is another.

use std::sync::Arc;

use serde_json::Value;

use crate::boot::BootError;
use crate::bus::BusError;
use crate::config::{NicConfig, VmConfig};
use crate::event_loop::LoopError;
use crate::ids::{DiskName, NicName, UnitName};
use crate::machine::gsi::GsiError;
use crate::machine::kvm::KvmError;
use crate::machine::memslots::MemslotError;
use crate::machine::vcpu::VcpuError;
use crate::memory::host::HostMemoryError;
use crate::memory::region::RamError;
use crate::net::tap::TapError;
use crate::pci::root::PciRootError;
use crate::pci::slots::SlotError;
use crate::storage::OpenError;
use crate::unit::PauseTicket;
use crate::virtio::balloon::BalloonError;
use crate::virtio::console::{ConnectError, ConsoleError};
use crate::virtio::mem::MemError;
use crate::virtio::net::NetError;
use crate::virtio::transport::TransportError;
use crate::vm::memory::machine::MachineMemory;
use crate::vm::thread_role::ThreadRole;

pub use crate::vm::mailbox::Mailbox;

/// Makes machines.
pub trait Platform: Send + Sync {
    /// Checks that the host could build the machine of `config` now; takes nothing that it does not give back.
    ///
    /// # Errors
    /// [`BuildError`], as [`Platform::build`] would.
    fn check(&self, config: &VmConfig) -> Result<(), BuildError>;

    /// Builds the machine of `config`, ready to run its guest from power-on. Called on a worker thread, may wait for
    /// disks. The machine reports to `mailbox`.
    ///
    /// # Errors
    /// [`BuildError`] names what the host or a file refuses; nothing is left behind.
    fn build(&self, config: &VmConfig, mailbox: Mailbox) -> Result<Arc<dyn Machine>, BuildError>;

    /// A thread of a VM begins, the calling one, before it does anything of its role.
    fn thread_started(&self, _role: ThreadRole) {}
}

/// A built machine. No verb waits for the guest or a disk, except [`Machine::reset`] and the drop, which happen on
/// worker threads.
pub trait Machine: Send + Sync {
    /// The number of vCPUs; [`Machine::park_vcpus`] is answered by that many reports.
    fn vcpu_count(&self) -> u32;

    /// Lets every vCPU run.
    fn run_vcpus(&self);

    /// Makes every vCPU stand still soon; each reports [`Mailbox::vcpu_parked`].
    fn park_vcpus(&self);

    /// Pauses every unit; called when all vCPUs are parked. Each keeps a clone of `ticket` until it is quiet.
    fn pause_units(&self, ticket: PauseTicket);

    /// Resumes every unit; called before the vCPUs run again.
    fn resume_units(&self);

    /// Returns to power-on with the guest's kernel loaded anew. Called when everything is parked and quiet.
    ///
    /// # Errors
    /// [`BuildError`] when the kernel cannot be loaded again.
    fn reset(&self) -> Result<(), BuildError>;

    /// Presses the ACPI power button.
    fn press_power_button(&self);

    /// Types `bytes` into the serial port; returns how many were taken.
    fn serial_input(&self, bytes: &[u8]) -> usize;

    /// Tells every vCPU to stop for good. May be called more than once. Dropping the machine afterwards waits for their threads.
    fn tear_down(&self);

    /// The guest's memory, as far as it changes at run time.
    fn memory(&self) -> &dyn MachineMemory;

    /// Adds a network card; the guest could see it when it is whole, but is not told. Called on a worker thread, may
    /// wait for the host.
    ///
    /// # Errors
    /// [`BuildError`] names what the host refuses; nothing is left behind.
    fn add_nic(&self, nic: &NicConfig) -> Result<(), BuildError>;

    /// Asks the guest to look at the device, which is new.
    fn announce(&self, unit: &UnitName);

    /// Asks the guest to let go of the device; it answers with [`Mailbox::ejected`], when it likes. `false` when it
    /// sees no such device.
    fn request_eject(&self, unit: &UnitName) -> bool;

    /// Withdraws a request to let go of the device and asks the guest to look at it again, also if it has let go of it
    /// unasked. `false` when there is no such device, or the guest has let go of it as it was asked to.
    fn offer(&self, unit: &UnitName) -> bool;

    /// Gives back everything of the device, whether the guest has let go of it or not. Called on a worker thread.
    /// `false` when there is no such device.
    fn remove_device(&self, unit: &UnitName) -> bool;

    /// Shows the guest another name of the network card.
    fn rename_nic(&self, unit: &UnitName, name: &NicName);

    /// Plugs the cable of the network card in, or pulls it out.
    fn set_link(&self, unit: &UnitName, up: bool);

    /// What is known of the devices.
    fn devices(&self) -> Vec<DeviceStatus>;

    /// What the machine is doing, for people and tools.
    fn inspect(&self) -> Value;
}

/// What is known of one disk or network card of a running machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceStatus {
    /// The name of its unit.
    pub unit: UnitName,
    /// Whether a driver in the guest has it.
    pub driver_ready: bool,
}

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// KVM is not there, not permitted or cannot do what is needed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The host's KVM has no room for that many vCPUs.
    #[error("{count} vcpus exceed the host's maximum of {count_max}")]
    Vcpus { count: u32, count_max: u32 },
    /// The memory device cannot be made.
    #[error(transparent)]
    Mem(#[from] MemError),
    /// The balloon cannot be made.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// A vCPU cannot be made.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The RAM cannot be had.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The RAM, with what other VMs have, exceeds a limit.
    #[error(transparent)]
    HostMemory(#[from] HostMemoryError),
    /// The RAM cannot be shown to the guest.
    #[error(transparent)]
    Memslot(#[from] MemslotError),
    /// Kernel, initrd or command line cannot be used.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A disk cannot be opened.
    #[error("disk {name} cannot be used")]
    Disk {
        name: DiskName,
        #[source]
        source: OpenError,
    },
    /// A network card's backend cannot be opened.
    #[error("network card {name} cannot be used")]
    Nic {
        name: NicName,
        #[source]
        source: TapError,
    },
    /// A network card cannot be made of its backend.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The console cannot be made.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// A port of the console cannot be connected.
    #[error(transparent)]
    Port(#[from] ConnectError),
    /// The device event loop cannot be started.
    #[error(transparent)]
    EventLoop(#[from] LoopError),
    /// An interrupt cannot be connected.
    #[error(transparent)]
    Gsi(#[from] GsiError),
    /// A device's addresses are taken.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The PCI segments cannot be made.
    #[error(transparent)]
    Pci(#[from] PciRootError),
    /// A PCI slot cannot be used.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// A device cannot be put behind its PCI transport.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The code that builds or resets panicked, for example in the embedder's host devices.
    #[error("the thread that prepares the machine panicked")]
    Panicked,
    /// The host refused something.
    #[error("the host refused {what}")]
    Host {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
}
