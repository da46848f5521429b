//! Kernel images: what they are, whether they fit, and loading them.
//!
//! Two formats: a bzImage is entered by the Linux 64-bit boot protocol (Linux `Documentation/arch/x86/boot.rst`,
//! protocol 2.12 or later), an ELF image by the same protocol where its notes say that it is Linux, else by PVH where
//! it has that note (`docs/decisions/0010-linux-images-are-entered-in-64-bit-mode.md`). The file is untrusted: everything
//! that the loader does not check (the memory that the kernel needs to unpack itself, its zero-initialized part) is
//! checked here before anything is written.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use linux_loader::elf::{ELFCLASS64, EM_X86_64, Elf64_Ehdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader, PvhBootCapability};
use vm_memory::{Address, ByteValued, GuestAddress, GuestMemoryMmap};

use crate::machine::vcpu::boot_regs::{BootEntry, BootProtocol};
use crate::memory::layout::{CMDLINE_MAX_BYTES, HIGH_MEMORY_START};

/// Where the setup header is in a bzImage (boot.rst §1.3).
const SETUP_HEADER_OFFSET: u64 = 0x1F1;
/// "HdrS" (boot.rst §1.3).
const SETUP_HEADER_MAGIC: u32 = 0x5372_6448;
/// The first protocol that tells of the 64-bit entry (boot.rst §1.3, xloadflags).
const PROTOCOL_MIN: u16 = 0x020C;
/// `XLF_KERNEL_64`: the kernel has a 64-bit entry.
const XLF_KERNEL_64: u16 = 1;
/// `LOADED_HIGH`: the kernel is loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1;
/// The 64-bit entry's offset in the loaded kernel (boot.rst §1.15).
const ENTRY_64_OFFSET: u64 = 0x200;
/// Where an initrd may end when the kernel does not say (boot.rst §1.3, initrd_addr_max before 2.03).
const INITRD_END_MAX: u64 = 0x8000_0000;
/// The most program headers that are looked at; kernels have less than ten.
const PROGRAM_HEADERS_MAX: u16 = 64;
/// The most bytes of a note segment: the loader reads a note at a time, and kernels have some hundred bytes of them.
const NOTES_BYTES_MAX: u64 = 64 << 10;
/// The owner of the notes that only Linux writes.
const LINUX_NOTE_OWNER: &[u8] = b"Linux\0";

/// A kernel image that was looked at.
#[derive(Debug)]
pub(super) struct Kernel {
    format: Format,
    /// The first address behind everything that the kernel uses before it knows its memory.
    pub(super) end: u64,
    /// The last address that an initrd may have, plus one.
    pub(super) initrd_end_max: u64,
    /// The longest command line, its final zero included.
    pub(super) cmdline_max_bytes: usize,
}

#[derive(Debug)]
enum Format {
    BzImage { header: setup_header },
    Elf { is_linux: bool },
}

/// Why an image cannot be used.
#[derive(Debug)]
pub(super) enum Fault {
    /// The file cannot be read.
    Read(io::Error),
    /// The file is not such a kernel, with the reason.
    Form(&'static str),
}

impl Kernel {
    /// Looks at the image in `file`.
    pub(super) fn inspect(file: &File) -> Result<Self, Fault> {
        let mut magic = [0; 4];
        read_at(file, &mut magic, 0, "it is too short")?;
        if magic == *b"\x7FELF" {
            return inspect_elf(file);
        }
        let mut header = setup_header::default();
        let neither = "it is neither a bzImage nor an ELF image";
        read_at(file, header.as_mut_slice(), SETUP_HEADER_OFFSET, neither)?;
        if { header.header } != SETUP_HEADER_MAGIC {
            return Err(Fault::Form(neither));
        }
        inspect_bzimage(file, header)
    }

