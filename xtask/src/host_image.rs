//! The initial file system of the test host: the modules to load and the script that builds its root.

use std::path::PathBuf;

use crate::failure::Failure;
use crate::images;
use crate::kernels::Kernel;
use crate::modules;
use crate::paths::Paths;

/// Loaded at boot: access to this machine's files, KVM, and what tests build networks and disks from.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "virtio_rng",
    "9p",
    "9pnet_virtio",
    "overlay",
    "kvm_amd",
    "tun",
    "tap",
    "vhost_net",
    "loop",
    "dm_mod",
    "dm_flakey",
    "dm_delay",
    "nbd",
    "ext4",
];

/// Builds the image from `kernel`'s modules and returns where it is.
pub fn ensure(paths: &Paths, kernel: &Kernel) -> Result<PathBuf, Failure> {
    let mut archive = images::with_busybox(paths)?;
    let mut order: Vec<String> = Vec::new();
    for (_, files) in modules::pack(&mut archive, kernel, MODULES)? {
        for file in files {
            if !order.contains(&file) {
                order.push(file);
            }
        }
    }
    archive.file("modules.order", 0o644, (order.join("\n") + "\n").as_bytes());
    archive.file("init", 0o755, include_bytes!("host_init.sh"));
    let path = paths.guests.join("test-host.img");
    images::publish(&path, &archive.finish())?;
    Ok(path)
}
