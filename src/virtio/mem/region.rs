//! The region: what is requested, what is usable, what is plugged, and what each request of the driver does to that.
//!
//! Called by the device, which owns the rings. Every number in a request comes from the guest. The order of a change
//! is: the host does it, then it is recorded, then the driver is told; a host that refuses leaves everything as it was.
//!
//! ```text
//! address        + plugged, anywhere in      + usable              + size
//! |███░░███░█░░░░|░░░░░░░░░░░░░░░░░░░░░░░░░░░|          never plugged|
//! ```

use std::ops::Range;
use std::sync::Arc;

use super::blocks::Blocks;
use super::host::{MemHost, PlugError};
use crate::guest_log::GuestLog;

/// The size and alignment of a block in bytes (`block_size`).
pub const BLOCK_BYTES: u64 = 2 << 20;
/// The region begins at a multiple of this and is a multiple of it, in bytes: the smallest memory block of Linux.
pub const REGION_ALIGN_BYTES: u64 = 128 << 20;
/// The largest region in bytes; its map of blocks takes 1 MiB.
pub const REGION_BYTES_MAX: u64 = 16 << 40;
/// From this much start-up RAM on, in bytes, Linux uses memory blocks of up to [`LARGE_MEMORY_BLOCK_BYTES`].
const LARGE_RAM_BYTES: u64 = 64 << 30;
const LARGE_MEMORY_BLOCK_BYTES: u64 = 2 << 30;

/// Where the region lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemConfig {
    /// The guest-physical address of the region, a multiple of [`REGION_ALIGN_BYTES`].
    pub address: u64,
    /// The size of the region in bytes, a multiple of [`REGION_ALIGN_BYTES`] up to [`REGION_BYTES_MAX`].
    pub region_bytes: u64,
    /// The start-up RAM in bytes, from which Linux derives the size of its memory blocks.
    pub ram_bytes: u64,
    /// The host shows the guest the region in slots of this size, each as a whole while a block in it is plugged.
    pub slot_bytes: u64,
}

/// Why a memory device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// Address or size of the region is not a multiple of the alignment, or the size is out of range.
    #[error(
        "a region of {region_bytes} bytes at {address:#x}: both must be multiples of {REGION_ALIGN_BYTES} bytes, \
         and the size from there to {REGION_BYTES_MAX} bytes"
    )]
    Region { address: u64, region_bytes: u64 },
    /// The host has no eventfd left.
    #[error("the host refused an eventfd for the memory device")]
    Host(#[source] std::io::Error),
}

/// Why an amount of memory cannot be requested.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestedError {
    /// The amount is not a multiple of the block size.
    #[error("{requested_bytes} bytes are not a multiple of the block size, {BLOCK_BYTES} bytes")]
    Granule { requested_bytes: u64 },
    /// The amount is larger than the region.
    #[error("{requested_bytes} bytes exceed the region of {region_bytes} bytes")]
    BeyondRegion { requested_bytes: u64, region_bytes: u64 },
}

/// The answer to a request (§5.15.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Response {
    Ack,
    /// The answer to a STATE request.
    State(BlockState),
    Nack,
    Busy,
    Error,
}

/// The state of several blocks together (§5.15.6.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BlockState {
    Plugged,
    Unplugged,
    Mixed,
}

/// The region and its blocks.
pub(super) struct Region {
    config: MemConfig,
    requested_bytes: u64,
    usable_bytes: u64,
    blocks: Blocks,
    host: Arc<dyn MemHost>,
}

impl Region {
    /// A region with nothing in it and nothing requested.
    ///
    /// # Errors
    /// [`MemError::Region`].
    pub(super) fn new(config: MemConfig, host: Arc<dyn MemHost>) -> Result<Self, MemError> {
        let MemConfig {
            address,
            region_bytes,
            ram_bytes: _,
            slot_bytes: _,
        } = config;
        let aligned = (address | region_bytes).is_multiple_of(REGION_ALIGN_BYTES);
        let sized = (REGION_ALIGN_BYTES..=REGION_BYTES_MAX).contains(&region_bytes);
        if !aligned || !sized || address.checked_add(region_bytes).is_none() {
            return Err(MemError::Region {
                address,
                region_bytes,
            });
        }
        Ok(Self {
            config,
            requested_bytes: 0,
            usable_bytes: 0,
            blocks: Blocks::new(region_bytes / BLOCK_BYTES),
            host,
        })
    }

