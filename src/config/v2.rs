//! The document of configuration version 2.0, frozen: a change here breaks every VM that an older library wrote.
//!
//! It is also the form in which every document is read and from which every document is written: older ones step up
//! to it and down from it.

use serde::{Deserialize, Deserializer, Serialize};

use super::version::ConfigVersion;
use crate::ids::{Bdf, DiskName, MacAddr, NicName, VmId, VmName};

/// A document of version 2.0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DocumentV2 {
    pub format: String,
    pub version: ConfigVersion,
    pub id: VmId,
    pub name: VmName,
    pub cpus: u8,
    pub memory: MemoryV2,
    pub boot: BootV2,
    pub disks: Vec<DiskV2>,
    pub nics: Vec<NicV2>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryV2 {
    pub startup_bytes: u64,
    pub maximum_bytes: u64,
    /// Left out when it is the version's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum_bytes: Option<u64>,
    /// Left out when it is the start-up size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assigned_bytes: Option<u64>,
    pub huge_pages: bool,
    /// Left out when it is not allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overcommit: Option<bool>,
    /// Left out when it is not allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deflate_on_oom: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootV2 {
    pub kernel: String,
    #[serde(deserialize_with = "Option::deserialize")] // null is said, not left out
    pub initrd: Option<String>,
    pub cmdline: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskV2 {
    pub name: DiskName,
    pub path: String,
    pub read_only: bool,
    pub bdf: Bdf,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicV2 {
    pub name: NicName,
    pub tap: String,
    pub queue_pairs: u16,
    pub mac: MacAddr,
    pub bdf: Bdf,
    /// A document of version 2.0 always says it; `None` comes from older documents only.
    #[serde(deserialize_with = "said")]
    pub acpi_index: Option<u16>,
    pub link_up: bool,
}

/// A number, neither left out nor null.
fn said<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u16>, D::Error> {
    u16::deserialize(deserializer).map(Some)
}
