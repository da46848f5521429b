//! The way from the serial port to the embedder's sink: a bounded queue and the one thread that writes the sink.
//!
//! A sink may block for as long as it likes (a pipe that nobody reads, a terminal that is stopped): only its own thread
//! waits for it. vCPUs, pause, inspect and the end of the VM never do. Output beyond [`OUTPUT_WAITING_BYTES_MAX`] is
//! lost and counted. The thread begins with the first output and sleeps while there is none.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How much output may wait for the sink.
pub const OUTPUT_WAITING_BYTES_MAX: usize = 1 << 20;
/// How long the end of the port waits for a sink that still has output to take.
const LAST_WORDS_WITHIN: Duration = Duration::from_secs(3);

/// The port's end. Dropping it gives the sink three seconds to take what waits; a sink that blocks keeps its thread.
pub(super) struct Output {
    shared: Arc<Shared>,
    /// What the thread needs; taken when it begins.
    writer: Option<Writer>,
}

struct Writer {
    sink: Box<dyn Write + Send>,
    begin: Box<dyn FnOnce() + Send>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    waiting: Vec<u8>,
    /// The sink has bytes in hand.
    writing: bool,
    closed: bool,
    counts: Counts,
}

/// What became of the output.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub written_bytes: u64,
    pub lost_bytes: u64,
}

impl Output {
    /// Output for `sink`. `begin` is called on its thread when that begins.
    pub fn new(sink: Box<dyn Write + Send>, begin: Box<dyn FnOnce() + Send>) -> Self {
        Self {
            shared: Arc::default(),
            writer: Some(Writer { sink, begin }),
        }
    }

    /// Takes all of `bytes`; never blocks. `false` when some are lost.
    pub fn push(&mut self, bytes: &mut Vec<u8>) -> bool {
        if bytes.is_empty() {
            return true;
        }
        if let Some(writer) = self.writer.take() {
            self.begin(writer);
        }
        let mut queue = self.shared.lock();
        let room = OUTPUT_WAITING_BYTES_MAX.saturating_sub(queue.waiting.len());
        let taken = if queue.closed { 0 } else { bytes.len().min(room) };
        queue.waiting.extend(bytes.drain(..taken));
        queue.counts.lost_bytes += bytes.len() as u64;
        let all = bytes.is_empty();
        bytes.clear();
        drop(queue);
        self.shared.changed.notify_all();
        all
    }

    fn begin(&self, writer: Writer) {
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name("vm-serial".to_owned());
        let body = move || {
            (writer.begin)();
            shared.write(writer.sink);
        };
        if let Err(error) = thread.spawn(body) {
            log::error!("serial: the host refuses a thread, all output is lost: {error}");
            self.shared.lock().closed = true;
        }
    }

    pub fn counts(&self) -> Counts {
        self.shared.lock().counts
    }

    /// Waits until the sink has everything.
    #[cfg(test)]
    pub fn wait_until_written(&self) {
        let is_busy = |queue: &mut Queue| queue.is_busy();
        let waited = self.shared.changed.wait_while(self.shared.lock(), is_busy);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let mut queue = self.shared.lock();
        queue.closed = true;
        self.shared.changed.notify_all();
        let waited = self
            .shared
            .changed
            .wait_timeout_while(queue, LAST_WORDS_WITHIN, |queue| queue.is_busy());
        drop(waited);
    }
}

impl Queue {
    fn is_busy(&self) -> bool {
        self.writing || !self.waiting.is_empty()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what waits until the port is gone and nothing waits any more.
    fn write(&self, mut sink: Box<dyn Write + Send>) {
        let mut bytes = Vec::new();
        while self.take(&mut bytes) {
            // A sink that fails or panics loses output; the guest knows nothing of it.
            let write = || sink.write_all(&bytes).and_then(|()| sink.flush());
            let is_written = matches!(catch_unwind(AssertUnwindSafe(write)), Ok(Ok(())));
            let mut queue = self.lock();
            queue.writing = false;
            let counts = &mut queue.counts;
            let count = if is_written {
                &mut counts.written_bytes
            } else {
                &mut counts.lost_bytes
            };
            *count += bytes.len() as u64;
            drop(queue);
            self.changed.notify_all();
        }
    }

    /// Takes what waits into `bytes`, waiting for it; `false` when nothing can come any more.
    fn take(&self, bytes: &mut Vec<u8>) -> bool {
        bytes.clear();
        let nothing = |queue: &mut Queue| queue.waiting.is_empty() && !queue.closed;
        let waited = self.changed.wait_while(self.lock(), nothing);
        let mut queue = waited.unwrap_or_else(PoisonError::into_inner);
        std::mem::swap(bytes, &mut queue.waiting);
        queue.writing = !bytes.is_empty();
        queue.writing
    }
}
