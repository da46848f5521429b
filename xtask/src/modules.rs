//! Kernel modules for an initial file system: which files a module needs and in which order they are loaded.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::archive::Archive;
use crate::failure::{Context, Failure};
use crate::kernels::Kernel;
use crate::process;

/// The files to load for `module`, dependencies first, as paths on this machine; none when it is built in.
pub fn files_in_order(kernel: &Kernel, module: &str) -> Result<Vec<String>, Failure> {
    let base = kernel.module_base();
    let mut command = Command::new("/sbin/modprobe");
    command
        .arg("-d")
        .arg(&base)
        .args(["-S", &kernel.release, "-D", module]);
    let listing = process::capture(&mut command)?;
    let listing = String::from_utf8_lossy(&listing);
    let files = listing.lines().filter_map(|line| line.strip_prefix("insmod "));
    Ok(files.map(|file| file.trim().to_string()).collect())
}

/// Puts the files that `modules` need into `archive` under `modules/`, and returns per module the names to load in order.
///
/// A module that this kernel does not have is left out, a built-in one has no files.
pub fn pack(
    archive: &mut Archive,
    kernel: &Kernel,
    modules: &[&str],
) -> Result<Vec<(String, Vec<String>)>, Failure> {
    let mut packed: Vec<String> = Vec::new();
    let mut orders = Vec::new();
    for module in modules {
        let Ok(files) = files_in_order(kernel, module) else {
            continue;
        };
        let mut order = Vec::new();
        for file in files {
            let (name, content) = read_plain(Path::new(&file))?;
            if !packed.contains(&name) {
                archive.file(&format!("modules/{name}"), 0o644, &content);
                packed.push(name.clone());
            }
            order.push(name);
        }
        orders.push(((*module).to_string(), order));
    }
    Ok(orders)
}

/// A module's name and its uncompressed content.
fn read_plain(file: &Path) -> Result<(String, Vec<u8>), Failure> {
    let content = fs::read(file).context(|| format!("read {}", file.display()))?;
    let name = file.file_name().unwrap_or_default().to_string_lossy().to_string();
    match name.strip_suffix(".xz") {
        Some(plain) => Ok((
            plain.to_string(),
            process::filter(Command::new("xz").args(["-dc"]), &content)?,
        )),
        None => Ok((name, content)),
    }
}
