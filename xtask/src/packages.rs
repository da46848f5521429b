//! The Debian packages this tool needs on the machine, installed when they are missing.
//!
//! Kernels and busybox are not among them: they are downloaded and unpacked into the target folder, nothing of them is
//! installed.

use std::process::Command;

use crate::failure::Failure;
use crate::process;
use crate::progress::{note, step};

/// A package and a program of it, by which its presence is told without asking the package system.
#[derive(Clone, Copy, Debug)]
pub struct Package {
    name: &'static str,
    program: &'static str,
}

impl Package {
    const fn new(name: &'static str, program: &'static str) -> Self {
        Package { name, program }
    }
}

/// Needed for every guest: the emulator, module order, the kernel's compression, images, device mapper, networks.
pub const GUESTS: &[Package] = &[
    Package::new("qemu-system-x86", "qemu-system-x86_64"),
    Package::new("kmod", "depmod"),
    Package::new("xz-utils", "xz"),
    Package::new("lz4", "lz4"),
    Package::new("zstd", "zstd"),
    Package::new("e2fsprogs", "mkfs.ext4"),
    Package::new("dmsetup", "dmsetup"),
    Package::new("iproute2", "ip"),
    Package::new("iputils-ping", "ping"),
];

/// Needed to build the fuzz targets: libFuzzer is C++.
pub const FUZZ: &[Package] = &[Package::new("g++", "c++")];

/// Needed to build a Debian root image.
pub const DEBIAN_IMAGE: &[Package] = &[Package::new("mmdebstrap", "mmdebstrap")];

/// Installs what is missing of `wanted`, as root or through sudo.
///
/// # Errors
/// On a machine that is not Debian the failure lists the programs to install by hand.
pub fn ensure(wanted: &[Package]) -> Result<(), Failure> {
    let missing: Vec<Package> = wanted
        .iter()
        .copied()
        .filter(|package| !process::exists(package.program))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    if !process::exists("apt-get") {
        let programs: Vec<&str> = missing.iter().map(|package| package.program).collect();
        return Err(Failure::new(format!(
            "this machine has no apt-get; install these programs by hand: {} (Debian's packages: {}). Guest kernels are \
             fetched with apt-get and dpkg too: copy a filled folder and name it in VM_LIFECYCLE_GUESTS",
            programs.join(" "),
            names.join(" ")
        )));
    }
    step(&format!("install {}", names.join(" ")), || install(&names))
}

/// Refreshes apt's lists, for a machine on which a download failed for want of them.
pub fn refresh_lists() -> Result<(), Failure> {
    process::capture(as_root("apt-get")?.arg("update")).map(drop)
}

fn install(names: &[&str]) -> Result<(), Failure> {
    if install_once(names).is_ok() {
        return Ok(());
    }
    note("refreshing the package lists");
    refresh_lists()?;
    install_once(names)
}

fn install_once(names: &[&str]) -> Result<(), Failure> {
    let mut command = as_root("apt-get")?;
    command
        .args(["install", "-y", "--no-install-recommends"])
        .args(names);
    process::capture(&mut command).map(drop)
}

/// A command that runs as root, through sudo where this process does not.
pub fn as_root(program: &str) -> Result<Command, Failure> {
    // SAFETY: geteuid takes no arguments, touches no memory and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    let mut command = if root {
        Command::new(program)
    } else if process::exists("sudo") {
        let mut sudo = Command::new("sudo");
        sudo.args(["DEBIAN_FRONTEND=noninteractive", program]);
        sudo
    } else {
        return Err(Failure::new(format!(
            "`{program}` needs root, and there is no sudo on this machine"
        )));
    };
    command.env("DEBIAN_FRONTEND", "noninteractive");
    Ok(command)
}
