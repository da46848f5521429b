//! What a saved VM remembers of its disk, schema 1.
//!
//! Requests never are part of it: a device is saved when nothing is in flight. The disk itself is not saved here
//! either; what is remembered is what the guest has seen of it, so that a VM is not woken with another disk.

use serde::{Deserialize, Serialize};

use crate::storage::DiskProperties;
use crate::unit::RestoreError;

/// The saved form of a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BlockStateV1 {
    capacity_bytes: u64,
    logical_block_bytes: u32,
    read_only: bool,
    queue_count: u16,
}

impl BlockStateV1 {
    /// The state of a device on `disk`.
    pub(super) fn new(disk: &DiskProperties, queue_count: u16) -> Self {
        let DiskProperties {
            capacity_bytes,
            read_only,
            logical_block_bytes,
            // May differ on another host without harm: performance hints and abilities that features tell of.
            physical_block_bytes: _,
            discard: _,
            write_zeroes: _,
        } = *disk;
        Self {
            capacity_bytes,
            logical_block_bytes,
            read_only,
            queue_count,
        }
    }

    /// Checks that a guest that saw this disk can go on with one that looks like `now`.
    ///
    /// # Errors
    /// [`RestoreError::Value`] for the first field that differs.
    pub(super) fn check(&self, now: &Self) -> Result<(), RestoreError> {
        let Self {
            capacity_bytes,
            logical_block_bytes,
            read_only,
            queue_count,
        } = self;
        let same = [
            (
                "capacity_bytes",
                capacity_bytes.to_string(),
                now.capacity_bytes.to_string(),
            ),
            (
                "logical_block_bytes",
                logical_block_bytes.to_string(),
                now.logical_block_bytes.to_string(),
            ),
            ("read_only", read_only.to_string(), now.read_only.to_string()),
            (
                "queue_count",
                queue_count.to_string(),
                now.queue_count.to_string(),
            ),
        ];
        for (field, value, current) in same {
            if value != current {
                let reason = "the disk is another one now";
                return Err(RestoreError::Value { field, value, reason });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::testing::same_bytes;

    #[test]
    fn schema_1_reads_and_writes_these_bytes() {
        let text =
            r#"{"capacity_bytes":1048576,"logical_block_bytes":4096,"read_only":true,"queue_count":4}"#;
        same_bytes::<BlockStateV1>(text);
    }
}
