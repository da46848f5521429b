//! A disk on paper.

use std::path::PathBuf;

use crate::ids::{Bdf, DiskName, UnitName};

/// A disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// The disk's name, unique in its VM; the guest reads it as the serial number.
    pub name: DiskName,
    /// The image file or block device, an absolute path.
    pub path: PathBuf,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// The disk's PCI address.
    pub bdf: Bdf,
}

impl DiskConfig {
    /// The name of the disk's unit.
    pub fn unit_name(&self) -> UnitName {
        UnitName::new(format!("disk-{}", self.name)).expect("a disk's name is short and printable")
    }
}

/// What is said about a disk when it is added. Unless said otherwise it is writable and gets the first free PCI slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) read_only: bool,
    pub(super) bdf: Option<Bdf>,
}

impl DiskSpec {
    /// A disk called `name` (see [`DiskName`]) whose contents are in the file or block device at the absolute `path`.
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            path: path.into(),
            read_only: false,
            bdf: None,
        }
    }

    /// Whether the guest may only read.
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Puts the disk at a PCI address.
    pub fn bdf(mut self, bdf: Bdf) -> Self {
        self.bdf = Some(bdf);
        self
    }
}
