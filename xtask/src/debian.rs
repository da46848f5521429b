//! Fetching Debian packages and unpacking them into a folder, without installing anything.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::failure::{Context, Failure};
use crate::packages;
use crate::process;
use crate::progress::note;

/// The first package `package` depends on whose name begins with `prefix`: what a meta-package stands for.
pub fn dependency(package: &str, prefix: &str) -> Result<String, Failure> {
    find_dependency(package, prefix).or_else(|_| {
        note("refreshing the package lists");
        packages::refresh_lists()?;
        find_dependency(package, prefix)
    })
}

/// Downloads `package` and unpacks it into `into`, a folder that appears only when it is complete.
///
/// `finish` may add to the folder before it appears.
pub fn unpack(
    package: &str,
    into: &Path,
    finish: impl FnOnce(&Path) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let building = into.with_extension("building");
    remove(&building)?;
    fs::create_dir_all(&building).context(|| format!("create {}", building.display()))?;
    let archive = building.join("download");
    fs::create_dir(&archive).context(|| format!("create {}", archive.display()))?;
    if download(package, &archive).is_err() {
        note("refreshing the package lists");
        packages::refresh_lists()?;
        download(package, &archive)?;
    }
    for file in fs::read_dir(&archive).context(|| format!("list {}", archive.display()))? {
        let file = file.context(|| format!("list {}", archive.display()))?.path();
        process::capture(Command::new("dpkg").arg("-x").arg(&file).arg(&building))?;
    }
    remove(&archive)?;
    finish(&building)?;
    remove(into)?;
    fs::rename(&building, into).context(|| format!("publish {}", into.display()))
}

fn find_dependency(package: &str, prefix: &str) -> Result<String, Failure> {
    let listing = process::capture(Command::new("apt-cache").args(["depends", package]))?;
    let listing = String::from_utf8_lossy(&listing);
    let mut names = listing
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "));
    names
        .find(|name| name.starts_with(prefix))
        .map(str::to_string)
        .ok_or_else(|| {
            Failure::new(format!(
                "`{package}` depends on no package named {prefix}*; is it in apt's lists?"
            ))
        })
}

fn download(package: &str, into: &Path) -> Result<(), Failure> {
    // As root, apt would drop its privileges and then complain that it cannot write here.
    let options = ["-q", "-o", "APT::Sandbox::User=root", "download", package];
    process::capture(Command::new("apt-get").args(options).current_dir(into)).map(drop)
}

fn remove(folder: &Path) -> Result<(), Failure> {
    if folder.exists() {
        fs::remove_dir_all(folder).context(|| format!("remove {}", folder.display()))?;
    }
    Ok(())
}
