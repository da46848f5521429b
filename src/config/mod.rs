//! What a VM is, on paper: its configuration, the versions of it, its document and the directory that holds it.
//!
//! A [`VmConfig`] is always valid: it comes from [`VmConfigBuilder::build`], and a document passes through the same
//! builder when it is read. Checked here is everything that needs no host; whether a file exists or a tap can be
//! opened shows when the VM starts. Everything that the guest can recognise (MAC, PCI address) is decided once and
//! persisted, never derived again from the order of devices.
//!
//! `document` looks at a document's version first and reads it as that version's frozen form (`v1`, `v2`).

#![forbid(unsafe_code)]

mod builder;
mod change;
mod disk;
mod document;
mod memory;
mod nic;
mod slots;
mod state_dir;
mod v1;
mod v2;
mod version;

use std::path::PathBuf;

pub use builder::{CMDLINE_MAX_BYTES, CPUS_MAX, ConfigError, PATH_MAX_BYTES, VmConfigBuilder};
pub use disk::{DiskConfig, DiskSpec};
pub use document::{DOCUMENT_MAX_BYTES, DocumentError, read, write};
pub use memory::{
    ByteSize, HUGE_PAGE_BYTES, MEMORY_MAX_BYTES, MemoryConfig, RUNTIME_MEMORY_STEP_BYTES, STARTUP_MIN_BYTES,
    STARTUP_STEP_BYTES,
};
pub use nic::{ACPI_INDEX_MAX, NICS_MAX, NicConfig, NicSpec, QUEUE_PAIRS_MAX, TAP_NAME_MAX_BYTES};
pub use slots::{BALLOON_BDF, CONSOLE_BDF, MEM_BDF, PLATFORM_SLOT_COUNT, RNG_BDF, SEGMENT_COUNT, first_slot};
pub use state_dir::{StateDir, StateDirError};
pub use version::{ConfigVersion, Feature, NeedsVersion, ParseVersionError};

use crate::ids::{VmId, VmName};

/// The configuration of one VM, checked and complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmConfig {
    id: VmId,
    name: VmName,
    version: ConfigVersion,
    cpu_count: u8,
    memory: MemoryConfig,
    boot: BootConfig,
    disks: Vec<DiskConfig>,
    nics: Vec<NicConfig>,
}

/// What the guest is started from. Paths are absolute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootConfig {
    /// The kernel: a bzImage or an ELF file.
    pub kernel: PathBuf,
    /// The initial file system.
    pub initrd: Option<PathBuf>,
    /// The kernel command line, at most [`CMDLINE_MAX_BYTES`].
    pub cmdline: String,
}

impl VmConfig {
    /// Begins the configuration of a VM that boots `kernel`. [`VmConfigBuilder`] says what is assumed when nothing
    /// else is said.
    pub fn builder(name: impl Into<String>, kernel: impl Into<PathBuf>) -> VmConfigBuilder {
        VmConfigBuilder::new(name.into(), kernel.into())
    }

    /// The VM's identity, never changed.
    pub fn id(&self) -> VmId {
        self.id
    }

    /// The VM's name, for people.
    pub fn name(&self) -> &VmName {
        &self.name
    }

    /// The configuration version; the library never raises it by itself.
    pub fn version(&self) -> ConfigVersion {
        self.version
    }

    /// The number of vCPUs, from 1 to [`CPUS_MAX`].
    pub fn cpu_count(&self) -> u8 {
        self.cpu_count
    }

    /// The VM's memory.
    pub fn memory(&self) -> &MemoryConfig {
        &self.memory
    }

    /// The same VM with another assigned size, see [`MemoryConfig::assigned_bytes`].
    ///
    /// # Errors
    /// [`ConfigError::MemoryRange`] with the limits.
    pub fn with_assigned_memory(&self, assigned_bytes: u64) -> Result<Self, ConfigError> {
        let mut config = self.clone();
        config.memory = self.memory.with_assigned(assigned_bytes)?;
        Ok(config)
    }

    /// What the guest is started from.
    pub fn boot(&self) -> &BootConfig {
        &self.boot
    }

    /// The disks, in the order in which they were added.
    pub fn disks(&self) -> &[DiskConfig] {
        &self.disks
    }

    /// The network cards, in the order in which they were added.
    pub fn nics(&self) -> &[NicConfig] {
        &self.nics
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod doc_tests;