    pub(super) fn config(&self) -> MemConfig {
        self.config
    }

    /// `requested_size`.
    pub(super) fn requested_bytes(&self) -> u64 {
        self.requested_bytes
    }

    /// `usable_region_size`.
    pub(super) fn usable_bytes(&self) -> u64 {
        self.usable_bytes
    }

    /// `plugged_size`.
    pub(super) fn plugged_bytes(&self) -> u64 {
        self.blocks.plugged_count() * BLOCK_BYTES
    }

    pub(super) fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// Changes what is requested; the usable part grows with it and does not shrink. Tells whether anything changed.
    ///
    /// # Errors
    /// [`RequestedError`].
    pub(super) fn set_requested(&mut self, requested_bytes: u64) -> Result<bool, RequestedError> {
        let region_bytes = self.config.region_bytes;
        if !requested_bytes.is_multiple_of(BLOCK_BYTES) {
            return Err(RequestedError::Granule { requested_bytes });
        }
        if requested_bytes > region_bytes {
            return Err(RequestedError::BeyondRegion {
                requested_bytes,
                region_bytes,
            });
        }
        let changed = self.requested_bytes != requested_bytes;
        self.requested_bytes = requested_bytes;
        self.usable_bytes = self.usable_bytes.max(self.usable_for_request());
        Ok(changed)
    }

    /// How much of the region the driver needs to be able to plug what is requested. Linux uses whole memory blocks
    /// of its own, aligned to their size; one more lets it get around a memory block that it cannot use.
    fn usable_for_request(&self) -> u64 {
        if self.requested_bytes == 0 {
            return 0;
        }
        let MemConfig {
            address,
            region_bytes,
            ram_bytes: _,
            slot_bytes: _,
        } = self.config;
        let memory_block_bytes = self.memory_block_bytes();
        // An address near the end of the address space makes everything usable.
        let end = address
            .checked_next_multiple_of(memory_block_bytes)
            .and_then(|first| first.checked_add(self.requested_bytes))
            .and_then(|end| end.checked_next_multiple_of(memory_block_bytes))
            .and_then(|end| end.checked_add(memory_block_bytes))
            .unwrap_or(u64::MAX);
        (end - address).min(region_bytes)
    }

    /// The largest memory block that Linux uses with this RAM.
    fn memory_block_bytes(&self) -> u64 {
        if self.config.ram_bytes < LARGE_RAM_BYTES {
            REGION_ALIGN_BYTES
        } else {
            LARGE_MEMORY_BLOCK_BYTES
        }
    }

    /// Whether plugging `range`, in which nothing is plugged, would show the guest more of the region than belongs to
    /// what is requested: a slot is shown as a whole, so blocks strewn over all slots would show all of it. Linux
    /// fills the memory blocks that it uses before it begins the next, and needs one more at most.
    fn shows_too_much(&self, range: &Range<u64>) -> bool {
        let part_bytes = self.config.slot_bytes.max(self.memory_block_bytes());
        let part_blocks = part_bytes / BLOCK_BYTES;
        let is_live = |part: &u64| {
            self.blocks
                .plugged_in(part * part_blocks..(part + 1) * part_blocks)
                != 0
        };
        let parts = range.start / part_blocks..range.end.div_ceil(part_blocks);
        let fresh_count = parts.filter(|part| !is_live(part)).count() as u64;
        if fresh_count == 0 {
            return false;
        }
        let part_count = (self.config.region_bytes / BLOCK_BYTES).div_ceil(part_blocks);
        let live_count = (0..part_count).filter(is_live).count() as u64;
        live_count + fresh_count > self.requested_bytes.div_ceil(part_bytes) + 1
    }

