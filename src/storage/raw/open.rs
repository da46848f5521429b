//! Opening a raw image: what it is, how large it is, and that nobody else has it.
//!
//! Everything that can be wrong with a path that a user gave has a variant of its own, because it is the message that
//! the user of a VMM sees most often.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::lock;
use crate::storage::SECTOR_BYTES;
use crate::storage::backend::DiskProperties;

/// Why an image cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is nothing at the path.
    #[error("disk image {path} does not exist")]
    Missing { path: PathBuf },
    /// The process may not open it in this way.
    #[error("disk image {path} may not be opened for {access} by this process")]
    NotPermitted { path: PathBuf, access: &'static str },
    /// The path is a directory.
    #[error("disk image {path} is a directory")]
    Directory { path: PathBuf },
    /// The path is neither a file nor a block device.
    #[error("disk image {path} is neither a regular file nor a block device")]
    Kind { path: PathBuf },
    /// The image holds no bytes.
    #[error("disk image {path} is empty")]
    Empty { path: PathBuf },
    /// The size cannot be counted in sectors.
    #[error("disk image {path} has {size_bytes} bytes, which is not a multiple of {SECTOR_BYTES}")]
    Size { path: PathBuf, size_bytes: u64 },
    /// Another VM or process has it open in a way that excludes this one.
    #[error("disk image {path} is in use by another vm or process")]
    InUse { path: PathBuf },
    /// The host refused something else.
    #[error("cannot {what} disk image {path}")]
    Host {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// An open and locked image. Shared by the disk and every request in flight; the lock ends with the last of them.
pub(super) struct Image {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) block_device: bool,
    pub(super) properties: DiskProperties,
    /// A flush has failed: the host may have dropped what it could not write, and tells that once. No later flush of
    /// this open image can promise anything.
    pub(super) flush_failed: AtomicBool,
}

impl Image {
    /// Opens, measures and locks `path`.
    pub(super) fn open(path: &Path, read_only: bool) -> Result<Self, OpenError> {
        let access = if read_only { "reading" } else { "writing" };
        let failed = |what| move |source| open_error(what, path, access, source);
        // The kind is looked at first, because merely opening a FIFO or a tape does something.
        let before = fs::metadata(path).map_err(failed("look at"))?;
        check_kind(path, &before)?;
        let block_device = before.file_type().is_block_device();
        // Without O_CREAT it claims a block device: nobody mounts it meanwhile, nor makes a volume of it, and what is
        // claimed already is busy.
        let claim = if block_device && !read_only {
            libc::O_EXCL
        } else {
            0
        };
        let mut file = File::options()
            .read(true)
            .write(!read_only)
            .custom_flags(claim)
            .open(path)
            .map_err(failed("open"))?;
        let metadata = file.metadata().map_err(failed("look at"))?;
        check_kind(path, &metadata)?;
        if metadata.file_type().is_block_device() != block_device {
            let path = path.to_owned();
            return Err(OpenError::Kind { path });
        }
        lock::lock(&file, !read_only).map_err(failed("lock"))?;
        // The end of a block device is where seeking says it is; its metadata has no length.
        let size_bytes = file.seek(SeekFrom::End(0)).map_err(failed("measure"))?;
        let path = path.to_owned();
        if size_bytes == 0 {
            return Err(OpenError::Empty { path });
        }
        if !size_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(OpenError::Size { path, size_bytes });
        }
        let (logical_block_bytes, physical_block_bytes) = block_sizes(&file, &metadata);
        Ok(Self {
            file,
            path,
            block_device,
            properties: DiskProperties {
                capacity_bytes: size_bytes,
                read_only,
                logical_block_bytes,
                physical_block_bytes,
                discard: !read_only,
                write_zeroes: !read_only,
            },
            flush_failed: AtomicBool::new(false),
        })
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if let Err(error) = lock::unlock(&self.file) {
            log::warn!("disk image {}: cannot unlock: {error}", self.path.display());
        }
    }
}

fn check_kind(path: &Path, metadata: &fs::Metadata) -> Result<(), OpenError> {
    let path = path.to_owned();
    if metadata.is_dir() {
        return Err(OpenError::Directory { path });
    }
    if metadata.is_file() || metadata.file_type().is_block_device() {
        return Ok(());
    }
    Err(OpenError::Kind { path })
}

fn open_error(what: &'static str, path: &Path, access: &'static str, source: io::Error) -> OpenError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound => OpenError::Missing { path },
        // A lock that another one excludes is reported as EAGAIN or, by some file systems, as EACCES; a block device
        // that is mounted or a part of a volume as EBUSY.
        io::ErrorKind::WouldBlock | io::ErrorKind::ResourceBusy => OpenError::InUse { path },
        io::ErrorKind::PermissionDenied if what == "lock" => OpenError::InUse { path },
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            OpenError::NotPermitted { path, access }
        }
        _ => OpenError::Host { what, path, source },
    }
}

/// The logical and physical block size: a block device knows its own; a file is addressed by the sector and written
/// by its file system's block.
fn block_sizes(file: &File, metadata: &fs::Metadata) -> (u32, u32) {
    let sector = SECTOR_BYTES as u32;
    let (logical, physical) = if metadata.file_type().is_block_device() {
        (
            block_ioctl(file, libc::BLKSSZGET),
            block_ioctl(file, libc::BLKPBSZGET),
        )
    } else {
        (Some(sector), u32::try_from(metadata.blksize()).ok())
    };
    let usable = |bytes: &u32| bytes.is_power_of_two() && (sector..=1 << 20).contains(bytes);
    let logical = logical.filter(usable).unwrap_or(sector);
    (logical, physical.filter(usable).unwrap_or(logical).max(logical))
}

fn block_ioctl(file: &File, request: libc::Ioctl) -> Option<u32> {
    let mut value: libc::c_uint = 0;
    // SAFETY: both requests used here write one int to the pointer, which is valid and aligned for it.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut value) };
    (result == 0).then_some(value)
}
