//! The file behind guest RAM.
//!
//! What a page costs is decided here: each page that the guest touches for the first time is an exit, so a file that
//! takes 2 MiB at a time from the host makes hundreds of times fewer of them than one of 4 KiB pages. In order:
//! hugetlb where it was asked for; else a tmpfs of our own with large pages; else a plain memory file.
//! The kernel maps files that have large pages at multiples of their size by itself.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::MetadataExt;

use super::region::HUGE_PAGE_BYTES;

/// Flags of fsopen(2), fsconfig(2) and fsmount(2) (Linux `include/uapi/linux/mount.h`).
const FSOPEN_CLOEXEC: u32 = 1;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;
const FSMOUNT_CLOEXEC: u32 = 1;

/// Makes a file in memory of `size_bytes`, one hole, of 2 MiB pages from the host's pool when `hugetlb`.
pub(super) fn memory_file(size_bytes: u64, hugetlb: bool) -> io::Result<File> {
    let mut flags = libc::MFD_CLOEXEC;
    if hugetlb {
        flags |= libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
    } else {
        match large_page_file(size_bytes) {
            Ok(file) => return Ok(file),
            Err(error) => log::debug!("guest ram gets small pages: {error}"),
        }
    }
    // SAFETY: the name is a terminated string and the call touches nothing else of this process.
    let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), flags) };
    let file = new_file(i64::from(fd))?;
    file.set_len(size_bytes)?;
    Ok(file)
}

/// Makes the file on a tmpfs with large pages, used where the host has 2 MiB free in one piece. For other memory files
/// the host's setting (`shmem_enabled`) is `never` nearly everywhere. Needs CAP_SYS_ADMIN. The mount is in no directory
/// tree and goes away with the file.
fn large_page_file(size_bytes: u64) -> io::Result<File> {
    // SAFETY: the name is a terminated string and the call touches nothing else of this process.
    let context = unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), FSOPEN_CLOEXEC) };
    let context = new_file(context)?;
    let limit = CString::new(size_bytes.next_multiple_of(HUGE_PAGE_BYTES).to_string())?;
    configure(&context, FSCONFIG_SET_STRING, Some((c"huge", c"always")))?;
    configure(&context, FSCONFIG_SET_STRING, Some((c"size", &limit)))?;
    configure(&context, FSCONFIG_CMD_CREATE, None)?;
    // SAFETY: the descriptor is open and the call takes numbers only.
    let mount = unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0) };
    let mount = new_file(mount)?;
    let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC;
    // SAFETY: the descriptor is open and the path is a terminated string.
    let file = unsafe { libc::openat(mount.as_raw_fd(), c".".as_ptr(), flags, 0o600) };
    let file = new_file(i64::from(file))?;
    file.set_len(size_bytes)?;
    Ok(file)
}

fn configure(context: &File, command: u32, setting: Option<(&CStr, &CStr)>) -> io::Result<()> {
    let null = std::ptr::null();
    let (key, value) = setting.map_or((null, null), |(key, value)| (key.as_ptr(), value.as_ptr()));
    // SAFETY: the descriptor is open; key and value are terminated strings that outlive the call, or null where the
    // command wants none.
    let result = unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Wraps the descriptor that a call has just made, or tells the call's error.
fn new_file(result: i64) -> io::Result<File> {
    match i32::try_from(result) {
        // SAFETY: the descriptor is new and owned by nobody else.
        Ok(fd) if fd >= 0 => Ok(unsafe { File::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives pages of `file` back to the host: they read as zeros from now on.
pub(super) fn punch(file: &File, offset: u64, length_bytes: u64) -> io::Result<()> {
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    let length = i64::try_from(length_bytes).map_err(io::Error::other)?;
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the descriptor is open; the pages of every mapping stay valid and read as zeros from now on, which
    // volatile accesses allow for as they do for the guest's writes.
    if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What `file` costs the host at this moment, in bytes.
pub(super) fn resident_bytes(file: &File) -> io::Result<u64> {
    // st_blocks counts units of 512 bytes whatever the block size is (stat(2)).
    Ok(file.metadata()?.blocks() * 512)
}

/// The memory that this host has in all, in bytes.
pub(super) fn host_memory_bytes() -> io::Result<u64> {
    // SAFETY: all-zero bytes are a valid sysinfo, which has integers only.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a live, writable sysinfo, which is what the call fills.
    if unsafe { libc::sysinfo(&mut info) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(info.totalram.saturating_mul(u64::from(info.mem_unit)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn one_touched_byte_takes_one_large_page() {
        let file = large_page_file(8 << 20).expect("this test needs CAP_SYS_ADMIN");
        file.write_all_at(&[1], 5 << 20).expect("it is inside the file");
        let resident_bytes = file.metadata().expect("a file has metadata").blocks() * 512;
        assert_eq!(resident_bytes, HUGE_PAGE_BYTES);
    }

    #[test]
    fn a_plain_memory_file_is_one_hole() {
        let file = memory_file(1 << 20, false).expect("the host has memory files");
        let metadata = file.metadata().expect("a file has metadata");
        assert_eq!((metadata.len(), metadata.blocks()), (1 << 20, 0));
    }

    #[test]
    fn the_host_has_memory() {
        assert!(host_memory_bytes().expect("the host tells") > 64 << 20);
    }
}
