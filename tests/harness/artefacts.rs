//! The kernels and images that guests are started from, as `cargo xtask guests` leaves them.
//!
//! The initial file system's words of the kernel command line: `harness.modules=all|none|NAME,NAME…`,
//! `harness.port=ttyS1`, `harness.root=/dev/vda` (run that disk's init), `harness.exit=poweroff|reboot|panic|triplefault|idle`.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What the guest writes on its console when its init runs, before it does anything else.
pub const INIT_REACHED: &str = "GUEST-INIT-REACHED";
/// The virtio-console port on which a guest serves commands.
pub const PORT_NAME: &str = "harness";

/// Which of Debian's kernels a guest boots.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Flavour {
    /// Boots fastest; virtio drivers are modules, VM generation id is not built in.
    Cloud,
    /// Debian's ordinary kernel, with VM generation id.
    Generic,
}

/// A kernel with what belongs to it.
#[derive(Clone, Debug)]
pub struct GuestKernel {
    /// The bzImage.
    pub bzimage: PathBuf,
    /// The ELF inside it, with its PVH note.
    pub elf: PathBuf,
    /// Initial file system with busybox, virtio drivers and the command server.
    pub initramfs: PathBuf,
    /// `uname -r`.
    pub release: String,
}

/// The folder of artefacts: `VM_LIFECYCLE_GUESTS`, or `target/guests` of this checkout.
pub fn folder() -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guests");
    env::var_os("VM_LIFECYCLE_GUESTS").map_or_else(default, PathBuf::from)
}

/// A Debian root file system (ext4, systemd, udev, qemu-guest-agent, the command server) for a disk; booted with
/// `harness.root=/dev/vda`. Copy it, or lay an overlay on it, before a guest writes to it.
pub fn debian_image() -> io::Result<PathBuf> {
    present(folder().join("debian.img"))
}

impl GuestKernel {
    /// Finds the kernel of this flavour.
    ///
    /// # Errors
    /// A missing file, by its path and with the command that makes it.
    pub fn find(flavour: Flavour) -> io::Result<Self> {
        let folder = folder().join(match flavour {
            Flavour::Cloud => "cloud",
            Flavour::Generic => "generic",
        });
        Ok(GuestKernel {
            bzimage: present(folder.join("vmlinuz"))?,
            elf: present(folder.join("vmlinux"))?,
            initramfs: present(folder.join("initramfs.img"))?,
            release: fs::read_to_string(present(folder.join("release"))?)?
                .trim()
                .to_string(),
        })
    }

    /// The same kernel with its files copied into `folder`, for measurements that a slow file system would disturb.
    pub fn copied_to(&self, folder: &Path) -> io::Result<Self> {
        let copy = |from: &Path| -> io::Result<PathBuf> {
            let to = folder.join(from.file_name().unwrap_or_default());
            fs::copy(from, &to)?;
            Ok(to)
        };
        Ok(GuestKernel {
            bzimage: copy(&self.bzimage)?,
            elf: copy(&self.elf)?,
            initramfs: copy(&self.initramfs)?,
            release: self.release.clone(),
        })
    }
}

fn present(path: PathBuf) -> io::Result<PathBuf> {
    if path.exists() {
        return Ok(path);
    }
    let text = format!("{} is missing: run `cargo xtask guests`", path.display());
    Err(io::Error::new(io::ErrorKind::NotFound, text))
}
