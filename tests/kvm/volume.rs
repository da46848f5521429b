//! Volumes of device-mapper that a test suspends: what is in flight then is the kernel's, and waits.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use libtest_mimic::Failed;

const BYTES: u64 = 64 << 20;

static VOLUME_COUNT: AtomicU32 = AtomicU32::new(0);

/// A volume of device-mapper over a loop device over a file; all of it goes with the value.
pub struct Volume {
    _folder: tempfile::TempDir,
    device: String,
    name: String,
}

impl Volume {
    pub fn create() -> Result<Self, Failed> {
        let count = VOLUME_COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("file");
        File::create(&file)?.set_len(BYTES)?;
        let device = run("losetup", &["--find", "--show", &file.to_string_lossy()])?;
        let volume = Self {
            _folder: folder,
            name: format!("vm-lifecycle-{}-{count}", std::process::id()),
            device: device.trim().to_owned(),
        };
        run("dmsetup", &["create", &volume.name, "--table", &volume.table()])?;
        run("dmsetup", &["mknodes"])?;
        Ok(volume)
    }

    fn table(&self) -> String {
        format!("0 {} linear {} 0", BYTES / 512, self.device)
    }

    /// The block device.
    pub fn path(&self) -> PathBuf {
        Path::new("/dev/mapper").join(&self.name)
    }

    /// Requests that come from now on wait, and are neither done nor failed.
    pub fn hang(&self) -> Result<(), Failed> {
        run("dmsetup", &["suspend", "--noflush", "--nolockfs", &self.name]).map(drop)
    }

    /// Requests are served again, those that waited first.
    pub fn go_on(&self) -> Result<(), Failed> {
        run("dmsetup", &["resume", &self.name]).map(drop)
    }

    /// Requests that wait, and those that come, fail from now on, as if the power had failed before them.
    pub fn lose(&self) -> Result<(), Failed> {
        let table = format!("0 {} error", BYTES / 512);
        run("dmsetup", &["load", &self.name, "--table", &table])?;
        self.go_on()
    }

    /// The volume works again after [`lose`](Self::lose).
    pub fn mend(&self) -> Result<(), Failed> {
        run("dmsetup", &["load", &self.name, "--table", &self.table()])?;
        self.hang()?;
        self.go_on()
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let undone = [
            run("dmsetup", &["resume", &self.name]),
            run("dmsetup", &["remove", "--deferred", &self.name]),
            run("losetup", &["--detach", &self.device]),
        ];
        for error in undone.into_iter().filter_map(Result::err) {
            eprintln!("{error:?}");
        }
    }
}

/// The file system of a volume, mounted for as long as the value lives.
pub struct Mounted<'a> {
    volume: &'a Volume,
    folder: PathBuf,
}

impl<'a> Mounted<'a> {
    /// Makes a file system, and `folder` to mount it on.
    pub fn create(volume: &'a Volume, folder: &Path) -> Result<Self, Failed> {
        run("mkfs.ext4", &["-q", &volume.path().to_string_lossy()])?;
        std::fs::create_dir(folder)?;
        let mounted = Self {
            volume,
            folder: folder.to_owned(),
        };
        mounted.mount()?;
        Ok(mounted)
    }

    /// Forgets what is not on the volume, after [`Volume::lose`], and comes up anew from what is.
    pub fn recover(&self) -> Result<(), Failed> {
        run("umount", &[&self.folder.to_string_lossy()])?;
        self.volume.mend()?;
        self.mount()
    }

    fn mount(&self) -> Result<(), Failed> {
        let (device, folder) = (self.volume.path(), self.folder.to_string_lossy());
        run("mount", &["-t", "ext4", &device.to_string_lossy(), &folder]).map(drop)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        // Lazily: a volume that hangs would hold up whoever waits for it.
        if let Err(error) = run("umount", &["--lazy", &self.folder.to_string_lossy()]) {
            eprintln!("{error:?}");
        }
    }
}

/// Runs a program of the host's administrator, which must succeed, and returns what it said.
pub fn run(program: &str, arguments: &[&str]) -> Result<String, Failed> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    let output = command.output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!(
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    )
    .into())
}
