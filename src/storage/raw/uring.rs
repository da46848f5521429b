//! The io_uring engine: one small ring per disk, completions told through an eventfd.
//!
//! Every job in flight sits in a slot until the kernel is done with it; there are as many slots as ring entries, so
//! neither queue of the ring can overflow. Dropping the engine while the kernel still works hands the ring to a
//! thread that waits for the rest: the memory must not go away under the kernel, and the dropper must not wait.
//!
//! Linux ties requests that block to the thread that entered them: while the host is stuck, that thread can run and
//! return, but the kernel keeps it from ending. Whoever stops the thread that drives a disk must not join it.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;

use io_uring::{IoUring, opcode, squeue, types};
use vmm_sys_util::eventfd::EventFd;

use super::job::{Job, Step};
use super::{REQUESTS_MAX, notify};
use crate::storage::backend::DiskCompletion;

/// The stack of the thread that waits for a dropped engine's last jobs.
const STACK_BYTES: usize = 64 << 10;

/// One disk's ring.
pub(super) struct UringEngine {
    /// Taken only by `drop`.
    ring: ManuallyDrop<Ring>,
    completion: Arc<EventFd>,
}

struct Ring {
    // Dropped first: after that the kernel accepts nothing more for the slots.
    uring: IoUring,
    slots: Vec<Option<Active>>,
    free: Vec<usize>,
}

/// A job that the kernel works on. The step holds the iovecs that the kernel reads.
struct Active {
    job: Job,
    step: Step,
}

impl UringEngine {
    /// Sets a ring up and sees that the host really runs it.
    ///
    /// # Errors
    /// The host's error: `ENOSYS`, `EPERM` or `ENOMEM` where io_uring is missing, forbidden or limited.
    pub(super) fn new(completion: &Arc<EventFd>) -> io::Result<Self> {
        let mut uring = IoUring::new(REQUESTS_MAX as u32)?;
        // A sandbox may allow the set-up and forbid the use.
        let probe = opcode::Nop::new().build();
        // SAFETY: a no-op refers to no memory.
        unsafe { uring.submission().push(&probe) }.map_err(io::Error::other)?;
        uring.submit_and_wait(1)?;
        uring.completion().for_each(drop);
        uring.submitter().register_eventfd(completion.as_raw_fd())?;
        Ok(Self {
            ring: ManuallyDrop::new(Ring {
                uring,
                slots: Vec::new(),
                free: Vec::new(),
            }),
            completion: completion.clone(),
        })
    }

    /// Takes a job, or gives it back when there is no room.
    pub(super) fn submit(&mut self, job: Job) -> Result<(), Job> {
        if self.in_flight_count() >= REQUESTS_MAX {
            return Err(job);
        }
        let step = job.step();
        self.ring.place(Active { job, step });
        Ok(())
    }

    /// Hands what was submitted to the kernel.
    pub(super) fn start(&mut self) {
        if let Err(error) = self.ring.enter() {
            // The host is short of something for a moment; the entries stay in the ring and the next drain retries.
            log::debug!("disk: io_uring_enter: {error}");
            notify(&self.completion);
        }
    }

    /// Appends what has completed, and goes on with what was cut short.
    pub(super) fn drain(&mut self, completions: &mut Vec<DiskCompletion>) {
        while let Some((index, answer)) = self.ring.answer() {
            let Some(mut active) = self.ring.take(index) else {
                continue;
            };
            match active.job.advance(answer) {
                Some(result) => completions.push(DiskCompletion {
                    request: active.job.into_request(),
                    result,
                }),
                None => {
                    active.step = active.job.step();
                    self.ring.place(active);
                }
            }
        }
        self.start();
    }

    /// Jobs taken and not drained.
    pub(super) fn in_flight_count(&self) -> usize {
        self.ring.in_flight_count()
    }
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        // SAFETY: `self.ring` is not used again; this is the only place that takes it.
        let ring = unsafe { ManuallyDrop::take(&mut self.ring) };
        if ring.in_flight_count() == 0 {
            return;
        }
        // Where no thread can be had, the closure is dropped and the ring leaks, which is the lesser evil.
        let mut ring = ManuallyDrop::new(ring);
        let spawned = thread::Builder::new()
            .name("disk-io".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || match ring.outlast() {
                Ok(()) => drop(ManuallyDrop::into_inner(ring)),
                Err(error) => log::warn!("disk: memory of requests in flight is lost: {error}"),
            });
        if let Err(error) = spawned {
            log::warn!("disk: memory of requests in flight is lost: cannot start a thread: {error}");
        }
    }
}

impl Ring {
    fn in_flight_count(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Puts a job into a free slot and its step into the submission queue.
    fn place(&mut self, active: Active) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let entry = entry(&active).user_data(index as u64);
        self.slots[index] = Some(active);
        // SAFETY: the slot keeps the iovecs, the guest memory behind them and the descriptor alive and in place until
        // the completion of this entry was taken from the ring, also when the engine is dropped (`outlast`).
        let pushed = unsafe { self.uring.submission().push(&entry) };
        pushed.expect("there are as many entries as slots, and one entry per slot");
    }

    /// Takes the job out of slot `index`, which the kernel is done with.
    fn take(&mut self, index: u64) -> Option<Active> {
        let index = usize::try_from(index).ok()?;
        let active = self.slots.get_mut(index)?.take()?;
        self.free.push(index);
        Some(active)
    }

    /// The next completion: the slot and what the kernel answered.
    fn answer(&mut self) -> Option<(u64, io::Result<u64>)> {
        let completed = self.uring.completion().next()?;
        let result = completed.result();
        let answer = u64::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        Some((completed.user_data(), answer))
    }

    /// Hands all entries to the kernel.
    fn enter(&mut self) -> io::Result<()> {
        // A call may take fewer entries than there are, but at least one.
        for _ in 0..REQUESTS_MAX {
            if self.uring.submission().is_empty() {
                break;
            }
            self.uring.submit()?;
        }
        Ok(())
    }

    /// Waits until the kernel has let go of every job.
    fn outlast(&mut self) -> io::Result<()> {
        while self.in_flight_count() > 0 {
            match self.uring.submit_and_wait(1) {
                Err(error) if error.raw_os_error() != Some(libc::EINTR) => return Err(error),
                _ => {}
            }
            while let Some((index, _)) = self.answer() {
                drop(self.take(index));
            }
        }
        Ok(())
    }
}

fn entry(active: &Active) -> squeue::Entry {
    let fd = types::Fd(active.job.fd());
    match active.step {
        Step::Read {
            offset_bytes,
            ref iovecs,
        } => opcode::Readv::new(fd, iovecs.as_ptr(), iovecs.count())
            .offset(offset_bytes)
            .build(),
        Step::Write {
            offset_bytes,
            ref iovecs,
        } => opcode::Writev::new(fd, iovecs.as_ptr(), iovecs.count())
            .offset(offset_bytes)
            .build(),
        Step::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        Step::Allocate {
            mode,
            offset_bytes,
            length_bytes,
        } => opcode::Fallocate::new(fd, length_bytes)
            .offset(offset_bytes)
            .mode(mode)
            .build(),
        Step::DiscardBlocks { .. } => unreachable!("jobs that need a thread never come here"),
    }
}
