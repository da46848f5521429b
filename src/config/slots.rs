//! Which PCI slot belongs to what: a pinned part for the platform, the rest for disks and network cards.
//!
//! An address is decided once, when a device enters the configuration, and persisted with it. The pinned part is an
//! ABI: `docs/memory-map.md` lists it.

use std::collections::BTreeMap;

use super::builder::ConfigError;
use crate::ids::Bdf;

/// PCI segments of a VM (`memory::layout::SEGMENT_COUNT`).
pub const SEGMENT_COUNT: u16 = 4;
/// The first slots of segment 0 belong to the platform: host bridge, entropy, console, and room for the platform's
/// memory devices. In the other segments only slot 0, which stays empty, does.
pub const PLATFORM_SLOT_COUNT: u8 = 8;
/// The address of the entropy device.
pub const RNG_BDF: Bdf = platform(1);
/// The address of the console.
pub const CONSOLE_BDF: Bdf = platform(2);
/// The address of the memory device.
pub const MEM_BDF: Bdf = platform(3);
/// The address of the balloon.
pub const BALLOON_BDF: Bdf = platform(4);

const fn platform(slot: u8) -> Bdf {
    assert!(slot < PLATFORM_SLOT_COUNT);
    match Bdf::new(0, slot) {
        Some(bdf) => bdf,
        None => panic!("the slot is below 32"),
    }
}

/// The slots that disks and network cards of one VM take.
#[derive(Default)]
pub struct Slots {
    taken: BTreeMap<Bdf, String>,
}

impl Slots {
    /// Gives `bdf` to `device`.
    ///
    /// # Errors
    /// [`ConfigError::SlotUnusable`] when no device of the user can be there, [`ConfigError::SlotTaken`] when one is.
    pub fn take(&mut self, bdf: Bdf, device: String) -> Result<(), ConfigError> {
        if bdf.segment() >= SEGMENT_COUNT || bdf.slot() < first_slot(bdf.segment()) {
            return Err(ConfigError::SlotUnusable { bdf, device });
        }
        if let Some(owner) = self.taken.get(&bdf) {
            return Err(ConfigError::SlotTaken {
                bdf,
                device,
                owner: owner.clone(),
            });
        }
        self.taken.insert(bdf, device);
        Ok(())
    }

    /// Gives `device` the first free slot, segment by segment.
    ///
    /// # Errors
    /// [`ConfigError::SlotsExhausted`].
    pub fn take_first_free(&mut self, device: String) -> Result<Bdf, ConfigError> {
        match user_slots().find(|bdf| !self.taken.contains_key(bdf)) {
            Some(bdf) => {
                self.taken.insert(bdf, device);
                Ok(bdf)
            }
            None => Err(ConfigError::SlotsExhausted {
                device,
                slot_count: user_slots().count(),
            }),
        }
    }
}

/// The first slot of `segment` that a disk or network card can have.
pub fn first_slot(segment: u16) -> u8 {
    if segment == 0 { PLATFORM_SLOT_COUNT } else { 1 }
}

fn user_slots() -> impl Iterator<Item = Bdf> {
    (0..SEGMENT_COUNT).flat_map(|segment| {
        (first_slot(segment)..Bdf::SLOT_COUNT).filter_map(move |slot| Bdf::new(segment, slot))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout;

    #[test]
    fn the_segments_are_those_of_the_machine() {
        assert_eq!(SEGMENT_COUNT, layout::SEGMENT_COUNT);
        // 64 network cards (the limit of Hyper-V 2019) and a fair number of disks.
        assert_eq!(user_slots().count(), 117);
    }

    #[test]
    fn slots_fill_segment_by_segment_and_then_run_out() {
        let mut slots = Slots::default();
        let mut addresses = Vec::new();
        let error = loop {
            match slots.take_first_free("disk x".to_owned()) {
                Ok(bdf) => addresses.push(bdf.to_string()),
                Err(error) => break error,
            }
        };
        assert_eq!(addresses[0], "0000:00:08.0");
        assert_eq!(addresses[23..25], ["0000:00:1f.0", "0001:00:01.0"]);
        assert_eq!(addresses.last().map(String::as_str), Some("0003:00:1f.0"));
        assert_eq!(
            error.to_string(),
            "no pci slot is left for disk x, all 117 are taken"
        );
    }

    #[test]
    fn platform_slots_and_taken_slots_are_refused() {
        let mut slots = Slots::default();
        let mut take = |bdf: &str| slots.take(bdf.parse().unwrap(), format!("disk at {bdf}"));
        assert_eq!(take("0000:00:08.0"), Ok(()));
        assert_eq!(take("0001:00:01.0"), Ok(()));
        for bdf in [
            CONSOLE_BDF.to_string().as_str(),
            "0000:00:07.0",
            "0002:00:00.0",
            "0004:00:08.0",
        ] {
            assert_eq!(
                take(bdf).unwrap_err().to_string(),
                format!(
                    "disk at {bdf} cannot be at {bdf}: slots 8 to 31 of segment 0 and 1 to 31 of segments 1 to 3 are free for devices"
                )
            );
        }
        assert_eq!(
            take("0000:00:08.0").unwrap_err().to_string(),
            "disk at 0000:00:08.0 cannot be at 0000:00:08.0: disk at 0000:00:08.0 is there"
        );
    }
}
