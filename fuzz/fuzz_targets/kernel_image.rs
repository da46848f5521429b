//! Any file as a kernel, and as an initrd: it is refused by name or loaded into RAM, nothing else.
//!
//! `fuzz/seeds/kernel_image` holds the smallest bzImage and ELF images that load; the input is the command line's
//! length, then the file.
#![no_main]
#![forbid(unsafe_code)]

use std::io::{Seek, Write};
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use vm_lifecycle::boot::{BootError, BootSource};
use vm_lifecycle::memory::layout::ACPI_TABLES_BASE;
use vm_lifecycle::memory::region::{GuestRam, RAM_MIN_BYTES, RamOptions};
use vmm_sys_util::tempfile::TempFile;

/// A bzImage is at least as long as its setup code; nothing is gained by more.
const IMAGE_BYTES_MAX: usize = 16 << 10;

fn ram() -> &'static GuestRam {
    static RAM: OnceLock<GuestRam> = OnceLock::new();
    let make = || GuestRam::new(RAM_MIN_BYTES, RamOptions::default(), 36);
    RAM.get_or_init(|| make().expect("the host has 64 MiB"))
}

fuzz_target!(|input: &[u8]| {
    let Some((length, image)) = input.split_first() else {
        return;
    };
    if image.len() > IMAGE_BYTES_MAX {
        return;
    }
    let file = TempFile::new().expect("the disk is not full");
    let mut writer = file.as_file();
    writer.write_all(image).expect("the disk is not full");
    writer.rewind().expect("a file has a beginning");
    let cmdline = "x".repeat(usize::from(*length) * 9);
    let initrd = (length % 2 == 1).then(|| file.as_path());
    let Ok(source) = BootSource::open(file.as_path(), initrd, &cmdline) else {
        return;
    };
    let ram = ram();
    ram.clear().expect("a memory file has holes");
    let checked = source.check(ram);
    let loaded = source.load(ram, ACPI_TABLES_BASE);
    match (checked, loaded) {
        (Ok(()), Ok(_) | Err(BootError::NotAKernel { .. })) => {}
        (Err(checked), Err(loaded)) => assert_eq!(checked.to_string(), loaded.to_string()),
        (Err(checked), Ok(_)) => panic!("loaded in spite of: {checked}"),
        (Ok(()), Err(loaded)) => panic!("checked, and yet: {loaded}"),
    }
});
