//! Counts the lines that the library logs, so that a trial can tell how many a guest brought about.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use log::{LevelFilter, Log, Metadata, Record};

/// By what stands before the colon: the device that speaks.
static COUNTS: Mutex<BTreeMap<String, u64>> = Mutex::new(BTreeMap::new());

struct Counter;

/// Begins to count. Called once.
pub fn install() {
    if log::set_logger(&Counter).is_ok() {
        log::set_max_level(LevelFilter::Debug);
    }
}

/// How many lines `speaker` has logged so far, in all VMs of this process.
pub fn count(speaker: &str) -> u64 {
    let counts = COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
    counts.get(speaker).copied().unwrap_or(0)
}

impl Log for Counter {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let line = record.args().to_string();
        let speaker = line.split(':').next().unwrap_or_default().to_owned();
        let mut counts = COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(speaker).or_default() += 1;
    }

    fn flush(&self) {}
}
