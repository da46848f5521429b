//! What a target means for the devices, when it is reached, and why it was not. Pure.
//!
//! ```text
//! target above start-up     plug target − start-up      balloon empty
//! target below start-up     unplug everything           balloon start-up − target
//! ```
//! On the way down the balloon waits until everything is unplugged: a guest that does both at once fills its balloon
//! with pages of the blocks that it is to give up, and gets stuck (seen with Linux 6.1).

use std::time::Duration;

use super::machine::Observed;
use super::{MemoryReason, ResizeError};
use crate::config::{ByteSize, ConfigVersion, Feature, MemoryConfig};

/// Blocks above the start-up size are plugged and unplugged whole.
pub(super) const BLOCK_BYTES: u64 = 2 << 20;
/// A balloon holds pages of this size (virtio 1.2 §5.5.6).
const PAGE_BYTES: u64 = 4096;
/// A guest's total may be that much smaller than what follows from its former one, in bytes.
const UNCOUNTED_BYTES: u64 = 8 << 20;

/// What the guest is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// What it has when it has obeyed, in bytes.
    pub requested_bytes: u64,
    /// The blocks that it has plugged then, in bytes.
    pub plugged_bytes: u64,
    /// What its balloon holds then, in bytes.
    pub ballooned_bytes: u64,
}

impl Plan {
    /// What `target_bytes` means for a VM with `memory`.
    ///
    /// # Errors
    /// [`ResizeError`] when the VM's own limits forbid it.
    pub fn new(
        target_bytes: u64,
        memory: &MemoryConfig,
        version: ConfigVersion,
    ) -> Result<Self, ResizeError> {
        let (target, startup_bytes) = (ByteSize(target_bytes), memory.startup_bytes);
        if target_bytes < memory.minimum_bytes {
            let floor = ByteSize(memory.minimum_bytes);
            return Err(ResizeError::BelowFloor { target, floor });
        }
        if target_bytes > startup_bytes {
            version.require(Feature::RuntimeMemoryAboveStartup)?;
        }
        if target_bytes > memory.maximum_bytes {
            let maximum = ByteSize(memory.maximum_bytes);
            return Err(ResizeError::AboveMaximum { target, maximum });
        }
        let above_bytes = target_bytes.saturating_sub(startup_bytes);
        let below_bytes = startup_bytes.saturating_sub(target_bytes);
        Ok(Self::of(
            startup_bytes,
            above_bytes - above_bytes % BLOCK_BYTES,
            below_bytes.next_multiple_of(PAGE_BYTES),
        ))
    }

    /// What leaves the guest as it is.
    pub fn as_is(startup_bytes: u64, now: &Observed) -> Self {
        Self::of(
            startup_bytes,
            now.plugged_bytes,
            now.ballooned_bytes.min(startup_bytes),
        )
    }

    fn of(startup_bytes: u64, plugged_bytes: u64, ballooned_bytes: u64) -> Self {
        Self {
            requested_bytes: startup_bytes + plugged_bytes - ballooned_bytes,
            plugged_bytes,
            ballooned_bytes,
        }
    }

    /// What to ask of a guest that has `now`, so that it gets to the plan.
    pub fn step(&self, now: &Observed) -> Self {
        let must_unplug_first = now.plugged_bytes > self.plugged_bytes;
        Self {
            ballooned_bytes: if must_unplug_first {
                self.ballooned_bytes.min(now.ballooned_bytes)
            } else {
                self.ballooned_bytes
            },
            ..*self
        }
    }

    /// Whether the guest has obeyed.
    pub const fn is_reached(&self, now: &Observed) -> bool {
        now.plugged_bytes == self.plugged_bytes && now.ballooned_bytes == self.ballooned_bytes
    }

    /// Why the guest has not obeyed when its time, `within`, is over, the last of it `still_for` without a move.
    pub fn shortfall(&self, now: &Observed, within: Duration, still_for: Duration) -> MemoryReason {
        let lacks_mem_driver = now.plugged_bytes != self.plugged_bytes && !now.mem_driver;
        let lacks_balloon_driver = now.ballooned_bytes != self.ballooned_bytes && !now.balloon_driver;
        if lacks_mem_driver || lacks_balloon_driver {
            MemoryReason::DriverAbsent
        } else if now.plugged_bytes < self.plugged_bytes && now.plug_refused {
            MemoryReason::Host
        } else if still_for >= within / 2 {
            MemoryReason::GuestRefused
        } else {
            MemoryReason::Deadline
        }
    }
}

/// What a guest told as its total when it had been given so much; both in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Told {
    pub assigned_bytes: u64,
    pub total_bytes: u64,
}

impl Told {
    /// Whether a guest that told `before` has counted all that it was given meanwhile: it reports a block as plugged
    /// before it counts it. Its books take 64 bytes of a page of 4096, and a little is allowed for everything else.
    pub const fn has_counted_all(&self, before: &Self) -> bool {
        let moved_bytes = self.assigned_bytes.saturating_sub(before.assigned_bytes);
        let lost_bytes = before.assigned_bytes.saturating_sub(self.assigned_bytes);
        // The totals are the guest's words.
        let expected_bytes = before.total_bytes.saturating_add(moved_bytes - moved_bytes / 64);
        let least_bytes = expected_bytes.saturating_sub(lost_bytes.saturating_add(UNCOUNTED_BYTES));
        self.total_bytes >= least_bytes
    }
}

/// What a guest with `startup_bytes` of RAM has been given.
pub fn assigned_bytes(startup_bytes: u64, now: &Observed) -> u64 {
    (startup_bytes + now.plugged_bytes).saturating_sub(now.ballooned_bytes)
}

/// The sizes between the last one that was settled and every target since. A target that is withdrawn leaves a VM with
/// one of them: a guest that has no memory yet because it boots does not cost the VM what it had before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    least_bytes: u64,
    most_bytes: u64,
}

impl Span {
    /// One size.
    pub const fn at(bytes: u64) -> Self {
        Self {
            least_bytes: bytes,
            most_bytes: bytes,
        }
    }

    /// Also `bytes`, and everything between.
    pub fn with(self, bytes: u64) -> Self {
        Self {
            least_bytes: self.least_bytes.min(bytes),
            most_bytes: self.most_bytes.max(bytes),
        }
    }

    /// The size in the span that is closest to `bytes`.
    pub fn closest(self, bytes: u64) -> u64 {
        bytes.clamp(self.least_bytes, self.most_bytes)
    }
}

#[cfg(test)]
mod tests;
