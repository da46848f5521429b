//! A real Debian as a disk: systemd, udev, the QEMU guest agent, and the command server as a unit of systemd.
//!
//! Built once; the recipe beside it says from what, and another recipe builds it again.

use std::fs;
use std::path::{Path, PathBuf};

use crate::failure::{Context, Failure};
use crate::guest_image::SERVER;
use crate::packages::{self, as_root};
use crate::paths::Paths;
use crate::process;
use crate::progress::step;

const RELEASE: &str = "bookworm";
const PACKAGES: &str = "systemd-sysv,udev,dbus,kmod,iproute2,iputils-ping,qemu-guest-agent";
/// Two to three times what the packages take.
const SIZE: &str = "640M";

/// Applied in the new root by mmdebstrap. Periodic jobs and consoles are masked: they only cost time in an emulated guest.
const SETUP: &str = "\
set -e
root=$1
echo guest >$root/etc/hostname
echo '/dev/vda / ext4 rw 0 1' >$root/etc/fstab
chroot $root passwd -d root >/dev/null
chmod 755 $root/usr/local/sbin/harness-server
chroot $root systemctl -q enable harness.service
chroot $root systemctl -q mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer \
    e2scrub_all.timer e2scrub_reap.service serial-getty@ttyS0.service getty@tty1.service
rm -rf $root/var/cache/apt/* $root/var/lib/apt/lists/* $root/usr/share/doc/* $root/usr/share/man/* $root/usr/share/locale/*
";

const UNIT: &str = "\
[Unit]
Description=Command server of the test harness
[Service]
ExecStart=/usr/local/sbin/harness-server
Restart=always
RestartSec=1
[Install]
WantedBy=multi-user.target
";

/// Builds the image if it is missing or made by another recipe, and returns where it is.
pub fn ensure(paths: &Paths) -> Result<PathBuf, Failure> {
    let image = paths.guests.join("debian.img");
    let recipe_file = paths.guests.join("debian.recipe");
    let recipe = [RELEASE, PACKAGES, SIZE, SETUP, UNIT, SERVER].join("\n");
    if image.exists() && fs::read_to_string(&recipe_file).is_ok_and(|present| present == recipe) {
        return Ok(image);
    }
    packages::ensure(packages::DEBIAN_IMAGE)?;
    step("build a Debian disk", || build(paths, &image))?;
    fs::write(&recipe_file, recipe).context(|| format!("write {}", recipe_file.display()))?;
    Ok(image)
}

fn build(paths: &Paths, image: &Path) -> Result<(), Failure> {
    let folder = paths.guests.join("debian.building");
    fs::create_dir_all(&folder).context(|| format!("create {}", folder.display()))?;
    let write = |name: &str, content: &str| {
        let path = folder.join(name);
        fs::write(&path, content).context(|| format!("write {}", path.display()))
    };
    write("setup", SETUP)?;
    write("harness-server", SERVER)?;
    write("harness.service", UNIT)?;
    let place = |name: &str, to: &str| format!("--customize-hook=copy-in {} {to}", quote(&folder.join(name)));
    let root = folder.join("root");
    let mut bootstrap = as_root("mmdebstrap")?;
    bootstrap.args(["--quiet", "--variant=minbase", &format!("--include={PACKAGES}")]);
    bootstrap.arg(place("harness-server", "/usr/local/sbin"));
    bootstrap.arg(place("harness.service", "/etc/systemd/system"));
    bootstrap.arg(format!(
        "--customize-hook=sh {} \"$1\"",
        quote(&folder.join("setup"))
    ));
    process::capture(bootstrap.arg(RELEASE).arg(&root))?;
    let unfinished = folder.join("image");
    let mut format = as_root("/sbin/mkfs.ext4")?;
    format
        .args(["-q", "-L", "debian", "-d"])
        .arg(&root)
        .arg(&unfinished)
        .arg(SIZE);
    process::capture(&mut format)?;
    fs::rename(&unfinished, image).context(|| format!("publish {}", image.display()))?;
    process::capture(as_root("rm")?.arg("-rf").arg(&folder)).map(drop)
}

/// A path as one word of a shell.
fn quote(path: &Path) -> String {
    format!("'{}'", path.to_string_lossy().replace('\'', r"'\''"))
}
