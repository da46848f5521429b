//! One request on its way through the host: what to ask next, and what an answer means.
//!
//! Both engines loop over [`Job::step`] and [`Job::advance`]; the engine only knows how to hand a step to the kernel.
//! Short transfers go on where they stopped, and writing zeros falls back from freeing space over zeroing a range to
//! writing them in bounded pieces. After a flush that failed, all flushes of the image fail.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::open::Image;
use crate::storage::backend::{DiskOperation, DiskRequest};
use crate::storage::buffers::GuestBuffers;

/// How often in a row the host may answer "try again".
const RETRIES_MAX: u8 = 16;
/// The memory that zeros are written from.
static ZEROS: [u8; 4096] = [0; 4096];
/// How often [`ZEROS`] is named in one write: 1 MiB.
const ZEROS_REPEAT_MAX: usize = 256;

/// A request and how far it has come.
pub(super) struct Job {
    image: Arc<Image>,
    request: DiskRequest,
    done_bytes: u64,
    zeroing: Zeroing,
    retry_count: u8,
}

/// Ways to make a range zero, best first.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Zeroing {
    /// Free the space: fallocate(2) FALLOC_FL_PUNCH_HOLE.
    Punch,
    /// Keep the space: fallocate(2) FALLOC_FL_ZERO_RANGE.
    Range,
    /// Write zeros.
    Write,
}

/// What the kernel is to be asked.
pub(super) enum Step {
    Read {
        offset_bytes: u64,
        iovecs: IoVecs,
    },
    Write {
        offset_bytes: u64,
        iovecs: IoVecs,
    },
    /// fdatasync(2).
    Sync,
    /// fallocate(2).
    Allocate {
        mode: i32,
        offset_bytes: u64,
        length_bytes: u64,
    },
    /// ioctl BLKDISCARD, which only threads can do.
    DiscardBlocks {
        offset_bytes: u64,
        length_bytes: u64,
    },
}

/// Buffers for the kernel. The job that made them keeps the memory behind them alive.
pub(super) struct IoVecs(Vec<libc::iovec>);

// SAFETY: the pointers lead to guest memory or to a static, both of which any thread may use; nothing in this process
// dereferences them.
unsafe impl Send for IoVecs {}

impl Job {
    /// Wraps a request that was checked against the image's properties.
    pub(super) fn new(image: Arc<Image>, request: DiskRequest) -> Self {
        let zeroing = match &request.operation {
            DiskOperation::WriteZeroes { unmap: true, .. } => Zeroing::Punch,
            _ => Zeroing::Range,
        };
        Self {
            image,
            request,
            done_bytes: 0,
            zeroing,
            retry_count: 0,
        }
    }

    /// The image's descriptor, open while the job lives.
    pub(super) fn fd(&self) -> RawFd {
        self.image.file.as_raw_fd()
    }

    /// Whether io_uring has no operation for this.
    pub(super) fn needs_thread(&self) -> bool {
        self.image.block_device && matches!(self.request.operation, DiskOperation::Discard { .. })
    }

    /// The request, and with it the last use of the image by this job.
    pub(super) fn into_request(self) -> DiskRequest {
        self.request
    }

    /// What to ask the kernel next.
    pub(super) fn step(&self) -> Step {
        let done_bytes = self.done_bytes;
        match self.request.operation {
            DiskOperation::Read {
                offset_bytes,
                ref buffers,
            } => Step::Read {
                offset_bytes: offset_bytes + done_bytes,
                iovecs: IoVecs::guest(buffers, done_bytes),
            },
            DiskOperation::Write {
                offset_bytes,
                ref buffers,
            } => Step::Write {
                offset_bytes: offset_bytes + done_bytes,
                iovecs: IoVecs::guest(buffers, done_bytes),
            },
            DiskOperation::Flush => Step::Sync,
            DiskOperation::Discard {
                offset_bytes,
                length_bytes,
            } => {
                if self.image.block_device {
                    return Step::DiscardBlocks {
                        offset_bytes,
                        length_bytes,
                    };
                }
                allocate(libc::FALLOC_FL_PUNCH_HOLE, offset_bytes, length_bytes)
            }
            DiskOperation::WriteZeroes {
                offset_bytes,
                length_bytes,
                unmap: _,
            } => match self.zeroing {
                Zeroing::Punch => allocate(libc::FALLOC_FL_PUNCH_HOLE, offset_bytes, length_bytes),
                Zeroing::Range => allocate(libc::FALLOC_FL_ZERO_RANGE, offset_bytes, length_bytes),
                Zeroing::Write => Step::Write {
                    offset_bytes: offset_bytes + done_bytes,
                    iovecs: IoVecs::zeros(length_bytes - done_bytes),
                },
            },
        }
    }

    /// Takes the kernel's answer to the last step, for transfers the number of bytes. `None` asks for another step.
    pub(super) fn advance(&mut self, answer: io::Result<u64>) -> Option<io::Result<()>> {
        let outcome = self.judge(answer)?;
        if !matches!(self.request.operation, DiskOperation::Flush) {
            return Some(outcome);
        }
        let failed_before = self
            .image
            .flush_failed
            .fetch_or(outcome.is_err(), Ordering::SeqCst);
        Some(match outcome {
            Ok(()) if failed_before => Err(io::Error::from_raw_os_error(libc::EIO)),
            outcome => outcome,
        })
    }

