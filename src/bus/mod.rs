//! The bus: who answers a guest's access to a port or a memory-mapped address.
//!
//! A VM has two, one for ports and one for memory. vCPU threads look an address up and call the device with the
//! lock released, so a device may move its own range while it handles an access. An access that nobody answers, or
//! that crosses the end of a range, reads as all ones and is dropped when it writes, as on a PC.

mod range_map;

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock, Weak};

use range_map::RangeMap;

/// A device that answers accesses to a range of a bus. Offsets count from the start of the range.
///
/// Called on vCPU threads. The values are the guest's: no offset, length or content may make it panic or block.
pub trait BusDevice: Send + Sync {
    /// The guest reads `data.len()` bytes (1–8) at `offset`. `data` comes filled with ones.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` (1–8 bytes) at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// An address space of devices.
#[derive(Clone)]
pub struct Bus {
    ranges: Arc<RwLock<RangeMap<Arc<dyn BusDevice>>>>,
}

/// Why a range cannot be put on the bus.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range is empty or passes the end of the address space.
    #[error("range {base:#x}+{len:#x} is empty or passes the end of the address space")]
    Range { base: u64, len: u64 },
    /// Another device answers a part of the range.
    #[error("range {base:#x}+{len:#x} overlaps {other_base:#x}+{other_len:#x}")]
    Overlap {
        base: u64,
        len: u64,
        other_base: u64,
        other_len: u64,
    },
}

impl Default for Bus {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bus({} ranges)", self.range_count())
    }
}

impl Bus {
    /// Makes an empty bus.
    pub fn new() -> Self {
        Self {
            ranges: Arc::new(RwLock::new(RangeMap::new())),
        }
    }

    /// Lets `device` answer `len` addresses from `base` until the claim is dropped.
    ///
    /// # Errors
    /// [`BusError`] when the range is impossible or taken.
    pub fn claim(&self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<BusClaim, BusError> {
        self.ranges
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(base, len, device)?;
        Ok(BusClaim {
            ranges: Arc::downgrade(&self.ranges),
            base,
        })
    }

    /// Answers a guest's read; `data` is filled with ones where nobody does. Returns whether a device answered.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xFF);
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.read(offset, data);
                true
            }
            None => false,
        }
    }

    /// Delivers a guest's write. Returns whether a device took it.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }

    /// The number of ranges that are answered.
    pub fn range_count(&self) -> usize {
        self.ranges.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn find(&self, address: u64, length_bytes: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (base, len, device) = ranges.find(address)?;
        let offset = address - base;
        let fits = (length_bytes as u64) <= len - offset;
        fits.then(|| (offset, device.clone()))
    }
}

/// A range on the bus; dropping it takes the range off.
#[must_use = "dropping the claim takes the range off the bus"]
pub struct BusClaim {
    ranges: Weak<RwLock<RangeMap<Arc<dyn BusDevice>>>>,
    base: u64,
}

impl fmt::Debug for BusClaim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BusClaim({:#x})", self.base)
    }
}

impl Drop for BusClaim {
    fn drop(&mut self) {
        if let Some(ranges) = self.ranges.upgrade() {
            let mut held = ranges.write().unwrap_or_else(PoisonError::into_inner);
            let device = held.remove(self.base);
            drop(held);
            // The last reference to a device may go here, and with it claims of its own.
            drop(device);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.0
                .lock()
                .expect("no panic while locked")
                .push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_with_their_offset() {
        let bus = Bus::new();
        let device = Arc::new(Recorder(Mutex::new(Vec::new())));
        let _claim = bus.claim(0x1000, 0x10, device.clone()).expect("bus is empty");
        let mut data = [0; 2];
        assert!(bus.read(0x1004, &mut data));
        assert_eq!(data, [4, 4]);
        assert!(bus.write(0x100F, &[9]));
        assert_eq!(
            device.0.lock().expect("no panic while locked").as_slice(),
            [(0xF, vec![9])]
        );
    }

    #[test]
    fn a_device_that_goes_with_its_claim_may_hold_claims_itself() {
        struct Holder {
            _claim: Option<BusClaim>,
        }

        impl BusDevice for Holder {
            fn read(&self, _offset: u64, _data: &mut [u8]) {}
            fn write(&self, _offset: u64, _data: &[u8]) {}
        }

        let bus = Bus::new();
        let inner = bus
            .claim(0, 1, Arc::new(Holder { _claim: None }))
            .expect("bus is empty");
        let outer = bus
            .claim(1, 1, Arc::new(Holder { _claim: Some(inner) }))
            .expect("it is free");
        drop(outer);
        assert_eq!(bus.range_count(), 0);
    }

    #[test]
    fn nobody_reads_as_ones_and_a_straddling_access_reaches_nobody() {
        let bus = Bus::new();
        let device = Arc::new(Recorder(Mutex::new(Vec::new())));
        let claim = bus.claim(0x1000, 0x10, device).expect("bus is empty");
        let mut data = [0; 4];
        assert!(!bus.read(0x100E, &mut data));
        assert_eq!(data, [0xFF; 4]);
        assert!(!bus.write(0xFFF, &[1, 2]));
        drop(claim);
        assert!(!bus.write(0x1000, &[1]));
        assert_eq!(bus.range_count(), 0);
    }
}
