//! The initial file system of the guests under test: busybox, the drivers of the devices a guest may have, an init
//! (`guest_init.sh`) and the command server (`guest_server.sh`).

use std::path::PathBuf;

use crate::failure::Failure;
use crate::images;
use crate::kernels::Kernel;
use crate::modules;
use crate::paths::Paths;

/// Drivers that are modules in at least one of Debian's kernels; what a kernel has built in or lacks is skipped.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_mem",
    "virtio_balloon",
    "virtio_rng",
    "evdev",
    "button",
    "vmgenid",
    "pvpanic-mmio",
];

/// Drivers that a test loads by itself, in the order of `modules/NAME.order`: nobody else's boot shall be longer for them.
const ON_DEMAND: &[&str] = &["bridge"];

/// The command server, for this image and for the Debian one.
pub const SERVER: &str = include_str!("guest_server.sh");

/// Builds the image from `kernel`'s modules beside the kernel and returns where it is.
pub fn ensure(paths: &Paths, kernel: &Kernel) -> Result<PathBuf, Failure> {
    let mut archive = images::with_busybox(paths)?;
    let mut all: Vec<String> = Vec::new();
    for (module, files) in modules::pack(&mut archive, kernel, &[MODULES, ON_DEMAND].concat())? {
        archive.file(
            &format!("modules/{module}.order"),
            0o644,
            lines(&files).as_bytes(),
        );
        for file in files {
            if MODULES.contains(&module.as_str()) && !all.contains(&file) {
                all.push(file);
            }
        }
    }
    archive.file("modules/all.order", 0o644, lines(&all).as_bytes());
    archive.file("init", 0o755, include_bytes!("guest_init.sh"));
    archive.file("bin/harness-server", 0o755, SERVER.as_bytes());
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n");
    archive.file("etc/group", 0o644, b"root:x:0:\n");
    // Where busybox's acpid looks for the action of a pressed power button unless it is told otherwise.
    archive.file("etc/acpi/PWRF/00000080", 0o755, b"#!/bin/sh\nexec poweroff -f\n");
    let path = kernel.folder.join("initramfs.img");
    images::publish(&path, &archive.finish())?;
    Ok(path)
}

fn lines(names: &[String]) -> String {
    names.iter().map(|name| format!("{name}\n")).collect()
}
