//! A stand-in for the host's VM, for tests and fuzzing of the layers above KVM. It counts, and refuses what a
//! test asks it to.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{kvm_irq_routing_entry, kvm_userspace_memory_region};
use vmm_sys_util::eventfd::EventFd;

use super::HostVm;

/// A VM that only keeps books.
#[derive(Default)]
pub struct FakeVm {
    books: Mutex<Books>,
}

#[derive(Default)]
struct Books {
    irqfds: Vec<(i32, u32)>,
    ioevents: Vec<(i32, u64)>,
    memslots: Vec<u32>,
    routing_count: usize,
    refuses_slots: bool,
    refuses_deletes: bool,
}

impl FakeVm {
    /// The number of irqfds that are registered now.
    pub fn irqfd_count(&self) -> usize {
        self.books().irqfds.len()
    }

    /// The addresses of the ioeventfds that are registered now.
    pub fn ioevent_addresses(&self) -> Vec<u64> {
        self.books()
            .ioevents
            .iter()
            .map(|(_, address)| *address)
            .collect()
    }

    /// The number of memslots in use now.
    pub fn memslot_count(&self) -> usize {
        self.books().memslots.len()
    }

    /// From now on no memslot can be made, or can.
    pub fn refuse_slots(&self, refuses: bool) {
        self.books().refuses_slots = refuses;
    }

    /// From now on no memslot can be deleted, or can.
    pub fn refuse_deletes(&self, refuses: bool) {
        self.books().refuses_deletes = refuses;
    }

    /// How often the routing table was written.
    pub fn routing_count(&self) -> usize {
        self.books().routing_count
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HostVm for FakeVm {
    fn set_memslot(&self, region: kvm_userspace_memory_region) -> io::Result<()> {
        let mut books = self.books();
        let refused = match region.memory_size {
            0 => books.refuses_deletes,
            _ => books.refuses_slots,
        };
        if refused {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        books.memslots.retain(|slot| *slot != region.slot);
        if region.memory_size != 0 {
            books.memslots.push(region.slot);
        }
        Ok(())
    }

    fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> io::Result<()> {
        self.books().irqfds.push((fd.as_raw_fd(), gsi));
        Ok(())
    }

    fn unregister_irqfd(&self, fd: &EventFd, gsi: u32) -> io::Result<()> {
        self.books()
            .irqfds
            .retain(|entry| *entry != (fd.as_raw_fd(), gsi));
        Ok(())
    }

    fn set_line(&self, _gsi: u32, _active: bool) -> io::Result<()> {
        Ok(())
    }

    fn set_gsi_routing(&self, _entries: &[kvm_irq_routing_entry]) -> io::Result<()> {
        self.books().routing_count += 1;
        Ok(())
    }

    fn register_ioevent(&self, fd: &EventFd, address: u64) -> io::Result<()> {
        let mut books = self.books();
        if books.ioevents.iter().any(|(_, taken)| *taken == address) {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        books.ioevents.push((fd.as_raw_fd(), address));
        Ok(())
    }

    fn unregister_ioevent(&self, fd: &EventFd, address: u64) -> io::Result<()> {
        self.books()
            .ioevents
            .retain(|entry| *entry != (fd.as_raw_fd(), address));
        Ok(())
    }
}
