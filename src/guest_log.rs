//! Log lines that a guest can trigger, limited so that no guest can fill the host's log.
//!
//! A device owns one [`GuestLog`]; everything it says because of something the guest did goes through it. At most
//! [`BURST_COUNT`] lines pass per [`WINDOW`]; the rest are counted and the count is told with the next line.

use std::fmt;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How many lines pass in one window.
pub const BURST_COUNT: u32 = 8;
/// The length of the window.
pub const WINDOW: Duration = Duration::from_secs(10);

/// A rate-limited log for one device.
pub struct GuestLog {
    prefix: String,
    window: Mutex<Window>,
}

struct Window {
    since: Option<Instant>,
    passed_count: u32,
    suppressed_count: u64,
}

impl GuestLog {
    /// Makes a log whose lines begin with `prefix`.
    pub fn new(prefix: impl Into<String>) -> Self {
        let window = Window {
            since: None,
            passed_count: 0,
            suppressed_count: 0,
        };
        Self {
            prefix: prefix.into(),
            window: Mutex::new(window),
        }
    }

    /// Logs a warning unless too many came before it.
    pub fn warn(&self, line: fmt::Arguments<'_>) {
        if let Some(suppressed_count) = self.admit(Instant::now()) {
            match suppressed_count {
                0 => log::warn!("{}: {line}", self.prefix),
                n => log::warn!("{}: {line} ({n} earlier lines suppressed)", self.prefix),
            }
        }
    }

    /// Decides at `now`: `None` suppresses the line, `Some(n)` lets it pass and tells how many were suppressed.
    fn admit(&self, now: Instant) -> Option<u64> {
        let mut window = self
            .window
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let fresh = window
            .since
            .is_none_or(|since| now.saturating_duration_since(since) >= WINDOW);
        if fresh {
            window.since = Some(now);
            window.passed_count = 0;
        }
        if window.passed_count >= BURST_COUNT {
            window.suppressed_count += 1;
            return None;
        }
        window.passed_count += 1;
        Some(std::mem::take(&mut window.suppressed_count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_passes_once_per_window_and_is_counted() {
        let log = GuestLog::new("test");
        let start = Instant::now();
        let passed = (0..1000).filter(|_| log.admit(start).is_some()).count();
        assert_eq!(passed, BURST_COUNT as usize);
        assert_eq!(log.admit(start + WINDOW), Some(1000 - u64::from(BURST_COUNT)));
        assert_eq!(log.admit(start + WINDOW), Some(0));
    }
}
