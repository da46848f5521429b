//! The saved forms of PCI's parts, frozen per version.
//!
//! Only what a guest can change is written down; the rest is the device's own and comes from its construction. All
//! of it is untrusted on the way back and is checked by whoever takes it over.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The schema of the PCI root's section.
pub const PCI_ROOT_SCHEMA: u32 = 1;

/// The PCI root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedPciRootV1 {
    /// What the guest changed in the host bridge's configuration space.
    pub host_bridge: SavedConfigSpaceV1,
}

/// A configuration space: the bytes that differ from power-on, by offset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SavedConfigSpaceV1 {
    /// Offset to value.
    pub changes: BTreeMap<u16, u8>,
}

/// The MSI-X vectors of a function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedMsixV1 {
    /// The table, in order.
    pub vectors: Vec<SavedMsixVectorV1>,
}

/// One MSI-X vector.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedMsixVectorV1 {
    /// Message address, 64 bits.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// The vector's own mask bit.
    pub masked: bool,
    /// The vector's pending bit.
    pub pending: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::testing::same_bytes;

    #[test]
    fn schema_1_reads_and_writes_these_bytes() {
        let text = r#"{"host_bridge":{"4":6,"5":4}}"#;
        same_bytes::<SavedPciRootV1>(text);
    }

    #[test]
    fn msi_x_schema_1_reads_and_writes_these_bytes() {
        let text = r#"{"vectors":[{"address":18446744073709551612,"data":1,"masked":true,"pending":false}]}"#;
        same_bytes::<SavedMsixV1>(text);
    }
}