    /// PLUG (§5.15.6.1): more than requested is refused with NACK; with BUSY what the host has no room for, and what is
    /// strewn too widely, which a driver may try again when it has filled what it has.
    pub(super) fn plug(&mut self, address: u64, block_count: u16, log: &GuestLog) -> Response {
        let Some(range) = self.range(address, block_count) else {
            return Response::Error;
        };
        if self.blocks.plugged_in(range.clone()) != 0 {
            return Response::Error;
        }
        let (offset, length_bytes) = bytes(&range);
        if self.plugged_bytes() + length_bytes > self.requested_bytes {
            return Response::Nack;
        }
        if self.shows_too_much(&range) {
            log.warn(format_args!(
                "{length_bytes} bytes at {address:#x} would be strewn too widely"
            ));
            return Response::Busy;
        }
        if let Err(error) = self.host.plug(offset, length_bytes) {
            return busy(log, "plugged", length_bytes, &error);
        }
        self.blocks.set(range, true);
        Response::Ack
    }

    /// UNPLUG (§5.15.6.2).
    pub(super) fn unplug(&mut self, address: u64, block_count: u16, log: &GuestLog) -> Response {
        let Some(range) = self.range(address, block_count) else {
            return Response::Error;
        };
        if self.blocks.plugged_in(range.clone()) != u64::from(block_count) {
            return Response::Error;
        }
        let (offset, length_bytes) = bytes(&range);
        if let Err(error) = self.host.unplug(offset, length_bytes) {
            return busy(log, "unplugged", length_bytes, &error);
        }
        self.blocks.set(range, false);
        Response::Ack
    }

    /// UNPLUG ALL (§5.15.6.3): also lets the usable part shrink to what the request needs.
    pub(super) fn unplug_all(&mut self, log: &GuestLog) -> Response {
        match self.empty() {
            Ok(()) => Response::Ack,
            Err(error) => busy(log, "unplugged", self.plugged_bytes(), &error),
        }
    }

    /// STATE (§5.15.6.4).
    pub(super) fn state(&self, address: u64, block_count: u16) -> Response {
        let Some(range) = self.range(address, block_count) else {
            return Response::Error;
        };
        Response::State(match self.blocks.plugged_in(range) {
            0 => BlockState::Unplugged,
            plugged if plugged == u64::from(block_count) => BlockState::Plugged,
            _ => BlockState::Mixed,
        })
    }

    /// Unplugs everything; the usable part is then what the request needs.
    ///
    /// # Errors
    /// [`PlugError`] when the host refuses; nothing has changed then.
    pub(super) fn empty(&mut self) -> Result<(), PlugError> {
        if self.blocks.plugged_count() != 0 {
            self.host.unplug(0, self.config.region_bytes)?;
            self.blocks.clear();
        }
        self.usable_bytes = self.usable_for_request();
        Ok(())
    }

    /// Takes over a checked state: what is plugged in it is plugged at the host.
    ///
    /// # Errors
    /// [`PlugError`] when the host refuses; a part may be plugged then.
    pub(super) fn adopt(
        &mut self,
        requested_bytes: u64,
        usable_bytes: u64,
        blocks: Blocks,
    ) -> Result<(), PlugError> {
        self.empty()?;
        self.requested_bytes = requested_bytes;
        self.usable_bytes = usable_bytes;
        for run in blocks.runs() {
            let (offset, length_bytes) = bytes(&run);
            self.host.plug(offset, length_bytes)?;
            self.blocks.set(run, true);
        }
        Ok(())
    }

    /// The blocks of a request: at least one, aligned, all of them usable.
    fn range(&self, address: u64, block_count: u16) -> Option<Range<u64>> {
        let offset = address.checked_sub(self.config.address)?;
        let start = offset / BLOCK_BYTES;
        let end = start + u64::from(block_count);
        let good =
            block_count > 0 && address.is_multiple_of(BLOCK_BYTES) && end <= self.usable_bytes / BLOCK_BYTES;
        good.then_some(start..end)
    }
}

/// Offset and length in bytes of a range of blocks.
fn bytes(range: &Range<u64>) -> (u64, u64) {
    (range.start * BLOCK_BYTES, (range.end - range.start) * BLOCK_BYTES)
}

fn busy(log: &GuestLog, what: &str, length_bytes: u64, error: &PlugError) -> Response {
    log.warn(format_args!("{length_bytes} bytes cannot be {what} now: {error}"));
    Response::Busy
}
