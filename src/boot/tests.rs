//! Kernels made of a header and a few bytes, and files that are none.

use std::io::Write;

use linux_loader::loader::bootparam::{boot_params, setup_header};
use linux_loader::start_info::{hvm_modlist_entry, hvm_start_info};
use tempfile::NamedTempFile;
use vm_memory::ByteValued;

use super::*;
use crate::machine::vcpu::boot_regs::BootProtocol;
use crate::memory::layout::{ACPI_TABLES_BASE, BOOT_PARAMS_BASE, CMDLINE_MAX_BYTES};
use crate::memory::region::{RAM_MIN_BYTES, RamOptions};

const RAM_BYTES: u64 = 2 * RAM_MIN_BYTES;
const KERNEL_ADDRESS: u64 = 16 << 20;

fn file(content: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("the host has a temporary directory");
    file.write_all(content).expect("the disk is not full");
    file
}

fn ram() -> GuestRam {
    GuestRam::new(RAM_BYTES, RamOptions::default(), 36).expect("128 MiB are there")
}

fn header() -> setup_header {
    setup_header {
        setup_sects: 1,
        header: 0x5372_6448,
        version: 0x020F,
        loadflags: 1,
        xloadflags: 1,
        initrd_addr_max: 0x7FFF_FFFF,
        cmdline_size: 2047,
        pref_address: KERNEL_ADDRESS,
        init_size: 32 << 20,
        ..Default::default()
    }
}

/// Two sectors of setup code and `kernel`.
fn bzimage(header: setup_header, kernel: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1024];
    let bytes = header.as_slice();
    image[0x1F1..0x1F1 + bytes.len()].copy_from_slice(bytes);
    image.extend_from_slice(kernel);
    image
}

/// An ELF image with `kernel` at [`KERNEL_ADDRESS`] and, where given, a PVH note.
fn elf(kernel: &[u8], pvh_entry: Option<u32>) -> Vec<u8> {
    let note = match pvh_entry {
        Some(entry) => [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry]
            .map(u32::to_le_bytes)
            .concat(),
        None => Vec::new(),
    };
    elf_with_notes(kernel, &note)
}

/// An ELF image with `kernel` at [`KERNEL_ADDRESS`] and these notes.
fn elf_with_notes(kernel: &[u8], notes: &[u8]) -> Vec<u8> {
    let mut image = b"\x7FELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2u16, 62].map(u16::to_le_bytes).concat()); // executable, x86-64
    image.extend(1u32.to_le_bytes());
    image.extend([KERNEL_ADDRESS, 64, 0].map(u64::to_le_bytes).concat()); // entry, program headers, sections
    image.extend(0u32.to_le_bytes());
    image.extend([64u16, 56, 2, 0, 0, 0].map(u16::to_le_bytes).concat());
    let (note_offset, load_offset) = (64 + 2 * 56, 256);
    let mut segment = |kind: u32, offset: u64, address: u64, size: u64| {
        image.extend([kind, 4].map(u32::to_le_bytes).concat());
        image.extend(
            [offset, address, address, size, size, 4]
                .map(u64::to_le_bytes)
                .concat(),
        );
    };
    segment(1, load_offset, KERNEL_ADDRESS, kernel.len() as u64);
    segment(4, note_offset, 0, notes.len() as u64);
    image.extend(notes);
    image.resize(load_offset as usize, 0);
    image.extend_from_slice(kernel);
    image
}

fn source(kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str) -> Result<BootSource, BootError> {
    let kernel = file(kernel);
    let initrd = initrd.map(file);
    BootSource::open(kernel.path(), initrd.as_ref().map(NamedTempFile::path), cmdline)
}

fn read(ram: &GuestRam, address: u64, length: usize) -> Vec<u8> {
    let mut data = vec![0; length];
    let memory = ram.memory();
    memory
        .read_slice(&mut data, GuestAddress(address))
        .expect("in ram");
    data
}

