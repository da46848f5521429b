//! The pace at which a VM's owner hears of its guest's drivers.
//!
//! A guest can take and drop a device thousands of times a second. Its owner hears of the first [`BURST`] at once and
//! then of [`PER_SECOND`]; of what comes faster the last word of each unit is kept until its time has come. The supervisor
//! asks, nothing here knows a clock.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::event::EventKind;

/// How many events of a guest that was quiet are told at once: more than any guest has when it boots or ends.
const BURST: u32 = 256;
/// How many follow each second.
const PER_SECOND: u32 = 20;
const PAUSE: Duration = Duration::from_millis(1000 / PER_SECOND as u64);

/// Holds back what comes too fast.
#[derive(Debug, Default)]
pub(super) struct GuestEvents {
    /// When a guest that says nothing any more has its whole burst again; `None`: it has.
    quiet_at: Option<Instant>,
    /// At most one of each kind and unit, oldest first.
    held: VecDeque<EventKind>,
}

impl GuestEvents {
    /// Takes `kind`, which happened `now`: what is handed back is to be told at once, the rest is held.
    pub fn admit(&mut self, now: Instant, kind: EventKind) -> Option<EventKind> {
        self.held.retain(|held| !is_outdated(held, &kind));
        if self.held.is_empty() && self.has_room(now) {
            self.spend(now);
            return Some(kind);
        }
        self.held.push_back(kind);
        None
    }

    /// When the next of what is held may be told.
    pub fn due(&self) -> Option<Instant> {
        let quiet_at = self.quiet_at.filter(|_| !self.held.is_empty())?;
        Some(quiet_at - PAUSE * (BURST - 1))
    }

    /// The next that may be told `now`.
    pub fn next_due(&mut self, now: Instant) -> Option<EventKind> {
        if !self.has_room(now) {
            return None;
        }
        let kind = self.held.pop_front()?;
        self.spend(now);
        Some(kind)
    }

    fn has_room(&self, now: Instant) -> bool {
        let busy = self.quiet_at.map(|at| at.saturating_duration_since(now));
        busy.is_none_or(|busy| busy <= PAUSE * (BURST - 1))
    }

    fn spend(&mut self, now: Instant) {
        let from = self.quiet_at.map_or(now, |at| at.max(now));
        self.quiet_at = Some(from + PAUSE);
    }
}

/// Whether nobody needs `earlier` who hears `later`.
fn is_outdated(earlier: &EventKind, later: &EventKind) -> bool {
    match (earlier, later) {
        (EventKind::DriverReady { unit, .. }, EventKind::DriverReady { unit: later, .. })
        | (EventKind::DeviceNeedsReset { unit, .. }, EventKind::DeviceNeedsReset { unit: later, .. }) => {
            unit == later
        }
        (_, _) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::UnitName;

    fn ready(unit: &str, ready: bool) -> EventKind {
        let unit = UnitName::new(unit).expect("a short name");
        EventKind::DriverReady { unit, ready }
    }

    #[test]
    fn a_flood_is_told_at_a_bearable_pace_and_its_last_word_in_the_end() {
        let mut events = GuestEvents::default();
        let begin = Instant::now();
        let mut told = 0;
        // A hundred thousand in ten seconds, with a word of another unit among them.
        for round in 0..100_000u64 {
            let now = begin + Duration::from_micros(100 * round);
            let name = if round == 50_000 { "disk" } else { "net" };
            told += u32::from(events.admit(now, ready(name, round % 2 == 0)).is_some());
            while events.next_due(now).is_some() {
                told += 1;
            }
        }
        assert!(
            (BURST..=BURST + 10 * PER_SECOND + 1).contains(&told),
            "{told} events"
        );
        let last = ready("net", false);
        let due = events.due().expect("the last word is held");
        assert_eq!(events.next_due(due - Duration::from_millis(1)), None, "too early");
        assert_eq!(events.next_due(due), Some(last));
        assert_eq!(
            (events.next_due(due), events.due()),
            (None, None),
            "nothing is left"
        );
    }

    #[test]
    fn who_was_quiet_has_the_whole_burst_again() {
        let mut events = GuestEvents::default();
        let mut now = Instant::now();
        for _ in 0..2 {
            let told = (0..BURST + 5).filter(|_| events.admit(now, ready("net", true)).is_some());
            assert_eq!(told.count() as u32, BURST);
            now += Duration::from_secs(3600);
            assert!(events.next_due(now).is_some(), "the last word");
            now += Duration::from_secs(3600);
        }
    }
}
