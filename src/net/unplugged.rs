//! What a card has for a backend when its own was taken away: no packet comes, none gets anywhere.
//!
//! It looks to the driver as the one before did, with as many queue pairs and the same offloads.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use serde_json::{Value, json};
use vm_memory::VolatileSlice;

use super::{NetBackend, Offloads};

/// No backend any more.
pub struct Unplugged {
    pair_count: u16,
    transmit_offloads: Offloads,
    receive_offloads: Offloads,
    /// Stands for the pairs' descriptor and is never watched: the card knows that its backend is lost. The process has
    /// it already, since there may be no other to be had.
    unwatched: io::Stdin,
}

impl Unplugged {
    /// Stands for `backend`.
    pub fn like(backend: &dyn NetBackend) -> Self {
        Self {
            pair_count: backend.queue_pair_count(),
            transmit_offloads: backend.transmit_offloads(),
            receive_offloads: backend.receive_offloads(),
            unwatched: io::stdin(),
        }
    }
}

impl NetBackend for Unplugged {
    fn queue_pair_count(&self) -> u16 {
        self.pair_count
    }

    fn readiness(&self, _pair_index: u16) -> BorrowedFd<'_> {
        self.unwatched.as_fd()
    }

    fn transmit_offloads(&self) -> Offloads {
        self.transmit_offloads
    }

    fn receive_offloads(&self) -> Offloads {
        self.receive_offloads
    }

    fn set_receive_offloads(&mut self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_active_pair_count(&mut self, _count: u16) -> io::Result<()> {
        Ok(())
    }

    fn receive(&mut self, _pair_index: u16, _buffers: &[VolatileSlice<'_>]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn transmit(&mut self, _pair_index: u16, _buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        Ok(())
    }

    fn inspect(&self) -> Value {
        json!({ "kind": "unplugged" })
    }
}
