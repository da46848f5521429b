//! KVM and nothing above it: the host's VM, its memslots, interrupts, ioeventfds and vCPUs.

pub mod caps;
pub mod clock;
pub mod fake;
pub mod gsi;
pub mod ioevents;
pub mod irqchip;
pub mod kvm;
pub mod memslots;
pub mod saved;
pub mod vcpu;

use std::io;

use kvm_bindings::{kvm_irq_routing_entry, kvm_userspace_memory_region};
use vmm_sys_util::eventfd::EventFd;

/// What the layers above need of the host's VM. Implemented by KVM and, for tests, by [`fake::FakeVm`].
pub trait HostVm: Send + Sync {
    /// Sets, changes or (with size 0) deletes a memslot.
    ///
    /// # Errors
    /// The host's error, for example `ENOSPC` when all memslots are in use.
    fn set_memslot(&self, region: kvm_userspace_memory_region) -> io::Result<()>;

    /// Raises `gsi` whenever `fd` is written.
    ///
    /// # Errors
    /// The host's error.
    fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> io::Result<()>;

    /// Undoes [`HostVm::register_irqfd`].
    ///
    /// # Errors
    /// The host's error.
    fn unregister_irqfd(&self, fd: &EventFd, gsi: u32) -> io::Result<()>;

    /// Makes the pin `gsi` active, or inactive; it stays so.
    ///
    /// # Errors
    /// The host's error.
    fn set_line(&self, gsi: u32, active: bool) -> io::Result<()>;

    /// Replaces the whole interrupt routing table.
    ///
    /// # Errors
    /// The host's error; the former table stays.
    fn set_gsi_routing(&self, entries: &[kvm_irq_routing_entry]) -> io::Result<()>;

    /// Makes `fd` readable at every guest write to `address`.
    ///
    /// # Errors
    /// The host's error, `EEXIST` when the address is taken.
    fn register_ioevent(&self, fd: &EventFd, address: u64) -> io::Result<()>;

    /// Undoes [`HostVm::register_ioevent`].
    ///
    /// # Errors
    /// The host's error.
    fn unregister_ioevent(&self, fd: &EventFd, address: u64) -> io::Result<()>;
}
