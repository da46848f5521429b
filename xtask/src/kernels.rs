//! Debian's kernels: downloaded, unpacked, and taken apart into `vmlinuz` (bzImage), `vmlinux` (ELF with its PVH note)
//! and the module tree.
//!
//! ```text
//! <guests>/cloud/   what linux-image-cloud-amd64 depends on: virtio as modules, boots fastest
//! <guests>/generic/ what linux-image-amd64 depends on: also the test host's kernel (9p, overlay, vhost, kvm)
//!     vmlinuz vmlinux config release modules/lib/modules/<release>/
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::debian;
use crate::failure::{Context, Failure};
use crate::paths::Paths;
use crate::process;
use crate::progress::step;

/// Which of Debian's kernels.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Flavour {
    /// For virtual machines in clouds.
    Cloud,
    /// For any machine.
    Generic,
}

/// A kernel in the cache.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Where its files are.
    pub folder: PathBuf,
    /// `uname -r` of it.
    pub release: String,
}

impl Flavour {
    /// Both.
    pub const ALL: [Flavour; 2] = [Flavour::Cloud, Flavour::Generic];

    /// The folder's name.
    pub fn name(self) -> &'static str {
        match self {
            Flavour::Cloud => "cloud",
            Flavour::Generic => "generic",
        }
    }

    fn package(self) -> &'static str {
        match self {
            Flavour::Cloud => "linux-image-cloud-amd64",
            Flavour::Generic => "linux-image-amd64",
        }
    }
}

impl Kernel {
    /// The kernel of this flavour, fetched when it is not in the cache.
    pub fn ensure(paths: &Paths, flavour: Flavour) -> Result<Self, Failure> {
        let folder = paths.guests.join(flavour.name());
        let release_file = folder.join("release");
        if !release_file.exists() {
            let package = debian::dependency(flavour.package(), "linux-image-")?;
            step(&format!("fetch {package}"), || {
                debian::unpack(&package, &folder, |unpacked| arrange(unpacked, &package))
            })?;
        }
        let release =
            fs::read_to_string(&release_file).context(|| format!("read {}", release_file.display()))?;
        Ok(Kernel {
            folder,
            release: release.trim().to_string(),
        })
    }

    /// The folder that holds `lib/modules`.
    pub fn module_base(&self) -> PathBuf {
        self.folder.join("modules")
    }
}

/// Turns an unpacked package into the layout above.
fn arrange(unpacked: &Path, package: &str) -> Result<(), Failure> {
    let release = package.trim_start_matches("linux-image-").to_string();
    let base = unpacked.join("modules");
    fs::create_dir_all(base.join("lib")).context(|| format!("create {}", base.display()))?;
    let lib = if unpacked.join("usr/lib/modules").exists() {
        "usr/lib"
    } else {
        "lib"
    };
    rename(&unpacked.join(lib).join("modules"), &base.join("lib/modules"))?;
    process::capture(Command::new("/sbin/depmod").arg("-b").arg(&base).arg(&release))?;
    rename(
        &unpacked.join(format!("boot/vmlinuz-{release}")),
        &unpacked.join("vmlinuz"),
    )?;
    rename(
        &unpacked.join(format!("boot/config-{release}")),
        &unpacked.join("config"),
    )?;
    let image = unpacked.join("vmlinuz");
    let image = fs::read(&image).context(|| format!("read {}", image.display()))?;
    write(&unpacked.join("vmlinux"), &extract_elf(&image)?)?;
    write(&unpacked.join("release"), format!("{release}\n").as_bytes())
}

/// The ELF kernel inside a bzImage: its compressed payload lies where the setup header says (Linux
/// `Documentation/arch/x86/boot.rst`: `setup_sects`, `payload_offset`, `payload_length`).
fn extract_elf(image: &[u8]) -> Result<Vec<u8>, Failure> {
    let word = |offset: usize| {
        let bytes = image
            .get(offset..offset + 4)
            .and_then(|bytes| bytes.try_into().ok());
        bytes.map(u32::from_le_bytes).map(|value| value as usize)
    };
    let header = || Some((usize::from(*image.get(0x1f1)?), word(0x248)?, word(0x24c)?));
    let (setup_sectors, payload_offset, payload_size) =
        header().ok_or_else(|| Failure::new("the kernel image is too short for a setup header"))?;
    let begin = (setup_sectors + 1) * 512 + payload_offset;
    let payload = image
        .get(begin..begin + payload_size)
        .ok_or_else(|| Failure::new("the kernel image ends before its payload does"))?;
    let (program, arguments, trailer_size) = decompressor(payload)?;
    let stream = &payload[..payload.len() - trailer_size];
    let elf = process::filter(Command::new(program).args(arguments), stream)?;
    if elf.starts_with(b"\x7fELF") {
        Ok(elf)
    } else {
        Err(Failure::new("the kernel's payload is not ELF"))
    }
}

/// The Debian program that undoes the payload's compression, and how many bytes the kernel's build appended to the
/// stream (the uncompressed size; gzip ends with it anyway).
fn decompressor(payload: &[u8]) -> Result<(&'static str, &'static [&'static str], usize), Failure> {
    match payload {
        [0x1f, 0x8b, ..] => Ok(("gzip", &["-dc"], 0)),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Ok(("xz", &["-dc"], 4)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(("zstd", &["-dc"], 4)),
        [0x02, 0x21, 0x4c, 0x18, ..] => Ok(("lz4", &["-dc"], 4)),
        _ => Err(Failure::new(
            "the kernel's payload is compressed with none of gzip, xz, zstd, lz4",
        )),
    }
}

fn rename(from: &Path, to: &Path) -> Result<(), Failure> {
    fs::rename(from, to).context(|| format!("move {} to {}", from.display(), to.display()))
}

fn write(path: &Path, content: &[u8]) -> Result<(), Failure> {
    fs::write(path, content).context(|| format!("write {}", path.display()))
}
