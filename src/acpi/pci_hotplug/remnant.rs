//! What is left of a device that was taken by force, until the guest's driver has let go.
//!
//! A driver may be in the middle of anything. It takes registers that nobody answers for an answer of all ones: one of
//! virtio then waits for ever for the end of a reset (virtio 1.2 §4.1.4.3.2), and Linux's network driver for a command's
//! answer, without sleeping. So the device itself stays at its addresses, with nothing of the host behind it. In a restored
//! machine zeros stand for it: the driver's resets end, and that is all it is good for.

use std::ops::Range;
use std::sync::Arc;

use crate::bus::{Bus, BusClaim, BusDevice, BusError};
use crate::pci::device::Orphan;
use crate::unit::PauseTicket;

/// Zeros at the addresses of a device, for as long as this lives.
struct ZerosAt {
    range: Range<u64>,
    _claim: BusClaim,
}

/// A device that answered nowhere.
struct Nowhere;

/// What stands for the device that answered at `range` of `mmio`.
///
/// # Errors
/// [`BusError`] when something else answers there.
pub(super) fn restored(mmio: &Bus, range: Option<Range<u64>>) -> Result<Box<dyn Orphan>, BusError> {
    let Some(range) = range else {
        return Ok(Box::new(Nowhere));
    };
    let len = range.end.saturating_sub(range.start);
    let claim = mmio.claim(range.start, len, Arc::new(Zeros))?;
    Ok(Box::new(ZerosAt { range, _claim: claim }))
}

impl Orphan for ZerosAt {
    fn bar_range(&self) -> Option<Range<u64>> {
        Some(self.range.clone())
    }

    fn pause(&self, _ticket: PauseTicket) {}

    fn resume(&self) {}
}

impl Orphan for Nowhere {
    fn bar_range(&self) -> Option<Range<u64>> {
        None
    }

    fn pause(&self, _ticket: PauseTicket) {}

    fn resume(&self) {}
}

struct Zeros;

impl BusDevice for Zeros {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}
