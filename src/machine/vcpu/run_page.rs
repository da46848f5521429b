//! The page that KVM shares with the vCPU's thread, and how another thread gets a vCPU out of the guest.
//!
//! A kick is two things in this order: `immediate_exit` in the shared page, which stops the vCPU at its next entry,
//! and a signal to its thread, which stops it inside the guest (KVM API 5, `immediate_exit`). Whichever way the two
//! race with the entry, the vCPU leaves; whatever it was doing for the guest is finished first.
//!
//! The signal is the first real-time signal for which this process has no handler when the first vCPU is made. It
//! gets an empty handler, once and for good; nothing else in the process is changed.

use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{
    kvm_run, kvm_run__bindgen_ty_1__bindgen_ty_4 as RunIo,
    kvm_run__bindgen_ty_1__bindgen_ty_13 as RunInternal,
};
use kvm_ioctls::VcpuFd;

const PAGE_BYTES: usize = 4096;
const EXIT_OFFSET: usize = offset_of!(kvm_run, __bindgen_anon_1);
const _: () = assert!(size_of::<kvm_run>() <= PAGE_BYTES);

/// A mapping of the shared page of its own, so that it can be used while the vCPU's descriptor is in `KVM_RUN`.
pub(super) struct RunPage {
    page: NonNull<u8>,
}

// SAFETY: the page is memory shared with the kernel. It is accessed by atomic or volatile operations only and stays
// mapped until the drop, so any thread may do that.
unsafe impl Send for RunPage {}
// SAFETY: as above; no method needs exclusive access.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps the page of `fd`.
    pub(super) fn map(fd: &VcpuFd) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory of this process; the
        // descriptor is a vCPU's, whose page 0 is its kvm_run.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(page) {
            Some(page) if page.as_ptr() != libc::MAP_FAILED => Ok(Self { page: page.cast() }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Whether the vCPU leaves at its next entry into the guest.
    pub(super) fn set_immediate_exit(&self, exit: bool) {
        let byte = self.field(offset_of!(kvm_run, immediate_exit));
        // SAFETY: the byte is inside the mapped page, a byte is always aligned, and everyone in this process
        // accesses it atomically: kvm-ioctls leaves it alone unless asked.
        let byte = unsafe { AtomicU8::from_ptr(byte) };
        byte.store(u8::from(exit), Ordering::SeqCst);
    }

    /// The size of one element of the port access that the vCPU has just left the guest for: 1, 2 or 4.
    pub(super) fn pio_size_bytes(&self) -> usize {
        // SAFETY: the byte is inside the mapped page; the kernel wrote it before KVM_RUN returned on this thread.
        let size = unsafe { self.field(EXIT_OFFSET + offset_of!(RunIo, size)).read_volatile() };
        match size {
            2 | 4 => usize::from(size),
            _ => 1,
        }
    }

    /// The kernel's reason for the internal error that the vCPU has just left the guest for.
    pub(super) fn internal_suberror(&self) -> u32 {
        let suberror = self.field(EXIT_OFFSET + offset_of!(RunInternal, suberror));
        // SAFETY: the word is inside the mapped page and aligned, as it is in the kernel's structure, and the kernel
        // wrote it before KVM_RUN returned on this thread.
        unsafe { suberror.cast::<u32>().read_volatile() }
    }

    fn field(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset < PAGE_BYTES);
        self.page.as_ptr().wrapping_add(offset)
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own and no pointer into it outlives the methods above.
        unsafe { libc::munmap(self.page.as_ptr().cast(), PAGE_BYTES) };
    }
}

/// The id of the calling thread, for [`kick`].
pub(super) fn thread_id() -> libc::pid_t {
    // SAFETY: the call only returns a number.
    unsafe { libc::gettid() }
}

/// Interrupts `thread`, a living thread of this process that runs a vCPU.
pub(super) fn kick(thread: libc::pid_t) {
    let Ok(signal) = kick_signal() else {
        return; // no vCPU can have been made
    };
    // SAFETY: signals to a thread of this process with a handler that does nothing change no memory.
    let result = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) };
    if result != 0 {
        log::error!("cannot kick vcpu thread {thread}: {}", io::Error::last_os_error());
    }
}

/// Lets the calling thread receive kicks, whatever it inherited.
pub(super) fn accept_kicks() {
    let Ok(signal) = kick_signal() else {
        return; // no vCPU can have been made
    };
    // SAFETY: an all-zero set is storage for the calls below, which initialize it and change only this thread's mask.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
    }
}

/// The signal that kicks vCPUs, with its handler installed.
pub(super) fn kick_signal() -> io::Result<libc::c_int> {
    static SIGNAL: OnceLock<Result<libc::c_int, i32>> = OnceLock::new();
    let install = || install_handler().map_err(|error| error.raw_os_error().unwrap_or(libc::EINVAL));
    SIGNAL.get_or_init(install).map_err(io::Error::from_raw_os_error)
}

extern "C" fn on_kick(_signal: libc::c_int) {}

fn install_handler() -> io::Result<libc::c_int> {
    for signal in libc::SIGRTMIN()..=libc::SIGRTMAX() {
        // SAFETY: zeroed sigactions are valid storage; the first call only reads the present action into one.
        let (result, present) = unsafe {
            let mut present: libc::sigaction = std::mem::zeroed();
            (libc::sigaction(signal, std::ptr::null(), &mut present), present)
        };
        if result != 0 || present.sa_sigaction != libc::SIG_DFL {
            continue;
        }
        let handler: extern "C" fn(libc::c_int) = on_kick;
        // SAFETY: the handler does nothing, so it is async-signal-safe; without SA_RESTART the signal interrupts
        // KVM_RUN, which is its purpose. The mask is an initialized empty set.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as libc::sighandler_t;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(signal, &action, std::ptr::null_mut())
        };
        return match result {
            0 => Ok(signal),
            _ => Err(io::Error::last_os_error()),
        };
    }
    // Every real-time signal has a handler already.
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}
