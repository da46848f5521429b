//! What the guest finds at its first instruction: kernel, initrd, command line, memory map, parameters.
//!
//! | address | what |
//! |---|---|
//! | below 1 MiB | descriptors, parameters, page tables, command line (`memory::layout`) |
//! | where the image says | the kernel, and the room that it unpacks itself into |
//! | as high as the kernel allows below 4 GiB | the initrd |
//!
//! The files stay open, so that a reset loads what the VM was started with, whatever became of the paths. They are
//! untrusted. The registers are set by the vCPU from the [`BootEntry`] that loading returns.

mod kernel;
mod memory_map;
mod params;
mod reset_vector;

use std::fs::{File, OpenOptions};
use std::io::{self, Seek};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use self::kernel::{Fault, Kernel};
use self::params::Facts;
use crate::machine::vcpu::boot_regs::BootEntry;
use crate::memory::layout::CMDLINE_BASE;
use crate::memory::region::GuestRam;

const PAGE_BYTES: u64 = 4096;

/// The files and the command line that a VM is started from.
#[derive(Debug)]
pub struct BootSource {
    kernel: Opened,
    initrd: Option<Opened>,
    cmdline: String,
}

#[derive(Debug)]
struct Opened {
    path: PathBuf,
    file: File,
}

/// Why a VM cannot be started from its files.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be opened.
    #[error("cannot open {what} {}", path.display())]
    Open {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// A path does not lead to a file with content.
    #[error("{what} {} is {reason}", path.display())]
    NotAFile {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What it is instead.
        reason: &'static str,
    },
    /// A file cannot be read.
    #[error("cannot read {what} {}", path.display())]
    Read {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// The kernel file does not hold a kernel that can be started.
    #[error("{} is not a kernel that can be started: {reason}", path.display())]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The kernel and the room that it needs to start end behind the RAM.
    #[error("kernel {} needs ram up to {needed_end:#x}, ram below 4 GiB ends at {ram_end:#x}", path.display())]
    KernelTooLarge {
        /// The file.
        path: PathBuf,
        /// The first address behind what the kernel needs.
        needed_end: u64,
        /// The first address behind the RAM.
        ram_end: u64,
    },
    /// There is no room for the initrd above the kernel.
    #[error("initrd {} has {size_bytes} bytes, there is room for {room_bytes} above the kernel", path.display())]
    InitrdTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
        /// The room.
        room_bytes: u64,
    },
    /// The command line is longer than the kernel reads.
    #[error("the command line has {length_bytes} bytes, the kernel reads at most {max_bytes}")]
    CmdlineTooLong {
        /// The length.
        length_bytes: usize,
        /// The limit.
        max_bytes: usize,
    },
    /// The command line holds what a kernel cannot read.
    #[error(
        "the command line has the character {character:?} at byte {position}, only ASCII without NUL is possible"
    )]
    CmdlineCharacter {
        /// The character.
        character: char,
        /// Where it is.
        position: usize,
    },
    /// A part could not be written into guest memory.
    #[error("cannot write {what} into guest memory")]
    Memory {
        /// The part.
        what: &'static str,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
}

impl BootSource {
    /// Opens the files and checks everything that can be checked without guest memory.
    ///
    /// # Errors
    /// [`BootError`] when a file is missing, unreadable, empty or not a kernel, or when the command line is too long
    /// or not ASCII.
    pub fn open(kernel: &Path, initrd: Option<&Path>, cmdline: &str) -> Result<Self, BootError> {
        let source = Self {
            kernel: open("kernel", kernel)?,
            initrd: initrd.map(|path| open("initrd", path)).transpose()?,
            cmdline: cmdline.to_owned(),
        };
        let kernel = source.inspect_kernel()?;
        check_cmdline(cmdline, kernel.cmdline_max_bytes - 1)?;
        Ok(source)
    }

    /// Writes everything into `ram`, which is all zero: new, or after [`GuestRam::clear`]. Called again at each
    /// reset. `rsdp` is the guest-physical address of the ACPI RSDP, whose tables are written by their owner.
    ///
    /// # Errors
    /// [`BootError`] when something does not fit into the RAM or a file changed for the worse.
    pub fn load(&self, ram: &GuestRam, rsdp: u64) -> Result<BootEntry, BootError> {
        let (kernel, initrd) = self.place(ram)?;
        let loaded = kernel.load(&self.kernel.file, ram.memory());
        let (entry, header) = loaded.map_err(|error| BootError::NotAKernel {
            path: self.kernel.path.clone(),
            reason: error.to_string(),
        })?;
        if let (Some(file), Some((address, size_bytes))) = (&self.initrd, initrd) {
            file.load_at(address, size_bytes, ram)?;
        }
        let memory_error = |what| move |source| BootError::Memory { what, source };
        let cmdline = [self.cmdline.as_bytes(), &[0]].concat();
        ram.memory()
            .write_slice(&cmdline, GuestAddress(CMDLINE_BASE))
            .map_err(memory_error("the command line"))?;
        let facts = Facts {
            map: &memory_map::memory_map(ram.ranges()),
            cmdline_bytes: self.cmdline.len() as u32, // at most CMDLINE_MAX_BYTES
            initrd,
            rsdp,
        };
        reset_vector::write(ram.memory()).map_err(memory_error("the reset vector"))?;
        params::write(ram.memory(), entry.protocol, header, &facts)
            .map_err(memory_error("the boot parameters"))?;
        Ok(entry)
    }

