//! A memory BAR on the bus: it answers where the guest put it, as long as that is inside its segment's window.
//!
//! The registers are the configuration space's; this file keeps the bus claim in step with them. An address outside
//! the window or on top of another device is simply not answered, as on a PC.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::bus::{Bus, BusClaim, BusDevice, BusError};

/// One 32-bit memory BAR.
pub struct MemoryBar {
    bus: Bus,
    size_bytes: u64,
    window: Range<u64>,
    mapped: Option<(u64, BusClaim)>,
}

impl fmt::Debug for MemoryBar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryBar({:?}+{:#x})", self.address(), self.size_bytes)
    }
}

/// Why a BAR is not answered where the guest put it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BarError {
    /// The address is not in the window of the device's segment.
    #[error("bar at {address:#x}+{size_bytes:#x} is outside its segment's window {start:#x}-{end:#x}")]
    OutsideWindow {
        address: u64,
        size_bytes: u64,
        start: u64,
        end: u64,
    },
    /// The address is impossible or another device answers there.
    #[error(transparent)]
    Bus(#[from] BusError),
}

impl MemoryBar {
    /// Makes a BAR of `size_bytes` that may lie anywhere in `window` of `bus`. It answers nowhere yet.
    pub fn new(bus: Bus, size_bytes: u64, window: Range<u64>) -> Self {
        Self {
            bus,
            size_bytes,
            window,
            mapped: None,
        }
    }

    /// Where the BAR answers now.
    pub fn address(&self) -> Option<u64> {
        self.mapped.as_ref().map(|(address, _)| *address)
    }

    /// Takes the BAR off the bus.
    pub fn remove(&mut self) {
        self.mapped = None;
    }

    /// Moves the BAR to `wanted` (`None`: nowhere), answered by `device`. Tells whether it moved.
    ///
    /// # Errors
    /// [`BarError`] when nothing can answer there; the BAR then answers nowhere, and asking again may succeed.
    pub fn place(&mut self, wanted: Option<u64>, device: &Arc<dyn BusDevice>) -> Result<bool, BarError> {
        if wanted == self.address() {
            return Ok(false);
        }
        let moved = self.mapped.take().is_some();
        let Some(address) = wanted else {
            return Ok(moved);
        };
        let Range { start, end } = self.window;
        let inside = address >= start && end.saturating_sub(address) >= self.size_bytes;
        if !inside {
            return Err(BarError::OutsideWindow {
                address,
                size_bytes: self.size_bytes,
                start,
                end,
            });
        }
        let claim = self.bus.claim(address, self.size_bytes, device.clone())?;
        self.mapped = Some((address, claim));
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Silent;

    impl BusDevice for Silent {
        fn read(&self, _offset: u64, _data: &mut [u8]) {}
        fn write(&self, _offset: u64, _data: &[u8]) {}
    }

    #[test]
    fn a_bar_answers_in_its_window_only_and_never_in_two_places() {
        let bus = Bus::new();
        let device: Arc<dyn BusDevice> = Arc::new(Silent);
        let mut bar = MemoryBar::new(bus.clone(), 0x1000, 0x10_0000..0x20_0000);
        assert_eq!(bar.place(Some(0x10_0000), &device), Ok(true));
        assert_eq!(bar.place(Some(0x10_0000), &device), Ok(false));
        assert_eq!(bar.place(Some(0x1F_F000), &device), Ok(true));
        assert_eq!((bus.range_count(), bus.write(0x10_0000, &[1])), (1, false));
        for outside in [0, 0xF_F000, 0x20_0000, 0x1F_F800, u64::MAX - 0xFFF] {
            let error = bar.place(Some(outside), &device).expect_err("outside");
            assert!(
                error
                    .to_string()
                    .ends_with("is outside its segment's window 0x100000-0x200000"),
                "{error}"
            );
            assert_eq!((bar.address(), bus.range_count()), (None, 0));
        }
    }

    #[test]
    fn an_overlapping_bar_answers_when_the_other_has_gone() {
        let bus = Bus::new();
        let device: Arc<dyn BusDevice> = Arc::new(Silent);
        let mut first = MemoryBar::new(bus.clone(), 0x1000, 0..0x10_0000);
        let mut second = MemoryBar::new(bus.clone(), 0x2000, 0..0x10_0000);
        assert_eq!(first.place(Some(0x1000), &device), Ok(true));
        let error = second.place(Some(0), &device).expect_err("taken");
        assert_eq!(error.to_string(), "range 0x0+0x2000 overlaps 0x1000+0x1000");
        assert_eq!(first.place(None, &device), Ok(true));
        assert_eq!(second.place(Some(0), &device), Ok(true));
    }
}
