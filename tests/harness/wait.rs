//! Waiting with a deadline, and saying what was waited for when it passes.

use std::fmt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// A deadline passed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TimedOut {
    what: String,
    within: Duration,
}

impl fmt::Display for TimedOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "waited {:.1} s in vain for {}",
            self.within.as_secs_f64(),
            self.what
        )
    }
}

impl std::error::Error for TimedOut {}

/// Asks `probe` until it answers, at growing intervals of 1 to 50 ms. For what sends no notice (files, counters,
/// processes); for what does, see [`Signal`].
pub fn wait_for<T>(
    within: Duration,
    what: &str,
    mut probe: impl FnMut() -> Option<T>,
) -> Result<T, TimedOut> {
    let until = Instant::now() + within;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(answer) = probe() {
            return Ok(answer);
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(TimedOut {
                what: what.to_string(),
                within,
            });
        }
        thread::sleep(pause.min(left));
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// A value that other threads change and a test waits on.
#[derive(Debug, Default)]
pub struct Signal<T> {
    value: Mutex<T>,
    changed: Condvar,
}

impl<T> Signal<T> {
    /// A signal that holds `value`.
    pub fn new(value: T) -> Self {
        Signal {
            value: Mutex::new(value),
            changed: Condvar::new(),
        }
    }

    /// Changes the value and wakes those who wait.
    pub fn update(&self, change: impl FnOnce(&mut T)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Waits until `probe` answers for the value.
    pub fn wait_for<A>(
        &self,
        within: Duration,
        what: &str,
        mut probe: impl FnMut(&mut T) -> Option<A>,
    ) -> Result<A, TimedOut> {
        let until = Instant::now() + within;
        let mut value = self.lock();
        loop {
            if let Some(answer) = probe(&mut value) {
                return Ok(answer);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(TimedOut {
                    what: what.to_string(),
                    within,
                });
            }
            let woken = self.changed.wait_timeout(value, left);
            value = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A thread that panicked while it changed the value has failed its test already.
    fn lock(&self) -> MutexGuard<'_, T> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
