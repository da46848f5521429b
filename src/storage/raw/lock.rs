//! Locks on image files: open-file-description locks (fcntl(2) F_OFD_SETLK) over the whole file.
//!
//! They belong to the open file, not to the process, so they hold between two VMs of one process as well; QEMU takes
//! the same kind and sees ours. A writer's lock is exclusive, readers share theirs.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Locks `file`, without waiting; the lock ends with [`unlock`] or when the last descriptor of the open file closes.
///
/// # Errors
/// `WouldBlock` (`EAGAIN`, `EACCES` on some file systems) when another open file holds a lock that excludes this one.
pub(in crate::storage) fn lock(file: &File, exclusive: bool) -> io::Result<()> {
    set(file, if exclusive { libc::F_WRLCK } else { libc::F_RDLCK })
}

/// Ends the lock now, even if the kernel or a child process still refers to the open file for a moment.
pub(in crate::storage) fn unlock(file: &File) -> io::Result<()> {
    set(file, libc::F_UNLCK)
}

fn set(file: &File, kind: i32) -> io::Result<()> {
    // A length of 0 reaches to the end of the file, wherever that will be. `l_pid` must be 0.
    let range = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open for the length of the call, and F_OFD_SETLK only reads the valid `flock` that
    // the pointer refers to.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