#[test]
fn a_bzimage_is_entered_by_the_64_bit_protocol() {
    let initrd = vec![7; 5000];
    let source = source(&bzimage(header(), b"kernel"), Some(&initrd), "quiet").expect("a kernel");
    let ram = ram();
    for _ in 0..2 {
        let entry = source.load(&ram, ACPI_TABLES_BASE).expect("it fits");
        let expected = BootEntry {
            protocol: BootProtocol::Linux64,
            address: KERNEL_ADDRESS + 0x200,
        };
        assert_eq!(entry, expected);
        assert_eq!(read(&ram, KERNEL_ADDRESS, 6), b"kernel");
        assert_eq!(read(&ram, CMDLINE_BASE, 6), b"quiet\0");
        let page: boot_params = ram
            .memory()
            .read_obj(GuestAddress(BOOT_PARAMS_BASE))
            .expect("in ram");
        let initrd_address = RAM_BYTES - 8192;
        assert_eq!({ page.hdr.ramdisk_image }, initrd_address as u32);
        assert_eq!({ page.hdr.ramdisk_size }, 5000);
        assert_eq!({ page.hdr.cmd_line_ptr }, CMDLINE_BASE as u32);
        assert_eq!(
            ({ page.acpi_rsdp_addr }, page.hdr.type_of_loader),
            (ACPI_TABLES_BASE, 0xFF)
        );
        let ram_entry = page.e820_table[2];
        assert_eq!(page.e820_entries, 4);
        assert_eq!(
            ({ ram_entry.addr }, { ram_entry.size }),
            (1 << 20, RAM_BYTES - (1 << 20))
        );
        assert_eq!(
            read(&ram, initrd_address, 5001),
            [initrd.as_slice(), &[0]].concat()
        );
        ram.clear().expect("a memory file has holes");
        assert_eq!(read(&ram, KERNEL_ADDRESS, 6), [0; 6]);
    }
}

#[test]
fn an_elf_image_with_the_note_is_entered_by_pvh() {
    let source = source(&elf(b"kernel", Some(0x0123_4567)), Some(&[7; 10]), "").expect("a kernel");
    let ram = ram();
    let entry = source.load(&ram, ACPI_TABLES_BASE).expect("it fits");
    assert_eq!((entry.protocol, entry.address), (BootProtocol::Pvh, 0x0123_4567));
    assert_eq!(read(&ram, KERNEL_ADDRESS, 6), b"kernel");
    let memory = ram.memory();
    let info: hvm_start_info = memory.read_obj(GuestAddress(BOOT_PARAMS_BASE)).expect("in ram");
    assert_eq!((info.magic, info.version, info.nr_modules), (0x336E_C578, 1, 1));
    assert_eq!((info.rsdp_paddr, info.memmap_entries), (ACPI_TABLES_BASE, 4));
    let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).expect("in ram");
    assert_eq!((module.paddr, module.size), (RAM_BYTES - 4096, 10));
    assert_eq!(read(&ram, module.paddr, 10), [7; 10]);
}

#[test]
fn linux_is_entered_in_64_bit_mode_whatever_other_notes_it_has() {
    let linux = [6u32, 4, 0x100].map(u32::to_le_bytes).concat();
    let linux = [linux.as_slice(), b"Linux\0\0\0", &[0; 4]].concat();
    let xen = [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x0123_4567].map(u32::to_le_bytes);
    for notes in [
        [xen.concat(), linux.clone()].concat(),
        [linux, xen.concat()].concat(),
    ] {
        let source = source(&elf_with_notes(b"kernel", &notes), None, "").expect("a kernel");
        let entry = source.load(&ram(), ACPI_TABLES_BASE).expect("it fits");
        let expected = (BootProtocol::Linux64, KERNEL_ADDRESS);
        assert_eq!((entry.protocol, entry.address), expected);
    }
}

#[test]
fn an_elf_image_without_the_note_is_entered_where_it_says() {
    let source = source(&elf(b"kernel", None), None, "").expect("a kernel");
    let entry = source.load(&ram(), ACPI_TABLES_BASE).expect("it fits");
    assert_eq!(
        (entry.protocol, entry.address),
        (BootProtocol::Linux64, KERNEL_ADDRESS)
    );
}

