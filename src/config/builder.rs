//! The one way to a valid configuration: everything is said first, then checked as a whole.
//!
//! Steps of [`VmConfigBuilder::build`]: names and limits; then the PCI addresses and ACPI indices that were given, so
//! that no device without one can take them; then the first free ones in the order of disks and cards; MAC addresses
//! last, which need the VM's identity.

use std::path::{Path, PathBuf};

use super::disk::{DiskConfig, DiskSpec};
use super::memory::{ByteSize, MemoryConfig, MemorySpec};
use super::nic::{ACPI_INDEX_MAX, NICS_MAX, NicSpec, QUEUE_PAIRS_MAX, add_nic, device_name};
use super::slots::Slots;
use super::version::{ConfigVersion, NeedsVersion};
use super::{BootConfig, VmConfig};
use crate::ids::{Bdf, DiskName, IdError, MacAddr, NicName, VmId, VmName};

/// The most vCPUs of a VM.
pub const CPUS_MAX: u8 = 64;
/// The longest kernel command line; with its final zero it fills `memory::layout::CMDLINE_MAX_BYTES`.
pub const CMDLINE_MAX_BYTES: usize = 2047;
/// The longest path (Linux PATH_MAX, less the final zero).
pub const PATH_MAX_BYTES: usize = 4095;
/// The start-up memory of a VM about which nothing is said.
const STARTUP_DEFAULT_BYTES: u64 = 512 << 20;

/// What is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A name is not allowed.
    #[error(transparent)]
    Name(#[from] IdError),
    /// A feature is used that the VM's version does not have.
    #[error(transparent)]
    NeedsVersion(#[from] NeedsVersion),
    /// The number of vCPUs is out of range.
    #[error("{count} vcpus are asked for, from 1 to {CPUS_MAX} are possible")]
    CpuCount { count: u32 },
    /// The start-up size is too small.
    #[error("start-up memory {startup} is below the minimum {minimum}")]
    StartupTooSmall { startup: ByteSize, minimum: ByteSize },
    /// A size is not aligned.
    #[error("{what} {size} is not a multiple of {step}")]
    MemoryStep {
        what: &'static str,
        size: ByteSize,
        step: ByteSize,
    },
    /// The maximum is less than the guest starts with.
    #[error("maximum memory {maximum} is below start-up memory {startup}")]
    MaximumBelowStartup { maximum: ByteSize, startup: ByteSize },
    /// A size is out of range.
    #[error("{what} {size} is not between {least} and {most}")]
    MemoryRange {
        what: &'static str,
        size: ByteSize,
        least: ByteSize,
        most: ByteSize,
    },
    /// The maximum is too large.
    #[error("maximum memory {maximum} exceeds the limit {limit}")]
    MaximumTooLarge { maximum: ByteSize, limit: ByteSize },
    /// A path cannot be used.
    #[error("{what} path {path:?} {reason}")]
    Path {
        what: String,
        path: PathBuf,
        reason: &'static str,
    },
    /// The command line is too long.
    #[error("the kernel command line has {length_bytes} bytes, the limit is {CMDLINE_MAX_BYTES}")]
    CmdlineTooLong { length_bytes: usize },
    /// The command line holds a character that a kernel would not take as text.
    #[error("the kernel command line contains the control character {character:?}")]
    CmdlineCharacter { character: char },
    /// Two disks have one name.
    #[error("two disks are called {name}")]
    DuplicateDisk { name: DiskName },
    /// There are more network cards than a VM can have.
    #[error("network card {name} is one too many: a vm can have {NICS_MAX}")]
    TooManyNics { name: NicName },
    /// No network card has the name.
    #[error("the vm has no network card {name}")]
    NoNic { name: NicName },
    /// The ACPI index is out of range.
    #[error("network card {nic} asks for acpi index {index}, from 1 to {ACPI_INDEX_MAX} are possible")]
    AcpiIndex { nic: NicName, index: u16 },
    /// Two network cards have one ACPI index.
    #[error("network cards {first} and {second} have the same acpi index {index}")]
    DuplicateAcpiIndex {
        index: u16,
        first: NicName,
        second: NicName,
    },
    /// Two network cards have one name.
    #[error("two network cards are called {name}")]
    DuplicateNic { name: NicName },
    /// Two network cards have one MAC address.
    #[error("network cards {first} and {second} have the same mac address {mac}")]
    DuplicateMac {
        mac: MacAddr,
        first: NicName,
        second: NicName,
    },
    /// Two network cards use one tap.
    #[error("network cards {first} and {second} use the same tap {tap:?}")]
    DuplicateTap {
        tap: String,
        first: NicName,
        second: NicName,
    },
    /// The name of a tap is impossible.
    #[error("tap {tap:?} of network card {nic} cannot be an interface: {reason}")]
    TapName {
        nic: NicName,
        tap: String,
        reason: &'static str,
    },
    /// The number of queue pairs is out of range.
    #[error("network card {nic} asks for {count} queue pairs, from 1 to {QUEUE_PAIRS_MAX} are possible")]
    QueuePairs { nic: NicName, count: u16 },
    /// No device of the user can have the PCI address.
    #[error(
        "{device} cannot be at {bdf}: slots 8 to 31 of segment 0 and 1 to 31 of segments 1 to 3 are free for devices"
    )]
    SlotUnusable { bdf: Bdf, device: String },
    /// Two devices are given one PCI address.
    #[error("{device} cannot be at {bdf}: {owner} is there")]
    SlotTaken { bdf: Bdf, device: String, owner: String },
    /// There are more devices than slots.
    #[error("no pci slot is left for {device}, all {slot_count} are taken")]
    SlotsExhausted { device: String, slot_count: usize },
}

