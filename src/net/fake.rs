//! A stand-in for the host's network, for tests and fuzzing of the layers above: every queue pair is a pair of
//! datagram sockets, one packet with its header per datagram. The far end is in the test's hands.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;

use serde_json::{Value, json};
use vm_memory::{Bytes, VolatileSlice};

use super::{NetBackend, Offloads, PACKET_MAX_BYTES};

/// A backend whose packets go to sockets of the same process.
pub struct FakeNet {
    sockets: Vec<UnixDatagram>,
    active_pair_count: u16,
    receive_offloads: Offloads,
}

impl FakeNet {
    /// Makes a backend of `pair_count` pairs and returns its far ends in the order of the pairs. Neither end blocks.
    ///
    /// # Errors
    /// The host's error when it has no more descriptors.
    pub fn new(pair_count: u16) -> io::Result<(Self, Vec<UnixDatagram>)> {
        let mut sockets = Vec::new();
        let mut far_ends = Vec::new();
        for _ in 0..pair_count {
            let (near, far) = UnixDatagram::pair()?;
            near.set_nonblocking(true)?;
            far.set_nonblocking(true)?;
            sockets.push(near);
            far_ends.push(far);
        }
        let backend = Self {
            sockets,
            active_pair_count: pair_count,
            receive_offloads: Offloads::default(),
        };
        Ok((backend, far_ends))
    }

    fn socket(&self, pair_index: u16) -> io::Result<&UnixDatagram> {
        self.sockets
            .get(usize::from(pair_index))
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
    }
}

impl NetBackend for FakeNet {
    fn queue_pair_count(&self) -> u16 {
        self.sockets.len() as u16
    }

    fn readiness(&self, pair_index: u16) -> BorrowedFd<'_> {
        self.sockets[usize::from(pair_index)].as_fd()
    }

    fn transmit_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn receive_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn set_receive_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.receive_offloads = offloads;
        Ok(())
    }

    fn set_active_pair_count(&mut self, count: u16) -> io::Result<()> {
        self.active_pair_count = count;
        Ok(())
    }

    fn receive(&mut self, pair_index: u16, buffers: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let mut packet = vec![0; PACKET_MAX_BYTES];
        let length = self.socket(pair_index)?.recv(&mut packet)?;
        let mut rest = &packet[..length];
        for buffer in buffers {
            let part = rest.len().min(buffer.len());
            buffer.copy_from(&rest[..part]);
            rest = &rest[part..];
        }
        Ok(length - rest.len())
    }

    fn transmit(&mut self, pair_index: u16, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let mut packet = Vec::new();
        for buffer in buffers {
            let start = packet.len();
            packet.resize(start + buffer.len(), 0);
            buffer
                .read_slice(&mut packet[start..], 0)
                .map_err(io::Error::other)?;
        }
        self.socket(pair_index)?.send(&packet)?;
        Ok(())
    }

    fn inspect(&self) -> Value {
        json!({
            "kind": "fake",
            "active_pair_count": self.active_pair_count,
            "receive_offloads": self.receive_offloads,
        })
    }
}
