//! The contract between a PCI slot and the function in it.
//!
//! The slot's segment decodes the ECAM and calls the function; a function knows neither its slot nor its segment from
//! here, and answers for the whole of its configuration space.

use std::ops::Range;

use crate::unit::PauseTicket;

/// A PCI function. Its configuration space is 4 KiB (PCI Express 5.0 §7.2.2).
///
/// Called on vCPU threads with the guest's values: no offset, length or content may make it panic or block.
pub trait PciDevice: Send + Sync {
    /// The guest reads `data.len()` bytes (1, 2 or 4, naturally aligned) at `offset` (0–4095).
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// The guest writes `data` (1, 2 or 4 bytes, naturally aligned) at `offset` (0–4095).
    fn config_write(&self, offset: u16, data: &[u8]);
}

/// What is left of a function that was taken out of its slot while the guest's driver was at it. It answers at its BAR as
/// before, so that the driver finds its end; dropping it takes that away.
pub trait Orphan: Send + Sync {
    /// The guest-physical addresses at which its registers answer, if they do.
    fn bar_range(&self) -> Option<Range<u64>>;

    /// Starts no more work; `ticket` is dropped when nothing is in flight.
    fn pause(&self, ticket: PauseTicket);

    /// Works again.
    fn resume(&self);
}
