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
    _lock: File,
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
        Ok(Self { dir, _lock: lock })
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
        Ok((Self { dir, _lock: lock }, config))
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
    pub fn store(&self, config: &VmConfig) -> Result<(), StateDirError> {
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
    let held = file
        .metadata()
        .map_err(|source| io_error("inspect", &path, source))?;
    match fs::metadata(&path) {
        Ok(found) if (found.dev(), found.ino()) == (held.dev(), held.ino()) => Ok(()),
        Ok(_) => Err(in_use()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(in_use()),
        Err(source) => Err(io_error("inspect", &path, source)),
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

/// Reads at most one byte more than a document can have.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(DOCUMENT_MAX_BYTES as u64 + 1)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(FILE_MODE)
        .open(path)?;
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
mod tests {
    use std::error::Error;

    use super::*;
    use crate::config::{ConfigVersion, DiskSpec};

    fn config(cmdline: &str) -> VmConfig {
        let builder = VmConfig::builder("db", "/boot/vmlinuz").cmdline(cmdline);
        builder.build().unwrap()
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn message(error: &dyn Error) -> String {
        match error.source() {
            Some(source) => format!("{error}: {}", message(source)),
            None => error.to_string(),
        }
    }

    #[test]
    fn what_is_stored_is_found_again() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("vm");
        let state_dir = StateDir::create(&dir, &config("first")).unwrap();
        assert_eq!(names(&dir), ["config.json", "lock"]);
        let second = config("second");
        state_dir.store(&second).unwrap();
        drop(state_dir);
        let (state_dir, found) = StateDir::open(&dir).unwrap();
        assert_eq!((state_dir.path(), found), (dir.as_path(), second));
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&dir.join(CONFIG_FILE))), (0o700, 0o600));
    }

    #[test]
    fn a_directory_stays_the_same_when_the_process_goes_elsewhere() {
        let folder = tempfile::tempdir().expect("the host has a folder for temporary files");
        let here = std::env::current_dir().expect("the test is somewhere");
        let up: PathBuf = here.components().skip(1).map(|_| "..").collect();
        let relative = up.join(folder.path().strip_prefix("/").expect("it is absolute"));
        let made = StateDir::create(relative.join("vm"), &config("relative")).expect("nothing is there");
        assert!(made.path().is_absolute(), "{}", made.path().display());
    }

    #[test]
    fn a_directory_has_one_opener_at_a_time() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("vm");
        let state_dir = StateDir::create(&dir, &config("")).unwrap();
        let expected = format!("state directory {} is in use by another process", dir.display());
        assert_eq!(StateDir::open(&dir).unwrap_err().to_string(), expected);
        assert_eq!(
            StateDir::create(&dir, &config("")).unwrap_err().to_string(),
            expected
        );
        drop(state_dir);
        assert!(StateDir::open(&dir).is_ok(), "the lock went with its holder");
        assert_eq!(
            names(&dir),
            ["config.json", "lock"],
            "the refused opener took nothing away"
        );
    }

    #[test]
    fn a_vm_is_never_created_over_another_nor_opened_where_none_is() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("vm");
        let missing = StateDir::open(&dir).unwrap_err();
        assert_eq!(
            missing.to_string(),
            format!("state directory {} holds no vm", dir.display())
        );
        fs::create_dir(&dir).unwrap();
        assert!(matches!(StateDir::open(&dir), Err(StateDirError::NoVm { .. })));
        assert!(names(&dir).is_empty(), "looking leaves no lock file behind");

        let first = config("first");
        drop(StateDir::create(&dir, &first).unwrap());
        let taken = StateDir::create(&dir, &config("second")).unwrap_err();
        assert_eq!(
            taken.to_string(),
            format!("state directory {} holds a vm already", dir.display())
        );
        assert_eq!(StateDir::open(&dir).unwrap().1, first);
    }

    #[test]
    fn a_failed_creation_leaves_nothing_that_it_made() {
        let temp = tempfile::tempdir().unwrap();
        // The configuration cannot be put in place over a directory, which is how a full disk fails too: late.
        let dir = temp.path().join("vm");
        fs::create_dir(&dir).unwrap();
        fs::create_dir(dir.join(CONFIG_NEW_FILE)).unwrap();
        let error = StateDir::create(&dir, &config("")).unwrap_err();
        assert!(error.to_string().starts_with("cannot write "), "{error}");
        assert_eq!(names(&dir), [CONFIG_NEW_FILE], "only what was there before");

        let orphan = temp.path().join("missing").join("vm");
        let error = StateDir::create(&orphan, &config("")).unwrap_err();
        assert!(
            error.to_string().starts_with("cannot make the directory "),
            "{error}"
        );
        assert!(!temp.path().join("missing").exists());

        let file = temp.path().join("file");
        fs::write(&file, "x").unwrap();
        assert!(StateDir::create(&file, &config("")).is_err());
        assert_eq!(fs::read(&file).unwrap(), b"x");
    }

    #[test]
    fn a_torn_replacement_is_never_read() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("vm");
        let first = config("first");
        drop(StateDir::create(&dir, &first).unwrap());
        let whole = document::write(&config("second"));
        for length in 0..whole.len() {
            fs::write(dir.join(CONFIG_NEW_FILE), &whole[..length]).unwrap();
            let (_, found) = StateDir::open(&dir).unwrap();
            assert_eq!(found, first, "torn after {length} bytes");
        }
        let (state_dir, _) = StateDir::open(&dir).unwrap();
        state_dir.store(&config("third")).unwrap();
        assert_eq!(
            names(&dir),
            ["config.json", "lock"],
            "the next replacement takes the torn file's place"
        );
    }

    #[test]
    fn unusable_configurations_are_refused_with_the_reason() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("vm");
        let disk = DiskSpec::new("root", "/root.img");
        let builder = VmConfig::builder("db", "/k").version(ConfigVersion::V1_0);
        drop(StateDir::create(&dir, &builder.disk(disk).build().unwrap()).unwrap());
        let path = dir.join(CONFIG_FILE);
        let whole = fs::read(&path).unwrap();
        let prefix = format!("configuration {} cannot be used: ", path.display());
        // Every truncation but the one that only loses the final newline.
        for length in 0..whole.len() - 1 {
            fs::write(&path, &whole[..length]).unwrap();
            let error = StateDir::open(&dir).unwrap_err();
            assert!(
                message(&error).starts_with(&format!("{prefix}the document is not a vm configuration: EOF")),
                "{}",
                message(&error)
            );
        }
        fs::write(&path, vec![b' '; DOCUMENT_MAX_BYTES + 1]).unwrap();
        let long = message(&StateDir::open(&dir).unwrap_err());
        assert_eq!(long, format!("{prefix}the document has more than 1048576 bytes"));
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let error = StateDir::open(&dir).unwrap_err();
        assert!(error.to_string().starts_with("cannot read "), "{error}");
    }
}
