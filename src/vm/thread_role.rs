//! What the threads of a VM are for, and which system calls each of them makes.
//!
//! A library installs no seccomp filter: it publishes what its threads need, and the embedder, whose own code runs on
//! them too (backends, sinks, its logger), adds what that needs and installs the filter in
//! `HostDevices::thread_started`.
//!
//! ```text
//! the caller of Vm::new ── supervisor ── worker ─┬─ vCPU ── serial
//!                                                └─ device loop ── disk-io (no role of its own)
//! ```
//! A thread has the filter of the thread that started it, below its own (seccomp(2)). So the list of a role holds what
//! the roles to its right in this picture need as well.

/// What a thread of a VM is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ThreadRole {
    /// Owns the VM and serves its requests. One for each VM, as long as a handle is there.
    Supervisor,
    /// Does for the supervisor what may wait: builds, resets and takes down the machine, stores the configuration,
    /// opens backends. Ends with its work.
    Worker,
    /// Runs a vCPU. One for each, as long as the guest is there.
    Vcpu,
    /// Serves the devices. One for each VM, as long as the guest is there.
    DeviceLoop,
    /// Writes what the guest says on its serial port to the embedder's sink. Begins with the first byte.
    Serial,
}

/// Memory, locks, events, time and the thread's own end: what every thread needs.
const EVERY: [i64; 24] = [
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];
/// To start another thread, which has this one's filter and takes one of its own.
const STARTS: [i64; 6] = [
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_prctl,
    libc::SYS_rseq,
    libc::SYS_seccomp,
    libc::SYS_set_robust_list,
];
/// To run a guest, and to turn a device on and off as its driver says.
const RUNS: [i64; 5] = [
    libc::SYS_epoll_ctl,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_io_uring_enter,
    libc::SYS_ioctl,
];
/// To serve devices: disks, taps, streams, and memory that goes back to the host.
const SERVES: [i64; 15] = [
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_io_uring_register,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
];
/// To build machines, to open what they need and to keep the configuration in its directory.
const BUILDS: [i64; 31] = [
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_epoll_create1,
    libc::SYS_flock,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_getsockname,
    libc::SYS_io_uring_setup,
    libc::SYS_lseek,
    libc::SYS_memfd_create,
    libc::SYS_mkdir,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_rename,
    libc::SYS_renameat2,
    libc::SYS_rt_sigaction,
    libc::SYS_set_tid_address,
    libc::SYS_setsockopt,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_statx,
    libc::SYS_sysinfo,
    libc::SYS_timerfd_create,
    libc::SYS_unlink,
];

impl ThreadRole {
    /// The numbers of the system calls (x86-64) that a thread of this role makes from
    /// [`thread_started`](crate::vm::host::HostDevices::thread_started) on, and those that it starts: with a libc like
    /// Debian's, for raw disks, taps and streams. What the embedder's own code calls on the thread comes on top, and
    /// what a panic's message does with a backtrace.
    pub fn syscalls(self) -> Vec<i64> {
        match self {
            Self::Supervisor | Self::Worker => [&EVERY[..], &STARTS, &RUNS, &SERVES, &BUILDS].concat(),
            Self::Vcpu => [&EVERY[..], &STARTS, &RUNS].concat(),
            Self::DeviceLoop => [&EVERY[..], &STARTS, &RUNS, &SERVES].concat(),
            Self::Serial => EVERY.to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_thread_may_do_what_those_that_it_starts_need() {
        let of = |role: ThreadRole| {
            let list = role.syscalls();
            let set: BTreeSet<_> = list.iter().copied().collect();
            assert_eq!(set.len(), list.len(), "{role:?} lists a call twice");
            set
        };
        let starts = [
            (ThreadRole::Supervisor, ThreadRole::Worker),
            (ThreadRole::Worker, ThreadRole::Vcpu),
            (ThreadRole::Worker, ThreadRole::DeviceLoop),
            (ThreadRole::Vcpu, ThreadRole::Serial),
        ];
        for (parent, child) in starts {
            assert!(of(parent).is_superset(&of(child)), "{parent:?} starts {child:?}");
        }
    }
}
