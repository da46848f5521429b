//! The document of configuration version 1.0, frozen: a change here breaks every VM that an older library wrote.
//!
//! It differs from 2.0 in its memory, which cannot grow, and in its network cards, whose names the guest does not see.

use serde::{Deserialize, Serialize};

use super::v2::{BootV2, DiskV2, DocumentV2, MemoryV2, NicV2};
use super::version::ConfigVersion;
use crate::ids::{Bdf, DiskName, MacAddr, NicName, VmId, VmName};

/// A document of version 1.0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DocumentV1 {
    pub format: String,
    pub version: ConfigVersion,
    pub id: VmId,
    pub name: VmName,
    pub cpus: u8,
    pub memory: MemoryV1,
    pub boot: BootV1,
    pub disks: Vec<DiskV1>,
    pub nics: Vec<NicV1>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryV1 {
    pub startup_bytes: u64,
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
pub struct BootV1 {
    pub kernel: String,
    #[serde(deserialize_with = "Option::deserialize")] // null is said, not left out
    pub initrd: Option<String>,
    pub cmdline: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskV1 {
    pub name: DiskName,
    pub path: String,
    pub read_only: bool,
    pub bdf: Bdf,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicV1 {
    pub name: NicName,
    pub tap: String,
    pub queue_pairs: u16,
    pub mac: MacAddr,
    pub bdf: Bdf,
    pub link_up: bool,
}

/// A document of version 2.0 says something that version 1.0 has no words for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}, which a document of version 1.0 cannot express")]
pub struct CannotExpress {
    pub field: &'static str,
    pub value: String,
}

/// The step up, which always succeeds.
impl From<DocumentV1> for DocumentV2 {
    fn from(document: DocumentV1) -> Self {
        let DocumentV1 {
            format,
            version,
            id,
            name,
            cpus,
            memory:
                MemoryV1 {
                    startup_bytes,
                    minimum_bytes,
                    assigned_bytes,
                    huge_pages,
                    overcommit,
                    deflate_on_oom,
                },
            boot,
            disks,
            nics,
        } = document;
        Self {
            format,
            version,
            id,
            name,
            cpus,
            memory: MemoryV2 {
                startup_bytes,
                maximum_bytes: startup_bytes,
                minimum_bytes,
                assigned_bytes,
                huge_pages,
                overcommit,
                deflate_on_oom,
            },
            boot: boot.into(),
            disks: disks.into_iter().map(DiskV2::from).collect(),
            nics: nics.into_iter().map(NicV2::from).collect(),
        }
    }
}

/// The step down, which names what it cannot express.
impl TryFrom<DocumentV2> for DocumentV1 {
    type Error = CannotExpress;

    fn try_from(document: DocumentV2) -> Result<Self, CannotExpress> {
        let DocumentV2 {
            format,
            version,
            id,
            name,
            cpus,
            memory:
                MemoryV2 {
                    startup_bytes,
                    maximum_bytes,
                    minimum_bytes,
                    assigned_bytes,
                    huge_pages,
                    overcommit,
                    deflate_on_oom,
                },
            boot,
            disks,
            nics,
        } = document;
        if maximum_bytes != startup_bytes {
            return Err(CannotExpress {
                field: "memory.maximum_bytes",
                value: maximum_bytes.to_string(),
            });
        }
        Ok(Self {
            format,
            version,
            id,
            name,
            cpus,
            memory: MemoryV1 {
                startup_bytes,
                minimum_bytes,
                assigned_bytes,
                huge_pages,
                overcommit,
                deflate_on_oom,
            },
            boot: boot.into(),
            disks: disks.into_iter().map(DiskV1::from).collect(),
            nics: nics.into_iter().map(NicV1::try_from).collect::<Result<_, _>>()?,
        })
    }
}

impl From<BootV1> for BootV2 {
    fn from(from: BootV1) -> Self {
        let BootV1 {
            kernel,
            initrd,
            cmdline,
        } = from;
        Self {
            kernel,
            initrd,
            cmdline,
        }
    }
}

impl From<BootV2> for BootV1 {
    fn from(from: BootV2) -> Self {
        let BootV2 {
            kernel,
            initrd,
            cmdline,
        } = from;
        Self {
            kernel,
            initrd,
            cmdline,
        }
    }
}

impl From<DiskV1> for DiskV2 {
    fn from(from: DiskV1) -> Self {
        let DiskV1 {
            name,
            path,
            read_only,
            bdf,
        } = from;
        Self {
            name,
            path,
            read_only,
            bdf,
        }
    }
}

impl From<DiskV2> for DiskV1 {
    fn from(from: DiskV2) -> Self {
        let DiskV2 {
            name,
            path,
            read_only,
            bdf,
        } = from;
        Self {
            name,
            path,
            read_only,
            bdf,
        }
    }
}

impl From<NicV1> for NicV2 {
    fn from(from: NicV1) -> Self {
        let NicV1 {
            name,
            tap,
            queue_pairs,
            mac,
            bdf,
            link_up,
        } = from;
        Self {
            name,
            tap,
            queue_pairs,
            mac,
            bdf,
            acpi_index: None,
            link_up,
        }
    }
}

impl TryFrom<NicV2> for NicV1 {
    type Error = CannotExpress;

    fn try_from(from: NicV2) -> Result<Self, CannotExpress> {
        let NicV2 {
            name,
            tap,
            queue_pairs,
            mac,
            bdf,
            acpi_index,
            link_up,
        } = from;
        if let Some(index) = acpi_index {
            return Err(CannotExpress {
                field: "nics[].acpi_index",
                value: index.to_string(),
            });
        }
        Ok(Self {
            name,
            tap,
            queue_pairs,
            mac,
            bdf,
            link_up,
        })
    }
}