    /// Writes the kernel into `memory`, which reaches [`Kernel::end`]. Returns the entry and the setup header for
    /// the zero page.
    pub(super) fn load(
        &self,
        file: &File,
        memory: &GuestMemoryMmap,
    ) -> Result<(BootEntry, setup_header), linux_loader::loader::Error> {
        let mut file = file;
        match &self.format {
            Format::BzImage { header } => {
                let address = GuestAddress(header.pref_address);
                let loaded = BzImage::load(memory, Some(address), &mut file, None)?;
                let entry = BootEntry {
                    protocol: BootProtocol::Linux64,
                    address: address.raw_value() + ENTRY_64_OFFSET,
                };
                Ok((entry, loaded.setup_header.unwrap_or(*header)))
            }
            Format::Elf { is_linux } => {
                let loaded = Elf::load(memory, None, &mut file, None)?;
                let entry = match loaded.pvh_boot_cap {
                    PvhBootCapability::PvhEntryPresent(address) if !is_linux => BootEntry {
                        protocol: BootProtocol::Pvh,
                        address: address.raw_value(),
                    },
                    PvhBootCapability::PvhEntryPresent(_)
                    | PvhBootCapability::PvhEntryNotPresent
                    | PvhBootCapability::PvhEntryIgnored => BootEntry {
                        protocol: BootProtocol::Linux64,
                        address: loaded.kernel_load.raw_value(),
                    },
                };
                Ok((entry, elf_setup_header()))
            }
        }
    }
}

/// Checks a bzImage's header and finds out what the kernel needs.
fn inspect_bzimage(file: &File, header: setup_header) -> Result<Kernel, Fault> {
    if { header.version } < PROTOCOL_MIN {
        return Err(Fault::Form("its boot protocol is older than 2.12"));
    }
    if { header.xloadflags } & XLF_KERNEL_64 == 0 || { header.loadflags } & LOADED_HIGH == 0 {
        return Err(Fault::Form("it has no 64-bit entry"));
    }
    let address = { header.pref_address };
    if address < HIGH_MEMORY_START {
        return Err(Fault::Form("it wants to be loaded below 1 MiB"));
    }
    let setup_sectors = match header.setup_sects {
        0 => 4, // boot.rst §1.3
        count => u64::from(count),
    };
    let file_bytes = file.metadata().map_err(Fault::Read)?.len();
    let Some(kernel_bytes) = file_bytes.checked_sub((setup_sectors + 1) * 512) else {
        return Err(Fault::Form("it ends before its setup code does"));
    };
    let needed_bytes = kernel_bytes.max(u64::from(header.init_size));
    let cmdline_max_bytes = ({ header.cmdline_size } as usize).saturating_add(1);
    Ok(Kernel {
        end: address.saturating_add(needed_bytes),
        initrd_end_max: u64::from(header.initrd_addr_max) + 1,
        cmdline_max_bytes: cmdline_max_bytes.min(CMDLINE_MAX_BYTES),
        format: Format::BzImage { header },
    })
}

/// Checks an ELF image's program headers and finds out what the kernel needs.
fn inspect_elf(file: &File) -> Result<Kernel, Fault> {
    let mut header = Elf64_Ehdr::default();
    read_at(file, header.as_mut_slice(), 0, "its ELF header is cut off")?;
    if header.e_ident[4] != ELFCLASS64 || header.e_machine != EM_X86_64 {
        return Err(Fault::Form("it is an ELF image for another processor"));
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() || header.e_phnum > PROGRAM_HEADERS_MAX {
        return Err(Fault::Form("its program headers are not those of a kernel"));
    }
    let (mut end, mut is_linux) = (0, false);
    for number in 0..u64::from(header.e_phnum) {
        let mut segment = Elf64_Phdr::default();
        let offset = header.e_phoff.checked_add(number * u64::from(header.e_phentsize));
        let cut_off = "its program headers are cut off";
        let offset = offset.ok_or(Fault::Form(cut_off))?;
        read_at(file, segment.as_mut_slice(), offset, cut_off)?;
        match segment.p_type {
            PT_LOAD => {}
            PT_NOTE => {
                is_linux |= has_linux_notes(file, &segment)?;
                continue;
            }
            _ => continue,
        }
        if segment.p_paddr < HIGH_MEMORY_START {
            return Err(Fault::Form("it wants to be loaded below 1 MiB"));
        }
        let segment_bytes = segment.p_memsz.max(segment.p_filesz);
        end = end.max(segment.p_paddr.saturating_add(segment_bytes));
    }
    if end == 0 {
        return Err(Fault::Form("it has nothing to load"));
    }
    Ok(Kernel {
        format: Format::Elf { is_linux },
        end,
        initrd_end_max: INITRD_END_MAX,
        cmdline_max_bytes: CMDLINE_MAX_BYTES,
    })
}

/// Whether there is a note of Linux's own among those of `segment` (Linux `include/linux/elfnote.h`).
fn has_linux_notes(file: &File, segment: &Elf64_Phdr) -> Result<bool, Fault> {
    if segment.p_filesz > NOTES_BYTES_MAX {
        return Err(Fault::Form("its notes are longer than those of a kernel"));
    }
    let mut notes = vec![0; segment.p_filesz as usize];
    read_at(file, &mut notes, segment.p_offset, "its notes are cut off")?;
    let mut rest = notes.as_slice();
    // Sizes of name and description, type, then both, each filled up to four bytes.
    while let Some((&[n0, n1, n2, n3, d0, d1, d2, d3, _, _, _, _], after)) = rest.split_first_chunk() {
        let name_bytes = u32::from_le_bytes([n0, n1, n2, n3]) as usize;
        let description_bytes = u32::from_le_bytes([d0, d1, d2, d3]) as usize;
        if after.get(..name_bytes) == Some(LINUX_NOTE_OWNER) {
            return Ok(true);
        }
        let note_bytes = name_bytes.next_multiple_of(4) + description_bytes.next_multiple_of(4);
        rest = after.get(note_bytes..).unwrap_or_default();
    }
    Ok(false)
}

/// An ELF image has no setup header: the least that the kernel looks at.
fn elf_setup_header() -> setup_header {
    setup_header {
        boot_flag: 0xAA55,
        header: SETUP_HEADER_MAGIC,
        version: PROTOCOL_MIN,
        kernel_alignment: 0x20_0000,
        ..Default::default()
    }
}

/// Reads exactly `data`; a file that ends before is not a kernel because of `reason`.
fn read_at(file: &File, data: &mut [u8], offset: u64, reason: &'static str) -> Result<(), Fault> {
    file.read_exact_at(data, offset)
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput => Fault::Form(reason),
            _ => Fault::Read(error),
        })
}
