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

/// Zeros where a device answered, if it did, for as long as this lives.
struct Leftover(Option<(Range<u64>, BusClaim)>);

/// What stands for the device that answered at `range` of `mmio`.
///
/// # Errors
/// [`BusError`] when something else answers there.
pub(super) fn restored(mmio: &Bus, range: Option<Range<u64>>) -> Result<Box<dyn Orphan>, BusError> {
    let claim = |range: Range<u64>| {
        let len = range.end.saturating_sub(range.start);
        let claim = mmio.claim(range.start, len, Arc::new(Zeros))?;
        Ok((range, claim))
    };
    Ok(Box::new(Leftover(range.map(claim).transpose()?)))
}

impl Orphan for Leftover {
    fn bar_range(&self) -> Option<Range<u64>> {
        self.0.as_ref().map(|(range, _)| range.clone())
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
