//! The directory of one VM: its lock and its configuration.
//!
//! | file | what it is |
//! |---|---|
//! | `lock` | held by the process that has the VM; empty |
//! | `config.json` | the configuration, replaced as a whole |
//! | `config.json.new` | the next configuration while it is written; left over after a crash, and then meaningless |
//!
//! A replacement writes the new file, syncs it, renames it and syncs the directory: whoever opens the directory after
//! a crash finds the old or the new configuration, never a part of one.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::VmConfig;
use super::document::{self, DOCUMENT_MAX_BYTES, DocumentError};

const LOCK_FILE: &str = "lock";
const CONFIG_FILE: &str = "config.json";
const CONFIG_NEW_FILE: &str = "config.json.new";
/// What is in the directory concerns its owner alone.
const DIR_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

/// The directory of a VM, locked against every other process and every other opener in this one. Dropping it unlocks.
#[derive(Debug)]
pub struct StateDir {
    dir: PathBuf,
    /// Holds the lock until it is closed.
    lock: File,
}

/// Why a state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateDirError {
    /// Someone has the VM open.
    #[error("state directory {} is in use by another process", dir.display())]
    InUse { dir: PathBuf },
    /// A VM is there already.
    #[error("state directory {} holds a vm already", dir.display())]
    HoldsVm { dir: PathBuf },
    /// No VM is there.
    #[error("state directory {} holds no vm", dir.display())]
    NoVm { dir: PathBuf },
    /// What is there now is not what this process has locked.
    #[error("state directory {} was taken away, or another vm's put in its place", dir.display())]
    Lost { dir: PathBuf },
    /// The configuration cannot be understood.
    #[error("configuration {} cannot be used", path.display())]
    Document {
        path: PathBuf,
        #[source]
        source: DocumentError,
    },
    /// The host refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl StateDir {
    /// Puts a new VM into `dir`, which is made when it does not exist; its parent must. On an error everything that was
    /// made here is gone again.
    ///
    /// # Errors
    /// [`StateDirError::HoldsVm`], [`StateDirError::InUse`], or [`StateDirError::Io`].
    pub fn create(dir: impl Into<PathBuf>, config: &VmConfig) -> Result<Self, StateDirError> {
        let dir = absolute(dir.into())?;
        // In the order of their drops: files go while the lock is held, and the directory goes when it is empty.
        let mut made_dir = MadeDir(None);
        match DirBuilder::new().mode(DIR_MODE).create(&dir) {
            Ok(()) => made_dir.0 = Some(dir.clone()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(io_error("make the directory", &dir, source)),
        }
        let (lock, is_new) = open_lock(&dir)?;
        let mut made_files = MadeFiles(Vec::new());
        let held = hold(&lock, &dir);
        // A lock file that someone else holds by now is theirs, whoever made it.
        if is_new && !matches!(held, Err(StateDirError::InUse { .. })) {
            made_files.0.push(dir.join(LOCK_FILE));
        }
        held?;
        let config_path = dir.join(CONFIG_FILE);
        if exists(&config_path)? {
            return Err(StateDirError::HoldsVm { dir });
        }
        made_files.0.push(config_path);
        store(&dir, config)?;
        if made_dir.0.is_some() {
            sync_dir(parent(&dir))?;
        }
        made_files.0.clear();
        made_dir.0 = None;
        Ok(Self { dir, lock })
    }

    /// Opens the directory of a VM and reads its configuration.
    ///
    /// # Errors
    /// [`StateDirError::NoVm`], [`StateDirError::InUse`], [`StateDirError::Document`], or [`StateDirError::Io`].
    pub fn open(dir: impl Into<PathBuf>) -> Result<(Self, VmConfig), StateDirError> {
        let dir = absolute(dir.into())?;
        let config_path = dir.join(CONFIG_FILE);
        // Looked at before the lock, so that no lock file is left in a directory that is not a VM's.
        if !exists(&config_path)? {
            return Err(StateDirError::NoVm { dir });
        }
        let (lock, _) = open_lock(&dir)?;
        hold(&lock, &dir)?;
        let bytes = match read_bounded(&config_path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(StateDirError::NoVm { dir }),
            Err(source) => return Err(io_error("read", &config_path, source)),
        };
        let config = document::read(&bytes).map_err(|source| StateDirError::Document {
            path: config_path,
            source,
        })?;
        Ok((Self { dir, lock }, config))
    }

    /// Where the directory is.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Replaces the configuration as a whole.
    ///
    /// # Errors
    /// [`StateDirError::Io`]. The old configuration is then in force, unless the last step failed, syncing the
    /// directory: then the new one is, and a power failure may bring the old one back.
    /// [`StateDirError::Lost`] when the directory is not this VM's any more; nothing is written.
    pub fn store(&self, config: &VmConfig) -> Result<(), StateDirError> {
        if !is_found(&self.lock, &self.dir)? {
            return Err(StateDirError::Lost {
                dir: self.dir.clone(),
            });
        }
        store(&self.dir, config)
    }
}