    fn judge(&mut self, answer: io::Result<u64>) -> Option<io::Result<()>> {
        let error = match answer {
            Ok(count) => return self.progress(count),
            Err(error) => error,
        };
        let errno = error.raw_os_error();
        if matches!(errno, Some(libc::EINTR | libc::EAGAIN)) && self.retry_count < RETRIES_MAX {
            self.retry_count += 1;
            return None;
        }
        let unsupported = matches!(
            errno,
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENOTTY)
        );
        match self.request.operation {
            // A hint that the host cannot take, or not for a range that is not made of its blocks.
            DiskOperation::Discard { .. } if unsupported => Some(Ok(())),
            DiskOperation::WriteZeroes { .. } if unsupported && self.zeroing != Zeroing::Write => {
                self.zeroing = match self.zeroing {
                    Zeroing::Punch => Zeroing::Range,
                    Zeroing::Range | Zeroing::Write => Zeroing::Write,
                };
                None
            }
            _ => Some(Err(error)),
        }
    }

    fn progress(&mut self, count: u64) -> Option<io::Result<()>> {
        self.retry_count = 0;
        let total_bytes = match &self.request.operation {
            DiskOperation::Read { buffers, .. } | DiskOperation::Write { buffers, .. } => {
                buffers.length_bytes()
            }
            DiskOperation::WriteZeroes { length_bytes, .. } if self.zeroing == Zeroing::Write => {
                *length_bytes
            }
            DiskOperation::Flush | DiskOperation::Discard { .. } | DiskOperation::WriteZeroes { .. } => {
                return Some(Ok(()));
            }
        };
        if count == 0 {
            // The image ends before the size it had when it was opened.
            return Some(Err(io::Error::from_raw_os_error(libc::EIO)));
        }
        self.done_bytes = self.done_bytes.saturating_add(count);
        (self.done_bytes >= total_bytes).then_some(Ok(()))
    }
}

fn allocate(mode: i32, offset_bytes: u64, length_bytes: u64) -> Step {
    Step::Allocate {
        mode: mode | libc::FALLOC_FL_KEEP_SIZE,
        offset_bytes,
        length_bytes,
    }
}

impl IoVecs {
    /// The buffers without their first `skip_bytes`.
    fn guest(buffers: &GuestBuffers, skip_bytes: u64) -> Self {
        let mut skip_bytes = skip_bytes;
        let mut iovecs = Vec::new();
        for slice in buffers.slices() {
            let skipped = skip_bytes.min(slice.len() as u64);
            skip_bytes -= skipped;
            let Ok(rest) = slice.offset(skipped as usize) else {
                continue;
            };
            if !rest.is_empty() {
                iovecs.push(libc::iovec {
                    iov_base: rest.ptr_guard_mut().as_ptr().cast(),
                    iov_len: rest.len(),
                });
            }
        }
        Self(iovecs)
    }

    /// At most 1 MiB of the `length_bytes` zeros still to be written.
    fn zeros(length_bytes: u64) -> Self {
        let mut rest = length_bytes.min((ZEROS.len() * ZEROS_REPEAT_MAX) as u64) as usize;
        let mut iovecs = Vec::with_capacity(rest.div_ceil(ZEROS.len()));
        while rest > 0 {
            let length = rest.min(ZEROS.len());
            iovecs.push(libc::iovec {
                // Only ever written from: the kernel takes no `*const` here.
                iov_base: ZEROS.as_ptr().cast_mut().cast(),
                iov_len: length,
            });
            rest -= length;
        }
        Self(iovecs)
    }

    /// The first iovec.
    pub(super) fn as_ptr(&self) -> *const libc::iovec {
        self.0.as_ptr()
    }

    /// The number of iovecs, at most 1024.
    pub(super) fn count(&self) -> u32 {
        self.0.len() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::image;
    use super::*;

    #[test]
    fn after_a_failed_flush_no_flush_succeeds_until_the_image_is_opened_again() {
        let file = image(&[0; 512]);
        let open = || Arc::new(Image::open(file.path(), false).expect("a good image"));
        let flush = |image: &Arc<Image>, answer| {
            let operation = DiskOperation::Flush;
            let outcome = Job::new(image.clone(), DiskRequest { id: 0, operation }).advance(answer);
            let outcome = outcome.expect("a flush is one step");
            outcome.map_err(|error| error.raw_os_error())
        };
        let disk = open();
        assert_eq!(flush(&disk, Ok(0)), Ok(()));
        let no_space = io::Error::from_raw_os_error(libc::ENOSPC);
        assert_eq!(flush(&disk, Err(no_space)), Err(Some(libc::ENOSPC)));
        for _ in 0..2 {
            assert_eq!(flush(&disk, Ok(0)), Err(Some(libc::EIO)));
        }
        drop(disk);
        assert_eq!(flush(&open(), Ok(0)), Ok(()));
    }
}