    /// Checks that everything fits into `ram`, which stays untouched.
    ///
    /// # Errors
    /// [`BootError`], as [`BootSource::load`] would.
    pub fn check(&self, ram: &GuestRam) -> Result<(), BootError> {
        self.place(ram).map(drop)
    }

    /// The kernel, and the initrd's address and size.
    fn place(&self, ram: &GuestRam) -> Result<(Kernel, Option<(u32, u32)>), BootError> {
        let kernel = self.inspect_kernel()?;
        let ram_end = ram.low_end();
        if kernel.end > ram_end {
            return Err(BootError::KernelTooLarge {
                path: self.kernel.path.clone(),
                needed_end: kernel.end,
                ram_end,
            });
        }
        check_cmdline(&self.cmdline, kernel.cmdline_max_bytes - 1)?;
        let room_end = ram_end.min(kernel.initrd_end_max);
        let initrd = match &self.initrd {
            Some(initrd) => Some(initrd.place_below(room_end, kernel.end)?),
            None => None,
        };
        Ok((kernel, initrd))
    }

    fn inspect_kernel(&self) -> Result<Kernel, BootError> {
        let path = self.kernel.path.clone();
        Kernel::inspect(&self.kernel.file).map_err(|fault| match fault {
            Fault::Read(source) => BootError::Read {
                what: "kernel",
                path,
                source,
            },
            Fault::Form(reason) => BootError::NotAKernel {
                path,
                reason: reason.to_owned(),
            },
        })
    }
}

impl Opened {
    fn read_error(&self, source: io::Error) -> BootError {
        BootError::Read {
            what: "initrd",
            path: self.path.clone(),
            source,
        }
    }

    /// The highest page-aligned address that ends the initrd below `room_end`, and its size.
    fn place_below(&self, room_end: u64, room_start: u64) -> Result<(u32, u32), BootError> {
        let metadata = self.file.metadata();
        let size_bytes = metadata.map_err(|source| self.read_error(source))?.len();
        let room_start = room_start.next_multiple_of(PAGE_BYTES);
        let room_bytes = room_end.saturating_sub(room_start);
        let too_large = || BootError::InitrdTooLarge {
            path: self.path.clone(),
            size_bytes,
            room_bytes,
        };
        let address = room_end.checked_sub(size_bytes).ok_or_else(too_large)?;
        let address = address - address % PAGE_BYTES;
        if address < room_start {
            return Err(too_large());
        }
        // Both are below `room_end`, which is at most 4 GiB.
        Ok((address as u32, size_bytes as u32))
    }

    /// Reads the initrd to where it was placed.
    fn load_at(&self, address: u32, size_bytes: u32, ram: &GuestRam) -> Result<(), BootError> {
        let mut file = &self.file;
        file.rewind().map_err(|source| self.read_error(source))?;
        ram.memory()
            .read_exact_volatile_from(GuestAddress(address.into()), &mut file, size_bytes as usize)
            .map_err(|error| self.read_error(io::Error::other(error)))
    }
}

/// Opens a regular file that is not empty. Never waits, as opening a pipe otherwise would.
fn open(what: &'static str, path: &Path) -> Result<Opened, BootError> {
    let open_error = |source| BootError::Open {
        what,
        path: path.to_owned(),
        source,
    };
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(open_error)?;
    let metadata = file.metadata().map_err(open_error)?;
    let reason = match (metadata.is_file(), metadata.len()) {
        (false, _) => "not a regular file",
        (true, 0) => "empty",
        (true, _) => {
            return Ok(Opened {
                path: path.to_owned(),
                file,
            });
        }
    };
    Err(BootError::NotAFile {
        what,
        path: path.to_owned(),
        reason,
    })
}

/// Checks a command line against `max_bytes`, its final zero not counted.
fn check_cmdline(cmdline: &str, max_bytes: usize) -> Result<(), BootError> {
    if let Some((position, character)) = cmdline.char_indices().find(|(_, c)| !c.is_ascii() || *c == '\0') {
        return Err(BootError::CmdlineCharacter { character, position });
    }
    if cmdline.len() > max_bytes {
        return Err(BootError::CmdlineTooLong {
            length_bytes: cmdline.len(),
            max_bytes,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
