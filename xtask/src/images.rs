//! What the two initial file systems of this tool have in common: busybox, and being replaced only when they change.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use crate::archive::Archive;
use crate::debian;
use crate::failure::{Context, Failure};
use crate::paths::Paths;
use crate::process;
use crate::progress::step;

/// Takes the lock that lets one process at a time fill the folder of artefacts; released when dropped.
pub fn lock(paths: &Paths) -> Result<File, Failure> {
    fs::create_dir_all(&paths.guests).context(|| format!("create {}", paths.guests.display()))?;
    let path = paths.guests.join(".lock");
    let lock = File::create(&path).context(|| format!("create {}", path.display()))?;
    lock.lock().context(|| format!("lock {}", path.display()))?;
    Ok(lock)
}

/// An archive with busybox under every name it answers to, and the folders every system mounts.
pub fn with_busybox(paths: &Paths) -> Result<Archive, Failure> {
    let folder = paths.guests.join("busybox");
    if !folder.exists() {
        step("fetch busybox-static", || {
            debian::unpack("busybox-static", &folder, |_| Ok(()))
        })?;
    }
    let mut binary = folder.join("bin/busybox");
    if !binary.exists() {
        binary = folder.join("usr/bin/busybox");
    }
    let content = fs::read(&binary).context(|| format!("read {}", binary.display()))?;
    let applets = process::capture(Command::new(&binary).arg("--list"))?;
    let mut archive = Archive::default();
    for mounted in [
        "dev", "proc", "sys", "tmp", "run", "etc", "root", "mnt", "var/log",
    ] {
        archive.folder(mounted);
    }
    archive.device("dev/console", 5, 1);
    archive.device("dev/null", 1, 3);
    archive.file("bin/busybox", 0o755, &content);
    archive.link("sbin", "bin");
    for applet in String::from_utf8_lossy(&applets)
        .lines()
        .filter(|applet| *applet != "busybox")
    {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    Ok(archive)
}

/// Writes `content` unless the file already says the same; a reader sees the old or the new file, never a part.
pub fn publish(path: &Path, content: &[u8]) -> Result<(), Failure> {
    if fs::read(path).is_ok_and(|present| present == content) {
        return Ok(());
    }
    let building = path.with_extension("building");
    fs::write(&building, content).context(|| format!("write {}", building.display()))?;
    fs::rename(&building, path).context(|| format!("publish {}", path.display()))
}
