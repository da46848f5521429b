//! The frozen saved form of the memory device. What is read here is untrusted: every number is checked against the
//! region before any block is plugged.

use serde::{Deserialize, Serialize};

use super::blocks::Blocks;
use super::region::{BLOCK_BYTES, MemConfig, Region};
use crate::unit::RestoreError;

/// The region as the guest saw it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MemV1 {
    address: u64,
    region_bytes: u64,
    requested_bytes: u64,
    usable_bytes: u64,
    /// One bit per block of 2 MiB, the first block's lowest.
    plugged: Vec<u64>,
}

impl MemV1 {
    /// The saved form of `region`.
    pub(super) fn new(region: &Region) -> Self {
        let MemConfig {
            address,
            region_bytes,
            // The restored guest has the RAM it was saved with.
            ram_bytes: _,
            slot_bytes: _,
        } = region.config();
        Self {
            address,
            region_bytes,
            requested_bytes: region.requested_bytes(),
            usable_bytes: region.usable_bytes(),
            plugged: region.blocks().words().to_vec(),
        }
    }

    /// Makes `region` what was saved, and plugs its blocks at the host.
    ///
    /// # Errors
    /// [`RestoreError`] when a value is impossible in this region, or the host has no room for the blocks.
    pub(super) fn apply(self, region: &mut Region) -> Result<(), RestoreError> {
        let Self {
            address,
            region_bytes,
            requested_bytes,
            usable_bytes,
            plugged,
        } = self;
        let impossible = |field, value: u64, reason| RestoreError::Value {
            field,
            value: value.to_string(),
            reason,
        };
        let config = region.config();
        if address != config.address {
            let reason = "the region is elsewhere";
            return Err(impossible("address", address, reason));
        }
        if region_bytes != config.region_bytes {
            let reason = "the region has another size";
            return Err(impossible("region_bytes", region_bytes, reason));
        }
        let reason = "it is not a number of blocks of the region";
        for (field, value) in [
            ("requested_bytes", requested_bytes),
            ("usable_bytes", usable_bytes),
        ] {
            if value > region_bytes || !value.is_multiple_of(BLOCK_BYTES) {
                return Err(impossible(field, value, reason));
            }
        }
        if usable_bytes < requested_bytes {
            let reason = "it is less than what is requested";
            return Err(impossible("usable_bytes", usable_bytes, reason));
        }
        let word_count = plugged.len() as u64;
        let block_count = region_bytes / BLOCK_BYTES;
        let Some(blocks) = Blocks::from_words(plugged, block_count) else {
            let reason = "these are not the words of the region's blocks";
            return Err(impossible("plugged", word_count, reason));
        };
        if blocks.plugged_in(usable_bytes / BLOCK_BYTES..block_count) != 0 {
            let reason = "a block behind it is plugged";
            return Err(impossible("usable_bytes", usable_bytes, reason));
        }
        let plugged_bytes = blocks.plugged_count() * BLOCK_BYTES;
        region
            .adopt(requested_bytes, usable_bytes, blocks)
            .map_err(|error| RestoreError::Host {
                what: format!("{plugged_bytes} bytes of plugged memory"),
                source: std::io::Error::other(error),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::testing::same_bytes;

    #[test]
    fn schema_1_reads_and_writes_these_bytes() {
        let text = r#"{"address":4294967296,"region_bytes":268435456,"requested_bytes":4194304,"usable_bytes":8388608,"plugged":[3,0]}"#;
        same_bytes::<MemV1>(text);
    }
}
