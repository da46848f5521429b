//! Queue kicks that never leave the kernel: ioeventfds, registered as guards.
//!
//! A guest's write to a registered address makes the eventfd readable and resumes the vCPU at once.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::HostVm;

/// The ioeventfds of one VM.
#[derive(Clone)]
pub struct IoEvents {
    vm: Arc<dyn HostVm>,
    count: Arc<AtomicUsize>,
}

/// The host refused an ioeventfd.
#[derive(Debug, thiserror::Error)]
#[error("the host refused an ioeventfd at {address:#x}")]
pub struct IoEventError {
    /// The guest-physical address.
    pub address: u64,
    /// The host's error.
    #[source]
    pub source: io::Error,
}

impl IoEvents {
    /// Makes the ioeventfds of `vm`.
    pub fn new(vm: Arc<dyn HostVm>) -> Self {
        Self {
            vm,
            count: Arc::default(),
        }
    }

    /// The number of registered ioeventfds.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Makes `fd` readable at every write of any width to the memory-mapped `address`, until the guard is dropped.
    ///
    /// # Errors
    /// [`IoEventError`] when the host refuses, for example because the address is registered already.
    pub fn register(&self, address: u64, fd: Arc<EventFd>) -> Result<IoEvent, IoEventError> {
        self.vm
            .register_ioevent(&fd, address)
            .map_err(|source| IoEventError { address, source })?;
        self.count.fetch_add(1, Ordering::Relaxed);
        Ok(IoEvent {
            vm: self.vm.clone(),
            count: self.count.clone(),
            address,
            fd,
        })
    }
}

/// A registered ioeventfd; dropping it unregisters.
#[must_use = "dropping the guard unregisters the ioeventfd"]
pub struct IoEvent {
    vm: Arc<dyn HostVm>,
    count: Arc<AtomicUsize>,
    address: u64,
    fd: Arc<EventFd>,
}

impl fmt::Debug for IoEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoEvent({:#x})", self.address)
    }
}

impl Drop for IoEvent {
    fn drop(&mut self) {
        match self.vm.unregister_ioevent(&self.fd, self.address) {
            Ok(()) => {
                self.count.fetch_sub(1, Ordering::Relaxed);
            }
            // It counts still: the host has it.
            Err(error) => log::warn!("cannot unregister the ioeventfd at {:#x}: {error}", self.address),
        }
    }
}