/// A directory that goes away again unless it is kept.
struct MadeDir(Option<PathBuf>);

impl Drop for MadeDir {
    fn drop(&mut self) {
        if let Some(dir) = &self.0 {
            undo(dir, fs::remove_dir(dir));
        }
    }
}

/// Files that go away again unless they are kept.
struct MadeFiles(Vec<PathBuf>);

impl Drop for MadeFiles {
    fn drop(&mut self) {
        for file in &self.0 {
            undo(file, fs::remove_file(file));
        }
    }
}

fn undo(path: &Path, result: io::Result<()>) {
    if let Err(error) = result
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn!("cannot remove {}: {error}", path.display());
    }
}

/// Opens the lock file of `dir` and tells whether it was made here.
fn open_lock(dir: &Path) -> Result<(File, bool), StateDirError> {
    let path = dir.join(LOCK_FILE);
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(FILE_MODE);
    match options.clone().create_new(true).open(&path) {
        Ok(file) => Ok((file, true)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => match options.open(&path) {
            Ok(file) => Ok((file, false)),
            Err(source) => Err(io_error("open", &path, source)),
        },
        Err(source) => Err(io_error("make", &path, source)),
    }
}

/// Takes the lock, which `file` holds until it is closed.
fn hold(file: &File, dir: &Path) -> Result<(), StateDirError> {
    let path = dir.join(LOCK_FILE);
    let in_use = || StateDirError::InUse { dir: dir.to_owned() };
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(in_use()),
        Err(TryLockError::Error(source)) => return Err(io_error("lock", &path, source)),
    }
    // A creation that failed meanwhile took its lock file away: then this lock is on a file that nobody else finds.
    if is_found(file, dir)? {
        Ok(())
    } else {
        Err(in_use())
    }
}

/// Whether `lock` is the lock file that everybody finds in `dir`.
fn is_found(lock: &File, dir: &Path) -> Result<bool, StateDirError> {
    let path = dir.join(LOCK_FILE);
    let inspect = |source| io_error("inspect", &path, source);
    let held = lock.metadata().map_err(inspect)?;
    match fs::metadata(&path) {
        Ok(found) => Ok((found.dev(), found.ino()) == (held.dev(), held.ino())),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(false)
        }
        Err(source) => Err(inspect(source)),
    }
}

fn store(dir: &Path, config: &VmConfig) -> Result<(), StateDirError> {
    let new_path = dir.join(CONFIG_NEW_FILE);
    let path = dir.join(CONFIG_FILE);
    let written = write_synced(&new_path, &document::write(config))
        .map_err(|source| io_error("write", &new_path, source))
        .and_then(|()| fs::rename(&new_path, &path).map_err(|source| io_error("replace", &path, source)));
    if written.is_err() {
        // What is left over would be overwritten the next time; failing to remove it changes nothing.
        let _ = fs::remove_file(&new_path);
    }
    written?;
    sync_dir(dir)
}

fn exists(path: &Path) -> Result<bool, StateDirError> {
    path.try_exists()
        .map_err(|source| io_error("look for", path, source))
}

/// Reads at most one byte more than a document can have, from a file that makes nobody wait.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a regular file",
        ));
    }
    file.take(DOCUMENT_MAX_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Writes a new file; whatever is in its place goes.
fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(FILE_MODE).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn sync_dir(dir: &Path) -> Result<(), StateDirError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|source| io_error("sync the directory", dir, source))
}

fn parent(dir: &Path) -> &Path {
    match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// The directory by a path that stays right when the process changes its own.
fn absolute(dir: PathBuf) -> Result<PathBuf, StateDirError> {
    std::path::absolute(&dir).map_err(|source| io_error("find", &dir, source))
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> StateDirError {
    StateDirError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests;
