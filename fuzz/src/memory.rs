//! A host for the memory device and the balloon that keeps books and checks what it is asked.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vm_lifecycle::virtio::balloon::{Balloon, BalloonConfig, BalloonHost, BalloonStats, PAGE_BYTES};
use vm_lifecycle::virtio::mem::{BLOCK_BYTES, Mem, MemConfig, MemHost, PlugError};

/// Start-up RAM with a hole, and what is plugged behind it.
pub const RAM: [Range<u64>; 2] = [0..0x4000_0000, 0x1_0000_0000..0x1_0800_0000];
pub const REGION: Range<u64> = 0x1_0800_0000..0x1_4800_0000;

/// The host. It refuses everything while it is stuck.
#[derive(Debug, Default)]
pub struct Books {
    pub stuck: AtomicBool,
    plugged: Mutex<BTreeSet<u64>>,
}

impl Books {
    /// What is plugged, in bytes.
    pub fn plugged_bytes(&self) -> u64 {
        self.plugged.lock().expect("no panic while locked").len() as u64 * BLOCK_BYTES
    }

    /// A memory device on this host.
    pub fn mem(self: &Arc<Self>) -> Mem {
        let config = MemConfig {
            address: REGION.start,
            region_bytes: REGION.end - REGION.start,
            ram_bytes: 1 << 30,
            slot_bytes: 128 << 20,
        };
        Mem::new(config, self.clone()).expect("a good region")
    }

    /// A balloon on this host.
    pub fn balloon(self: &Arc<Self>) -> Balloon {
        let config = BalloonConfig {
            ram: RAM.into(),
            plugged: Some(REGION),
            deflate_on_oom: true,
            free_page_reporting: true,
        };
        Balloon::new(config, self.clone()).expect("good memory")
    }

    fn blocks(offset: u64, length_bytes: u64) -> Range<u64> {
        let end = offset.checked_add(length_bytes).expect("in the region");
        assert!(
            length_bytes > 0 && end <= REGION.end - REGION.start,
            "outside the region"
        );
        assert_eq!((offset | length_bytes) % BLOCK_BYTES, 0, "not whole blocks");
        offset / BLOCK_BYTES..end / BLOCK_BYTES
    }

    fn check_pages(address: u64, length_bytes: u64) {
        let end = address.checked_add(length_bytes).expect("in memory");
        let mut memory = RAM.into_iter().chain([REGION]);
        let inside = memory.any(|range| range.start <= address && end <= range.end);
        assert!(
            length_bytes > 0 && inside,
            "{address:#x}+{length_bytes:#x} is outside memory"
        );
        assert_eq!((address | length_bytes) % PAGE_BYTES, 0, "not whole pages");
    }
}

impl MemHost for Books {
    fn plug(&self, offset: u64, length_bytes: u64) -> Result<(), PlugError> {
        if self.stuck.load(Ordering::Relaxed) {
            let what = "memslots";
            return Err(PlugError::Exhausted { what, limit: 0 });
        }
        let mut plugged = self.plugged.lock().expect("no panic while locked");
        for block in Self::blocks(offset, length_bytes) {
            assert!(plugged.insert(block), "block {block} is plugged twice");
        }
        Ok(())
    }

    fn unplug(&self, offset: u64, length_bytes: u64) -> Result<(), PlugError> {
        if self.stuck.load(Ordering::Relaxed) {
            let what = "memslots";
            return Err(PlugError::Exhausted { what, limit: 0 });
        }
        let mut plugged = self.plugged.lock().expect("no panic while locked");
        let blocks = Self::blocks(offset, length_bytes);
        plugged.retain(|block| !blocks.contains(block));
        Ok(())
    }

    fn changed(&self, plugged_bytes: u64) {
        assert_eq!(
            plugged_bytes,
            self.plugged_bytes(),
            "the device believes in another amount"
        );
    }
}

impl BalloonHost for Books {
    fn discard(&self, address: u64, length_bytes: u64) -> io::Result<()> {
        Self::check_pages(address, length_bytes);
        if self.stuck.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(4));
        }
        Ok(())
    }

    fn changed(&self, ballooned_bytes: u64) {
        let ram_bytes: u64 = RAM.iter().map(|range| range.end - range.start).sum();
        assert!(ballooned_bytes <= ram_bytes, "more in the balloon than there is");
    }

    fn stats(&self, _stats: BalloonStats) {}

    fn hinted(&self, address: u64, length_bytes: u64) {
        Self::check_pages(address, length_bytes);
    }

    fn hinting_done(&self) {}
}
