//! The engine without io_uring: threads that begin with the first request and end when there is nothing to do.
//!
//! A thread that is stuck in the host holds only its own job. Dropping the engine leaves it alone: the job keeps its
//! buffers and the image's lock until the host answers, and then everything goes away.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::job::{Job, Step};
use super::{REQUESTS_MAX, notify};
use crate::guest_log::GuestLog;
use crate::storage::backend::DiskCompletion;

/// Threads of one disk.
const THREADS_MAX: usize = 4;
/// How long a thread waits for more work before it ends.
const IDLE_MAX: Duration = Duration::from_secs(2);
/// The stack of a thread; it only makes system calls.
const STACK_BYTES: usize = 64 << 10;

/// A pool of threads for one disk.
pub(super) struct PoolEngine {
    shared: Arc<Shared>,
    /// The guest decides how often a thread is wanted.
    log: GuestLog,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    completion: Arc<EventFd>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Job>,
    running_count: usize,
    done: Vec<DiskCompletion>,
    thread_count: usize,
    idle_count: usize,
    closed: bool,
}

impl PoolEngine {
    /// Makes an engine without threads that tells of completions through `completion`.
    pub(super) fn new(completion: Arc<EventFd>) -> Self {
        Self {
            shared: Arc::new(Shared {
                state: Mutex::default(),
                work: Condvar::new(),
                completion,
            }),
            log: GuestLog::new("disk"),
        }
    }

    /// Takes a job, or gives it back when there is no room.
    pub(super) fn submit(&mut self, job: Job) -> Result<(), Job> {
        let mut state = self.shared.lock();
        if state.in_flight_count() >= REQUESTS_MAX {
            return Err(job);
        }
        state.waiting.push_back(job);
        Ok(())
    }

    /// Sees to it that threads take the waiting jobs.
    pub(super) fn start(&mut self) {
        let mut state = self.shared.lock();
        for _ in 0..state.waiting.len().min(state.idle_count) {
            self.shared.work.notify_one();
        }
        while state.thread_count < THREADS_MAX
            && state.waiting.len() > state.idle_count + state.starting_count()
        {
            let shared = self.shared.clone();
            let spawned = thread::Builder::new()
                .name("disk-io".to_owned())
                .stack_size(STACK_BYTES)
                .spawn(move || shared.work());
            match spawned {
                Ok(_) => state.thread_count += 1,
                Err(error) => {
                    self.log.warn(format_args!("cannot start a thread: {error}"));
                    state.spawn_failed(&error);
                    break;
                }
            }
        }
        if !state.done.is_empty() {
            notify(&self.shared.completion);
        }
    }

    /// Appends what has completed.
    pub(super) fn drain(&mut self, completions: &mut Vec<DiskCompletion>) {
        completions.append(&mut self.shared.lock().done);
    }

    /// Jobs taken and not drained.
    pub(super) fn in_flight_count(&self) -> usize {
        self.shared.lock().in_flight_count()
    }

    /// Threads that exist now.
    #[cfg(test)]
    pub(super) fn thread_count(&self) -> usize {
        self.shared.lock().thread_count
    }
}

impl Drop for PoolEngine {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        state.waiting.clear();
        state.done.clear();
        self.shared.work.notify_all();
    }
}

impl State {
    fn in_flight_count(&self) -> usize {
        self.waiting.len() + self.running_count + self.done.len()
    }

    /// Threads that neither wait nor run yet.
    fn starting_count(&self) -> usize {
        self.thread_count
            .saturating_sub(self.idle_count + self.running_count)
    }

    /// Without any thread nobody would ever answer: the jobs end with the host's error.
    fn spawn_failed(&mut self, error: &io::Error) {
        if self.thread_count > 0 {
            return;
        }
        let errno = error.raw_os_error().unwrap_or(libc::EAGAIN);
        while let Some(job) = self.waiting.pop_front() {
            self.done.push(DiskCompletion {
                request: job.into_request(),
                result: Err(io::Error::from_raw_os_error(errno)),
            });
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The life of a thread.
    fn work(&self) {
        while let Some(job) = self.next() {
            let completion = run(job);
            let mut state = self.lock();
            state.running_count -= 1;
            if !state.closed {
                state.done.push(completion);
                notify(&self.completion);
            }
        }
    }

    /// The next job; `None` ends the thread.
    fn next(&self) -> Option<Job> {
        let mut state = self.lock();
        let mut waited = false;
        loop {
            if let Some(job) = state.waiting.pop_front() {
                state.running_count += 1;
                return Some(job);
            }
            if state.closed || waited {
                state.thread_count -= 1;
                return None;
            }
            state.idle_count += 1;
            let (woken, timeout) = self
                .work
                .wait_timeout(state, IDLE_MAX)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle_count -= 1;
            waited = timeout.timed_out();
        }
    }
}

/// Carries out a job on this thread.
fn run(mut job: Job) -> DiskCompletion {
    loop {
        let answer = ask(&job, &job.step());
        if let Some(result) = job.advance(answer) {
            let request = job.into_request();
            return DiskCompletion { request, result };
        }
    }
}

/// Makes the system call for one step. Checked requests end within the image, so all offsets fit an `off_t`.
fn ask(job: &Job, step: &Step) -> io::Result<u64> {
    let fd = job.fd();
    let result = match *step {
        Step::Read {
            offset_bytes,
            ref iovecs,
        } => {
            // SAFETY: the iovecs refer to guest memory that the job keeps mapped during the call.
            unsafe { libc::preadv(fd, iovecs.as_ptr(), iovecs.count() as i32, offset_bytes as i64) }
        }
        Step::Write {
            offset_bytes,
            ref iovecs,
        } => {
            // SAFETY: the iovecs refer to guest memory that the job keeps mapped, or to a static.
            unsafe { libc::pwritev(fd, iovecs.as_ptr(), iovecs.count() as i32, offset_bytes as i64) }
        }
        Step::Sync => {
            // SAFETY: takes no memory.
            unsafe { libc::fdatasync(fd) as isize }
        }
        Step::Allocate {
            mode,
            offset_bytes,
            length_bytes,
        } => {
            // SAFETY: takes no memory.
            unsafe { libc::fallocate(fd, mode, offset_bytes as i64, length_bytes as i64) as isize }
        }
        Step::DiscardBlocks {
            offset_bytes,
            length_bytes,
        } => {
            let range = [offset_bytes, length_bytes];
            // SAFETY: BLKDISCARD reads two u64 from the pointer, which is valid for both.
            unsafe { libc::ioctl(fd, BLKDISCARD, range.as_ptr()) as isize }
        }
    };
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// `_IO(0x12, 119)` of Linux's `fs.h`.
const BLKDISCARD: libc::Ioctl = 0x1277;
