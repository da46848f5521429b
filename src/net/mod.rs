//! Where a network card's packets go: the [`NetBackend`] contract, the tap, and a stand-in for tests.
//!
//! `virtio::net` drives a backend from the device event loop and is its only caller. A packet is an Ethernet frame
//! behind a 12-byte `virtio_net_hdr` (virtio 1.2 §5.1.6); the header's checksum and segmentation fields pass through
//! unchanged in both directions. A backend never blocks and never sees a guest address.

pub mod fake;
pub mod tap;
pub mod unplugged;

use std::io;
use std::os::fd::BorrowedFd;

use serde::Serialize;
use serde_json::Value;
use vm_memory::VolatileSlice;

/// The size of `struct virtio_net_hdr` with `num_buffers` (virtio 1.2 §5.1.6).
pub const VIRTIO_NET_HDR_BYTES: usize = 12;

/// The largest packet with its header: 64 KiB of payload to be segmented, Ethernet header and VLAN tag.
pub const PACKET_MAX_BYTES: usize = VIRTIO_NET_HDR_BYTES + 14 + 4 + 65536;

/// The most queue pairs a card may have.
pub const QUEUE_PAIR_COUNT_MAX: u16 = 32;

/// The most buffers that one call of [`NetBackend::receive`] or [`NetBackend::transmit`] is given (Linux UIO_MAXIOV).
pub const BUFFER_COUNT_MAX: usize = 1024;

/// A host resource that takes and gives the packets of one network card.
///
/// A `pair_index` is always below [`NetBackend::queue_pair_count`].
pub trait NetBackend: Send {
    /// The number of queue pairs, 1 to [`QUEUE_PAIR_COUNT_MAX`]; fixed for the backend's life.
    fn queue_pair_count(&self) -> u16;

    /// The descriptor of pair `pair_index`: readable when a packet waits, writable when a transmission that would
    /// have blocked may be tried again. It stays open and the same for the backend's life. An error or hang-up on it
    /// means that the backend is lost for good; the card then shows its link as down.
    fn readiness(&self, pair_index: u16) -> BorrowedFd<'_>;

    /// What the backend takes over for packets that the guest transmits.
    fn transmit_offloads(&self) -> Offloads;

    /// What the backend can leave to the guest in packets that the guest receives.
    fn receive_offloads(&self) -> Offloads;

    /// Leaves exactly `offloads`, a subset of [`NetBackend::receive_offloads`], to the guest from now on. Called
    /// whenever a driver becomes ready.
    ///
    /// # Errors
    /// The host's error; the driver cannot use the card then.
    fn set_receive_offloads(&mut self, offloads: Offloads) -> io::Result<()>;

    /// Uses only the first `count` pairs (1 to [`NetBackend::queue_pair_count`]): no packet waits at another one.
    /// The descriptors of unused pairs are not watched.
    ///
    /// # Errors
    /// The host's error; the number of pairs in use is then as it was.
    fn set_active_pair_count(&mut self, count: u16) -> io::Result<()>;

    /// Moves the next packet of pair `pair_index`, header first, into `buffers` in order and returns the number of
    /// bytes moved. What does not fit is lost, so a return of the buffers' whole size may mean a cut packet. The
    /// header's `num_buffers` is left to the caller.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when no packet waits; any other error has used up the packet.
    fn receive(&mut self, pair_index: u16, buffers: &[VolatileSlice<'_>]) -> io::Result<usize>;

    /// Sends the packet that `buffers` hold, header first, through pair `pair_index`. The guest wrote all of it and
    /// may still be changing it: the header is checked by whoever acts on it.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when the packet has to be offered again once the descriptor is writable; with
    /// any other error the packet is dropped.
    fn transmit(&mut self, pair_index: u16, buffers: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// What the backend is, for people and tools.
    fn inspect(&self) -> Value;
}

/// Work on packets that one side leaves to the other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Offloads {
    /// TCP and UDP checksums may be partial.
    pub checksum: bool,
    /// TCP over IPv4 may come unsegmented; needs `checksum`.
    pub tso4: bool,
    /// TCP over IPv6 may come unsegmented; needs `checksum`.
    pub tso6: bool,
    /// Unsegmented TCP may carry ECN; needs `tso4` or `tso6`.
    pub ecn: bool,
}

impl Offloads {
    /// Everything.
    pub const ALL: Self = Self {
        checksum: true,
        tso4: true,
        tso6: true,
        ecn: true,
    };
}
