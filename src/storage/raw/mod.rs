//! A raw image file or block device.
//!
//! ```text
//! submit ─ refused ───────────────────────────┐
//!    ├──── io_uring (where the host allows) ──┼── completion eventfd ── drain
//!    └──── thread pool (everything else) ─────┘
//! ```
//!
//! Both engines carry out the same [`job::Job`], which knows how to continue short transfers and what to do instead
//! of an operation that the file system lacks. The image is locked against a second opener for as long as anything
//! may still write to it, also after the disk itself was dropped.

#[cfg(test)]
mod block_device_tests;
mod job;
mod lock;
mod open;
#[cfg(test)]
mod open_tests;
mod pool;
#[cfg(test)]
mod tests;
mod uring;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::backend::{DiskBackend, DiskCompletion, DiskFull, DiskProperties, DiskRequest};
use job::Job;
use open::Image;
pub use open::OpenError;
use pool::PoolEngine;
use uring::UringEngine;

/// Requests in flight per engine.
const REQUESTS_MAX: usize = 128;

/// Which raw image a disk is, and how it is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawConfig {
    /// The image file or block device.
    pub path: PathBuf,
    /// Opens the image for reading only; several readers may share it.
    pub read_only: bool,
    /// Who carries out the requests.
    pub engine: RawEngine,
}

/// Who carries out a raw disk's requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RawEngine {
    /// io_uring, or the thread pool where the host refuses it.
    #[default]
    Auto,
    /// io_uring or nothing.
    IoUring,
    /// Threads that exist only while there is work.
    ThreadPool,
}

/// An open raw image.
pub struct RawDisk {
    image: Arc<Image>,
    uring: Option<UringEngine>,
    pool: PoolEngine,
    refused: Vec<DiskCompletion>,
    completion: Arc<EventFd>,
}

impl RawDisk {
    /// Opens and locks the image.
    ///
    /// # Errors
    /// [`OpenError`]: what is wrong with the path, the image or the host; `InUse` when another VM or process has it.
    pub fn open(config: &RawConfig) -> Result<Self, OpenError> {
        let image = Arc::new(Image::open(&config.path, config.read_only)?);
        let host = |what| {
            let path = config.path.clone();
            move |source| OpenError::Host { what, path, source }
        };
        let completion =
            Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host("make an eventfd for"))?);
        let uring = match config.engine {
            RawEngine::ThreadPool => None,
            RawEngine::IoUring => Some(UringEngine::new(&completion).map_err(host("use io_uring for"))?),
            RawEngine::Auto => UringEngine::new(&completion)
                .inspect_err(|error| {
                    log::info!(
                        "disk {}: threads instead of io_uring: {error}",
                        config.path.display()
                    )
                })
                .ok(),
        };
        Ok(Self {
            image,
            uring,
            pool: PoolEngine::new(completion.clone()),
            refused: Vec::new(),
            completion,
        })
    }
}

impl DiskBackend for RawDisk {
    fn properties(&self) -> DiskProperties {
        self.image.properties
    }

    fn submit(&mut self, request: DiskRequest) -> Result<(), DiskFull> {
        if let Err(error) = request.operation.check(&self.image.properties) {
            if self.refused.len() == REQUESTS_MAX {
                return Err(DiskFull(request));
            }
            self.refused.push(DiskCompletion {
                request,
                result: Err(error),
            });
            return Ok(());
        }
        let job = Job::new(self.image.clone(), request);
        let taken = match &mut self.uring {
            Some(uring) if !job.needs_thread() => uring.submit(job),
            _ => self.pool.submit(job),
        };
        taken.map_err(|job| DiskFull(job.into_request()))
    }

    fn start(&mut self) {
        if !self.refused.is_empty() {
            notify(&self.completion);
        }
        if let Some(uring) = &mut self.uring {
            uring.start();
        }
        self.pool.start();
    }

    fn completion_fd(&self) -> RawFd {
        self.completion.as_raw_fd()
    }

    fn drain(&mut self, completions: &mut Vec<DiskCompletion>) {
        // Emptied before the engines are asked, so that what completes from here on makes it readable again. An
        // empty counter is a spurious call.
        let _ = self.completion.read();
        completions.append(&mut self.refused);
        if let Some(uring) = &mut self.uring {
            uring.drain(completions);
        }
        self.pool.drain(completions);
    }

    fn in_flight_count(&self) -> usize {
        let uring_count = self.uring.as_ref().map_or(0, UringEngine::in_flight_count);
        uring_count + self.pool.in_flight_count() + self.refused.len()
    }

    fn inspect(&self) -> Value {
        json!({
            "kind": "raw",
            "path": self.image.path.to_string_lossy(),
            "engine": if self.uring.is_some() { "io_uring" } else { "threads" },
            "in_flight": self.in_flight_count(),
            "flush_failed": self.image.flush_failed.load(Ordering::SeqCst),
        })
    }
}

/// Makes the completion descriptor readable.
fn notify(completion: &EventFd) {
    // A full counter means that it is readable already.
    if let Err(error) = completion.write(1)
        && error.kind() != io::ErrorKind::WouldBlock
    {
        log::error!("disk: cannot signal a completion: {error}");
    }
}
