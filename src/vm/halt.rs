//! A machine that is being brought to a stand: vCPUs first, units then, each of which may take its time or for ever.
//!
//! What a stand is for is decided by `ops/power.rs`; this counts who stands. Words of an earlier halt, which was given up,
//! are told from those of this one: a vCPU is counted once, and quiet units tell the number of their halt.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::event::ResetCause;

/// How long a machine has to come to a stand before it goes on instead. Longer than a slow disk needs for what is in
/// flight; a disk that hangs never is done.
pub(super) const HALT_WITHIN: Duration = Duration::from_secs(60);

/// A halt that goes on.
#[derive(Debug)]
pub(super) struct Halt {
    /// Its number, from 1.
    pub number: u64,
    /// Whether a reset is to be done while everything stands.
    pub reset: Option<ResetCause>,
    vcpus_running: BTreeSet<u32>,
    units_quiet: bool,
    deadline: Option<Instant>,
}

impl Halt {
    /// Of a machine with `vcpu_count` vCPUs that run, or of one that stands: 0.
    pub fn new(number: u64, vcpu_count: u32, reset: Option<ResetCause>) -> Self {
        Self {
            number,
            reset,
            vcpus_running: (0..vcpu_count).collect(),
            units_quiet: false,
            deadline: Instant::now().checked_add(HALT_WITHIN),
        }
    }

    /// When it is to be given up. A guest that has asked for its reset does not go on without, and where everything stands
    /// there is nothing to give up.
    pub fn deadline(&self) -> Option<Instant> {
        let waits = !self.units_quiet && self.reset != Some(ResetCause::Guest);
        self.deadline.filter(|_| waits)
    }

    /// Another vCPU stands; `true` for the last of them.
    pub fn vcpu_stands(&mut self, vcpu: u32) -> bool {
        self.vcpus_running.remove(&vcpu) && self.vcpus_running.is_empty()
    }

    /// All units of the halt with this number are quiet; `false` when it is another, or they were already.
    pub fn units_are_quiet(&mut self, number: u64) -> bool {
        number == self.number && !std::mem::replace(&mut self.units_quiet, true)
    }

    /// What does not stand, in words.
    pub fn missing(&self) -> String {
        match self.vcpus_running.len() {
            0 => "a device still waits for the host".to_owned(),
            count => format!("{count} vcpus still run"),
        }
    }

    /// Lets its time be over.
    #[cfg(test)]
    pub fn expire(&mut self) {
        self.deadline = Some(Instant::now());
    }
}
