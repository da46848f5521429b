//! Opening raw images: what is wrong with one, who may have it, and which engine serves it.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::tests::{image, open};
use super::{OpenError, RawEngine, lock};
use crate::storage::DiskBackend;

#[test]
fn open_says_what_is_wrong_with_the_image() {
    let directory = tempfile::tempdir().expect("the host has a temporary directory");
    let path = |name: &str| directory.path().join(name);
    fs::write(path("empty"), []).expect("room");
    fs::write(path("odd"), [0; 1000]).expect("room");
    let refusal = |path: &Path| {
        let error = open(path, false, RawEngine::Auto)
            .err()
            .expect("the image is bad");
        error
            .to_string()
            .replace(&*directory.path().to_string_lossy(), "DIR")
    };
    assert_eq!(refusal(&path("none")), "disk image DIR/none does not exist");
    assert_eq!(refusal(directory.path()), "disk image DIR is a directory");
    assert_eq!(refusal(&path("empty")), "disk image DIR/empty is empty");
    assert_eq!(
        refusal(&path("odd")),
        "disk image DIR/odd has 1000 bytes, which is not a multiple of 512"
    );
    let null = "disk image /dev/null is neither a regular file nor a block device";
    assert_eq!(refusal(Path::new("/dev/null")), null);
}

#[test]
fn open_without_permission_is_told_from_other_errors() {
    let file = image(&[0; 512]);
    fs::set_permissions(file.path(), fs::Permissions::from_mode(0o400)).expect("the file is ours");
    let path = file.path().to_owned();
    // Root may write to anything; as user 65534 a thread may not even read what root keeps to itself.
    let attempt = move || {
        // SAFETY: takes no memory; changes this thread's file system user only, and the thread ends afterwards.
        unsafe { libc::setfsuid(65534) };
        open(&path, false, RawEngine::ThreadPool)
            .err()
            .map(|error| error.to_string())
    };
    let error = std::thread::spawn(attempt).join().expect("no panic");
    let expected = format!(
        "disk image {} may not be opened for writing by this process",
        file.path().display()
    );
    assert_eq!(error, Some(expected));
}

#[test]
fn a_second_opener_in_this_process_is_refused_by_name() {
    let file = image(&[0; 512]);
    let expected = format!(
        "disk image {} is in use by another vm or process",
        file.path().display()
    );
    let refusal = |read_only| {
        let second = open(file.path(), read_only, RawEngine::Auto);
        second.err().map(|error| error.to_string())
    };
    let writer = open(file.path(), false, RawEngine::Auto).expect("nobody has it");
    assert_eq!(refusal(false), Some(expected.clone()));
    assert_eq!(refusal(true), Some(expected.clone()));
    drop(writer);
    let reader = open(file.path(), true, RawEngine::Auto).expect("nobody has it");
    assert_eq!(refusal(true), None, "readers share");
    assert_eq!(refusal(false), Some(expected));
    drop(reader);
    assert_eq!(refusal(false), None);
}

/// A command whose process locks `path` like a writer before it runs; what it could not do is the error of `spawn`.
fn locking_command(program: &str, path: &Path) -> Command {
    let path = path.to_owned();
    let mut command = Command::new(program);
    let take = move || {
        let file = File::options().read(true).write(true).open(&path)?;
        lock::lock(&file, true)?;
        // The descriptor outlives `exec`, and the lock with it.
        // SAFETY: takes no memory; the descriptor is this process's own.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
        std::mem::forget(file);
        Ok(())
    };
    // SAFETY: between fork and exec the closure opens and locks a file and touches no lock of this process; the path
    // was allocated before.
    unsafe { command.pre_exec(take) };
    command
}

#[test]
fn other_processes_are_locked_out_both_ways() {
    let file = image(&[0; 512]);
    let disk = open(file.path(), false, RawEngine::Auto).expect("nobody has it");
    let error = locking_command("true", file.path())
        .spawn()
        .expect_err("the disk holds the lock");
    assert_eq!(error.raw_os_error(), Some(libc::EAGAIN));
    drop(disk);

    let mut other = locking_command("cat", file.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("nobody has it");
    let error = open(file.path(), true, RawEngine::Auto)
        .err()
        .expect("the other process holds it");
    assert!(matches!(error, OpenError::InUse { .. }), "{error}");
    drop(other.stdin.take());
    other.wait().expect("it ends with its input");
    open(file.path(), true, RawEngine::Auto).expect("nobody has it any more");
}

/// Forbids io_uring_setup to this thread with `errno`, as a sandbox or an old kernel does.
fn forbid_io_uring(errno: i32) {
    let instruction = |code, jf, k| libc::sock_filter { code, jt: 0, jf, k };
    let mut program = [
        // Load the number of the system call; skip one instruction unless it is io_uring_setup.
        instruction((libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, 0, 0),
        instruction(
            (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            1,
            libc::SYS_io_uring_setup as u32,
        ),
        instruction(
            (libc::BPF_RET | libc::BPF_K) as u16,
            0,
            libc::SECCOMP_RET_ERRNO | errno as u32,
        ),
        instruction((libc::BPF_RET | libc::BPF_K) as u16, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the program and its description are valid during the calls, which change this thread only.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const filter), 0);
    }
}

#[test]
fn threads_take_over_where_io_uring_is_refused() {
    for errno in [libc::ENOSYS, libc::EPERM, libc::ENOMEM] {
        let attempt = move || {
            forbid_io_uring(errno);
            let file = image(&[0; 512]);
            let forced = open(file.path(), false, RawEngine::IoUring)
                .err()
                .expect("io_uring is refused");
            let OpenError::Host { what, source, .. } = forced else {
                panic!("not an error of the host: {forced}");
            };
            assert_eq!((what, source.raw_os_error()), ("use io_uring for", Some(errno)));
            let disk = open(file.path(), false, RawEngine::Auto).expect("threads are allowed");
            assert_eq!(disk.inspect()["engine"], "threads");
        };
        std::thread::spawn(attempt)
            .join()
            .expect("the thread's assertions hold");
    }
    let file = image(&[0; 512]);
    let disk = open(file.path(), false, RawEngine::Auto).expect("a good image");
    assert_eq!(disk.inspect()["engine"], "io_uring", "the test host has io_uring");
}
