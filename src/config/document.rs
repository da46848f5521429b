//! The configuration as a JSON document: the version is looked at first, then that version's frozen form is read.
//!
//! ```text
//! read:  bytes → format and version → v1 or v2 form → (up) v2 form → builder, which checks → VmConfig
//! write: VmConfig → v2 form → (down) the form of its own version → bytes
//! ```
//!
//! Documents are untrusted: any bytes give a configuration or a named error. `docs/formats/config.md` describes them.

use std::path::PathBuf;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::builder::{ConfigError, VmConfigBuilder};
use super::disk::{DiskConfig, DiskSpec};
use super::nic::{NicConfig, NicSpec};
use super::v1::DocumentV1;
use super::v2::{BootV2, DiskV2, DocumentV2, MemoryV2, NicV2};
use super::version::{ConfigVersion, ParseVersionError};
use super::{BootConfig, MemoryConfig, VmConfig};

/// The longest document. The largest configuration that can be built is shorter.
pub const DOCUMENT_MAX_BYTES: usize = 1 << 20;
/// What every document says about itself.
const FORMAT: &str = "vm-lifecycle config";

/// Why a document was refused.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// The document is too long to be one.
    #[error("the document has more than {DOCUMENT_MAX_BYTES} bytes")]
    TooLong,
    /// The document is not a JSON object with a format and a version.
    #[error("the document is not a vm configuration")]
    Envelope(#[source] serde_json::Error),
    /// The document says that it is something else.
    #[error("the document's format is {found:?}, not {FORMAT:?}")]
    Format { found: String },
    /// The document's version is not known here.
    #[error(transparent)]
    Version(#[from] ParseVersionError),
    /// The document does not have the form of its version.
    #[error("the document does not have the form of version {version}")]
    Form {
        version: ConfigVersion,
        #[source]
        source: serde_json::Error,
    },
    /// The document has the right form and describes an impossible VM.
    #[error("the document describes an impossible vm")]
    Config(#[from] ConfigError),
}

/// The part that every version shares, for ever.
#[derive(Deserialize)]
struct Envelope {
    format: String,
    version: String,
}

/// Reads a document of any supported version.
///
/// # Errors
/// [`DocumentError`].
pub fn read(bytes: &[u8]) -> Result<VmConfig, DocumentError> {
    if bytes.len() > DOCUMENT_MAX_BYTES {
        return Err(DocumentError::TooLong);
    }
    let Envelope { format, version } = serde_json::from_slice(bytes).map_err(DocumentError::Envelope)?;
    if format != FORMAT {
        let found = format.chars().take(64).collect();
        return Err(DocumentError::Format { found });
    }
    let version: ConfigVersion = version.parse()?;
    let document = match version {
        ConfigVersion::V1_0 => DocumentV2::from(form::<DocumentV1>(version, bytes)?),
        ConfigVersion::V2_0 => form::<DocumentV2>(version, bytes)?,
    };
    Ok(builder(document).build()?)
}

fn form<T: DeserializeOwned>(version: ConfigVersion, bytes: &[u8]) -> Result<T, DocumentError> {
    serde_json::from_slice(bytes).map_err(|source| DocumentError::Form { version, source })
}

/// Writes `config` as a document of its own version, ending in a newline.
pub fn write(config: &VmConfig) -> Vec<u8> {
    let document = document(config);
    let bytes = match config.version {
        ConfigVersion::V1_0 => {
            let document = DocumentV1::try_from(document);
            let document = document.expect("the builder refused what version 1.0 has no words for");
            serde_json::to_vec_pretty(&document)
        }
        ConfigVersion::V2_0 => serde_json::to_vec_pretty(&document),
    };
    let mut bytes = bytes.expect("text, numbers and lists of them can be written as json");
    bytes.push(b'\n');
    bytes
}

fn builder(document: DocumentV2) -> VmConfigBuilder {
    let DocumentV2 {
        format: _,
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
        boot: BootV2 {
            kernel,
            initrd,
            cmdline,
        },
        disks,
        nics,
    } = document;
    let mut builder = VmConfig::builder(name, kernel)
        .id(id)
        .version(version)
        .cpus(cpus.into())
        .startup_bytes(startup_bytes)
        .maximum_bytes(maximum_bytes)
        .huge_pages(huge_pages)
        .overcommit(overcommit.unwrap_or(false))
        .deflate_on_oom(deflate_on_oom.unwrap_or(false))
        .cmdline(cmdline);
    builder = minimum_bytes
        .into_iter()
        .fold(builder, VmConfigBuilder::minimum_bytes);
    builder = assigned_bytes
        .into_iter()
        .fold(builder, VmConfigBuilder::assigned_bytes);
    if let Some(initrd) = initrd {
        builder = builder.initrd(initrd);
    }
    builder = disks
        .into_iter()
        .map(disk_spec)
        .fold(builder, VmConfigBuilder::disk);
    nics.into_iter().map(nic_spec).fold(builder, VmConfigBuilder::nic)
}

fn disk_spec(disk: DiskV2) -> DiskSpec {
    let DiskV2 {
        name,
        path,
        read_only,
        bdf,
    } = disk;
    DiskSpec::new(name, path).read_only(read_only).bdf(bdf)
}

fn nic_spec(nic: NicV2) -> NicSpec {
    let NicV2 {
        name,
        tap,
        queue_pairs,
        mac,
        bdf,
        acpi_index,
        link_up,
    } = nic;
    let spec = NicSpec::new(name, tap)
        .queue_pairs(queue_pairs)
        .mac(mac)
        .bdf(bdf)
        .link_up(link_up);
    acpi_index.into_iter().fold(spec, NicSpec::acpi_index)
}

fn document(config: &VmConfig) -> DocumentV2 {
    let VmConfig {
        id,
        name,
        version,
        cpu_count,
        memory,
        boot: BootConfig {
            kernel,
            initrd,
            cmdline,
        },
        disks,
        nics,
    } = config.clone();
    DocumentV2 {
        format: FORMAT.to_owned(),
        version,
        id,
        name,
        cpus: cpu_count,
        memory: memory_document(memory, version),
        boot: BootV2 {
            kernel: path_text(kernel),
            initrd: initrd.map(path_text),
            cmdline,
        },
        disks: disks.into_iter().map(disk_document).collect(),
        nics: nics.into_iter().map(nic_document).collect(),
    }
}

fn memory_document(memory: MemoryConfig, version: ConfigVersion) -> MemoryV2 {
    let default_minimum_bytes = memory.default_minimum_bytes(version);
    let MemoryConfig {
        startup_bytes,
        maximum_bytes,
        minimum_bytes,
        assigned_bytes,
        huge_pages,
        overcommit,
        deflate_on_oom,
    } = memory;
    MemoryV2 {
        startup_bytes,
        maximum_bytes,
        minimum_bytes: Some(minimum_bytes).filter(|bytes| *bytes != default_minimum_bytes),
        assigned_bytes: Some(assigned_bytes).filter(|bytes| *bytes != startup_bytes),
        huge_pages,
        overcommit: overcommit.then_some(true),
        deflate_on_oom: deflate_on_oom.then_some(true),
    }
}

fn disk_document(disk: DiskConfig) -> DiskV2 {
    let DiskConfig {
        name,
        path,
        read_only,
        bdf,
    } = disk;
    DiskV2 {
        name,
        path: path_text(path),
        read_only,
        bdf,
    }
}

fn nic_document(nic: NicConfig) -> NicV2 {
    let NicConfig {
        name,
        tap,
        queue_pairs,
        mac,
        bdf,
        acpi_index,
        link_up,
    } = nic;
    NicV2 {
        name,
        tap,
        queue_pairs,
        mac,
        bdf,
        acpi_index,
        link_up,
    }
}

fn path_text(path: PathBuf) -> String {
    path.into_os_string()
        .into_string()
        .expect("the builder refused paths that are not utf-8")
}