/// Collects what a VM shall be. Unless said otherwise it has a new identity, the newest version, one vCPU, 512 MiB of
/// memory that cannot grow, no huge pages, no initrd, an empty command line, no disks and no network cards.
#[derive(Debug, Clone)]
pub struct VmConfigBuilder {
    id: Option<VmId>,
    name: String,
    version: ConfigVersion,
    cpu_count: u32,
    memory: MemorySpec,
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    cmdline: String,
    disks: Vec<DiskSpec>,
    nics: Vec<NicSpec>,
}

impl VmConfigBuilder {
    pub(super) fn new(name: String, kernel: PathBuf) -> Self {
        Self {
            id: None,
            name,
            version: ConfigVersion::newest(),
            cpu_count: 1,
            memory: MemorySpec {
                startup_bytes: STARTUP_DEFAULT_BYTES,
                maximum_bytes: None,
                minimum_bytes: None,
                assigned_bytes: None,
                huge_pages: false,
                overcommit: false,
                deflate_on_oom: false,
            },
            kernel,
            initrd: None,
            cmdline: String::new(),
            disks: Vec::new(),
            nics: Vec::new(),
        }
    }

    /// Gives the VM an identity that it has already.
    pub fn id(mut self, id: VmId) -> Self {
        self.id = Some(id);
        self
    }

    /// The configuration version.
    pub fn version(mut self, version: ConfigVersion) -> Self {
        self.version = version;
        self
    }

    /// The initial file system, an absolute path.
    pub fn initrd(mut self, path: impl Into<PathBuf>) -> Self {
        self.initrd = Some(path.into());
        self
    }

    /// The kernel command line, at most [`CMDLINE_MAX_BYTES`], without control characters.
    pub fn cmdline(mut self, cmdline: impl Into<String>) -> Self {
        self.cmdline = cmdline.into();
        self
    }

    /// The number of vCPUs, from 1 to [`CPUS_MAX`].
    pub fn cpus(mut self, count: u32) -> Self {
        self.cpu_count = count;
        self
    }

    /// The size of RAM at power-on; see [`MemoryConfig::startup_bytes`].
    pub fn startup_bytes(mut self, bytes: u64) -> Self {
        self.memory.startup_bytes = bytes;
        self
    }

    /// The size that the running guest can be given; see [`MemoryConfig::maximum_bytes`].
    pub fn maximum_bytes(mut self, bytes: u64) -> Self {
        self.memory.maximum_bytes = Some(bytes);
        self
    }

    /// The size to which the running guest can be brought down; see [`MemoryConfig::minimum_bytes`]. Unless it is said,
    /// that is [`MemoryConfig::floor_bytes`] where there is a maximum above the start-up size, and in version 1.0.
    pub fn minimum_bytes(mut self, bytes: u64) -> Self {
        self.memory.minimum_bytes = Some(bytes);
        self
    }

    /// The size that the guest is given when it has started; see [`MemoryConfig::assigned_bytes`]. Unless it is said,
    /// that is the start-up size.
    pub fn assigned_bytes(mut self, bytes: u64) -> Self {
        self.memory.assigned_bytes = Some(bytes);
        self
    }

