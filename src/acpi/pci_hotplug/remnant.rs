//! What is left at the addresses of a device that was taken by force, until the guest's driver has let go: zeros.
//!
//! A driver of virtio waits for its reset to be done, which a status of all ones never says (virtio 1.2 §4.1.4.3.2); it
//! would hold up every later hot-plug.

use std::ops::Range;
use std::sync::Arc;

use crate::bus::{Bus, BusClaim, BusDevice, BusError};

/// The zeros, for as long as it lives; where the device answered nowhere it is only remembered.
pub(super) struct Remnant {
    range: Option<(Range<u64>, BusClaim)>,
}

impl Remnant {
    /// Lets zeros answer at `range` of `mmio`.
    ///
    /// # Errors
    /// [`BusError`] when something else answers there.
    pub fn new(mmio: &Bus, range: Option<Range<u64>>) -> Result<Self, BusError> {
        let claim = |range: Range<u64>| {
            let len = range.end.saturating_sub(range.start);
            let claim = mmio.claim(range.start, len, Arc::new(Zeros))?;
            Ok((range, claim))
        };
        let range = range.map(claim).transpose()?;
        Ok(Self { range })
    }

    /// Where it answers, if it does.
    pub fn range(&self) -> Option<Range<u64>> {
        self.range.as_ref().map(|(range, _)| range.clone())
    }
}

struct Zeros;

impl BusDevice for Zeros {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}