#[test]
fn what_is_no_kernel_is_refused_with_its_reason() {
    let old = setup_header {
        version: 0x020B,
        ..header()
    };
    let no_entry = setup_header {
        xloadflags: 0,
        ..header()
    };
    let low = setup_header {
        pref_address: 0x1000,
        ..header()
    };
    let mut other = elf(b"kernel", None);
    other[18] = 3;
    let mut cut_off = elf(b"kernel", None);
    cut_off.truncate(100);
    let mut far = elf(b"kernel", None);
    far[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut endless = elf(b"kernel", Some(1));
    endless[64 + 56 + 32..][..8].copy_from_slice(&(1u64 << 40).to_le_bytes());
    for (image, reason) in [
        (endless, "its notes are longer than those of a kernel"),
        (b"x".to_vec(), "it is too short"),
        (vec![0; 4096], "it is neither a bzImage nor an ELF image"),
        (bzimage(old, b""), "its boot protocol is older than 2.12"),
        (bzimage(no_entry, b""), "it has no 64-bit entry"),
        (bzimage(low, b""), "it wants to be loaded below 1 MiB"),
        (other, "it is an ELF image for another processor"),
        (cut_off, "its program headers are cut off"),
        (far, "its program headers are cut off"),
    ] {
        let error = source(&image, None, "").expect_err(reason).to_string();
        assert!(
            error.ends_with(&format!("is not a kernel that can be started: {reason}")),
            "{error}"
        );
    }
}

#[test]
fn what_does_not_fit_is_refused_with_both_numbers() {
    let large = setup_header {
        init_size: 120 << 20,
        ..header()
    };
    let source_large = source(&bzimage(large, b"kernel"), None, "").expect("a kernel");
    let error = source_large.load(&ram(), 0).expect_err("136 MiB do not fit");
    let told = error.to_string();
    assert!(
        told.ends_with("needs ram up to 0x8800000, ram below 4 GiB ends at 0x8000000"),
        "{told}"
    );
    let nearly = setup_header {
        init_size: (112 << 20) - 8192,
        ..header()
    };
    let initrd = vec![1; 8193];
    let source_initrd = source(&bzimage(nearly, b"kernel"), Some(&initrd), "").expect("a kernel");
    let error = source_initrd.load(&ram(), 0).expect_err("two pages are left");
    let told = error.to_string();
    assert!(
        told.ends_with("has 8193 bytes, there is room for 8192 above the kernel"),
        "{told}"
    );
}

#[test]
fn an_initrd_stays_below_what_the_kernel_allows() {
    let header = setup_header {
        initrd_addr_max: 0x3FF_FFFF,
        ..header()
    };
    let source = source(&bzimage(header, b"kernel"), Some(&[9; 4096]), "").expect("a kernel");
    let ram = ram();
    source.load(&ram, 0).expect("it fits");
    assert_eq!(read(&ram, 0x3FF_F000, 4096), [9; 4096]);
}

#[test]
fn bad_files_and_command_lines_are_named() {
    let kernel = bzimage(header(), b"kernel");
    let directory = tempfile::tempdir().expect("the host has a temporary directory");
    let missing = directory.path().join("missing");
    let error = BootSource::open(&missing, None, "").expect_err("it is missing");
    assert_eq!(
        error.to_string(),
        format!("cannot open kernel {}", missing.display())
    );
    let error = BootSource::open(directory.path(), None, "").expect_err("a directory");
    assert!(error.to_string().ends_with("is not a regular file"), "{error}");
    let error = source(&kernel, Some(b""), "").expect_err("empty");
    assert!(error.to_string().ends_with("is empty"), "{error}");
    let error = source(&kernel, None, &"x".repeat(CMDLINE_MAX_BYTES)).expect_err("too long");
    assert_eq!(
        error.to_string(),
        "the command line has 2048 bytes, the kernel reads at most 2047"
    );
    source(&kernel, None, &"x".repeat(CMDLINE_MAX_BYTES - 1)).expect("just fits");
    for (cmdline, told) in [("a\0", "'\\0' at byte 1"), ("kö", "'ö' at byte 1")] {
        let error = source(&kernel, None, cmdline).expect_err("not ascii").to_string();
        assert!(error.contains(told), "{error}");
    }
}

#[test]
fn a_kernel_that_shrank_after_it_was_opened_is_an_error() {
    let kernel = file(&bzimage(header(), b"kernel"));
    let source = BootSource::open(kernel.path(), None, "").expect("a kernel");
    kernel.as_file().set_len(600).expect("files shrink");
    let error = source.load(&ram(), 0).expect_err("it is cut off").to_string();
    assert!(
        error.ends_with("it is neither a bzImage nor an ELF image")
            || error.ends_with("before its setup code does"),
        "{error}"
    );
}
