//! The way of a guest's memory to what was asked for, and what of it is worth an event. Pure.
//!
//! The guest decides how it moves, and every event takes the place of another one in a stream of bounded length: a
//! guest that goes back and forth must not be able to push out what else is to be told.

use std::time::{Duration, Instant};

use super::plan::BLOCK_BYTES;

/// Progress is told in steps of at least this part of the way.
const PROGRESS_STEPS: u64 = 16;
/// A guest that moves away from what was asked for is told of at most once in this time.
const AWAY_TOLD_EVERY: Duration = Duration::from_secs(1);

/// A way that began at one size and leads to another.
#[derive(Debug, Clone, Copy)]
pub struct Way {
    from_bytes: u64,
    to_bytes: u64,
    told_bytes: u64,
    away_told_at: Option<Instant>,
    settled: bool,
}

impl Way {
    /// The way from `from_bytes` to `to_bytes`; where nothing is to be done, it `is_settled` and nothing is told.
    pub const fn new(from_bytes: u64, to_bytes: u64, is_settled: bool) -> Self {
        Self {
            from_bytes,
            to_bytes,
            told_bytes: from_bytes,
            away_told_at: None,
            settled: is_settled,
        }
    }

    /// Whether it is worth telling that the guest has `now_bytes` at `at`. If it is, it counts as told: a step towards
    /// the end of the way, of which there are sixteen; or one away from it, with which a new way begins.
    pub fn is_news(&mut self, now_bytes: u64, at: Instant) -> bool {
        let step_bytes = (self.from_bytes.abs_diff(self.to_bytes) / PROGRESS_STEPS).max(BLOCK_BYTES);
        let left_bytes = now_bytes.abs_diff(self.to_bytes);
        let left_before_bytes = self.told_bytes.abs_diff(self.to_bytes);
        if left_before_bytes.saturating_sub(left_bytes) >= step_bytes {
            self.told_bytes = now_bytes;
            return true;
        }
        let is_early = self
            .away_told_at
            .is_some_and(|told_at| at.saturating_duration_since(told_at) < AWAY_TOLD_EVERY);
        if left_bytes.saturating_sub(left_before_bytes) < step_bytes || is_early {
            return false;
        }
        *self = Self {
            from_bytes: now_bytes,
            told_bytes: now_bytes,
            away_told_at: Some(at),
            settled: false,
            ..*self
        };
        true
    }

    /// The end of the way is reached; `true` when that has not been told.
    pub const fn settle(&mut self) -> bool {
        !std::mem::replace(&mut self.settled, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn progress_is_told_in_sixteenths_of_the_way() {
        let (mut way, at) = (Way::new(GIB, 2 * GIB, false), Instant::now());
        let sizes = (0..=512).map(|step| GIB + step * 2 * MIB);
        let told: Vec<_> = sizes.filter(|now| way.is_news(*now, at)).collect();
        assert_eq!((told.len(), told.last()), (16, Some(&(2 * GIB))));
        assert!(way.settle() && !way.settle(), "the end is told once");
        let mut short = Way::new(GIB, GIB + 8192, false);
        assert!(!short.is_news(GIB + 4096, at), "a page is not worth a word");
    }

    #[test]
    fn a_guest_that_goes_back_and_forth_is_told_of_once_a_second() {
        let (mut way, at) = (Way::new(GIB, GIB, true), Instant::now());
        let mut told_count = 0;
        for round in 0..10_000 {
            let at = at + Duration::from_millis(round / 10);
            told_count += u32::from(way.is_news(GIB - 256 * MIB, at)) + u32::from(way.is_news(GIB, at));
            told_count += u32::from(way.settle());
        }
        assert_eq!(told_count, 3, "once away, once back, once settled");
        assert!(way.is_news(GIB - 256 * MIB, at + AWAY_TOLD_EVERY));
    }

    #[test]
    fn the_way_back_has_sixteen_steps_again() {
        let (mut way, at) = (Way::new(GIB, GIB, true), Instant::now());
        assert!(way.is_news(512 * MIB, at));
        let sizes = (0..=256).map(|step| 512 * MIB + step * 2 * MIB);
        assert_eq!(sizes.filter(|now| way.is_news(*now, at)).count(), 16);
    }
}