    /// Whether the guest may be promised more memory than the host has left. It may die for it when it takes it.
    pub fn overcommit(mut self, overcommit: bool) -> Self {
        self.memory.overcommit = overcommit;
        self
    }

    /// Whether the guest may take memory back out of its balloon when it has none left; see
    /// [`MemoryConfig::deflate_on_oom`].
    pub fn deflate_on_oom(mut self, deflate_on_oom: bool) -> Self {
        self.memory.deflate_on_oom = deflate_on_oom;
        self
    }

    /// Whether the host backs the guest's memory with huge pages.
    pub fn huge_pages(mut self, huge_pages: bool) -> Self {
        self.memory.huge_pages = huge_pages;
        self
    }

    /// Adds a disk.
    pub fn disk(mut self, disk: DiskSpec) -> Self {
        self.disks.push(disk);
        self
    }

    /// Adds a network card.
    pub fn nic(mut self, nic: NicSpec) -> Self {
        self.nics.push(nic);
        self
    }

    /// Checks everything and gives every device its addresses.
    ///
    /// # Errors
    /// [`ConfigError`] for the first thing that is wrong.
    pub fn build(self) -> Result<VmConfig, ConfigError> {
        let mut config = VmConfig {
            id: self.id.unwrap_or_else(VmId::random),
            name: VmName::new(self.name)?,
            version: self.version,
            cpu_count: check_cpus(self.cpu_count)?,
            memory: MemoryConfig::checked(self.memory, self.version)?,
            boot: check_boot(self.kernel, self.initrd, self.cmdline)?,
            disks: Vec::with_capacity(self.disks.len()),
            nics: Vec::with_capacity(self.nics.len()),
        };
        let mut slots = Slots::default();
        for disk in &self.disks {
            disk.bdf
                .map_or(Ok(()), |bdf| slots.take(bdf, format!("disk {}", disk.name)))?;
        }
        for nic in &self.nics {
            nic.bdf
                .map_or(Ok(()), |bdf| slots.take(bdf, device_name(&nic.name)))?;
        }
        let given = self.nics.iter().filter_map(|nic| nic.acpi_index).collect();
        for disk in self.disks {
            add_disk(&mut config, &mut slots, disk)?;
        }
        for nic in self.nics {
            add_nic(&mut config, &mut slots, &given, nic)?;
        }
        Ok(config)
    }
}

fn check_cpus(count: u32) -> Result<u8, ConfigError> {
    match u8::try_from(count) {
        Ok(small @ 1..=CPUS_MAX) => Ok(small),
        _ => Err(ConfigError::CpuCount { count }),
    }
}

fn check_boot(kernel: PathBuf, initrd: Option<PathBuf>, cmdline: String) -> Result<BootConfig, ConfigError> {
    check_path("kernel", &kernel)?;
    if let Some(initrd) = &initrd {
        check_path("initrd", initrd)?;
    }
    if cmdline.len() > CMDLINE_MAX_BYTES {
        return Err(ConfigError::CmdlineTooLong {
            length_bytes: cmdline.len(),
        });
    }
    if let Some(character) = cmdline.chars().find(|c| c.is_control()) {
        return Err(ConfigError::CmdlineCharacter { character });
    }
    Ok(BootConfig {
        kernel,
        initrd,
        cmdline,
    })
}

/// Checks that `path` means the same file whoever reads the document, and can be written into one.
fn check_path(what: &str, path: &Path) -> Result<(), ConfigError> {
    let reason = match path.to_str() {
        None => "is not valid utf-8",
        Some(text) if text.len() > PATH_MAX_BYTES => "is longer than 4095 bytes",
        Some(text) if text.contains(|c: char| c.is_control()) => "contains a control character",
        Some(_) if !path.is_absolute() => "is not absolute",
        Some(_) => return Ok(()),
    };
    Err(ConfigError::Path {
        what: what.to_owned(),
        path: path.to_owned(),
        reason,
    })
}

fn add_disk(config: &mut VmConfig, slots: &mut Slots, spec: DiskSpec) -> Result<(), ConfigError> {
    let name = DiskName::new(spec.name)?;
    if config.disks.iter().any(|disk| disk.name == name) {
        return Err(ConfigError::DuplicateDisk { name });
    }
    let device = format!("disk {name}");
    check_path(&device, &spec.path)?;
    let bdf = match spec.bdf {
        Some(bdf) => bdf,
        None => slots.take_first_free(device)?,
    };
    config.disks.push(DiskConfig {
        name,
        path: spec.path,
        read_only: spec.read_only,
        bdf,
    });
    Ok(())
}
