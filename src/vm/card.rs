//! The life of one network card in a running machine: a pure table and a bounded history.
//!
//! ```text
//! Adding ─ Attached ⇄ DriverReady ─┐
//!           │ │  └──── EjectRequested ─ Ejected ─ Removed
//!           │ └──────(deadline)──┘
//!           └⇄ Released, by a guest that was not asked
//! ```
//! A guest that was asked to let go may do so late, when nobody waits any more. One that was never asked cannot make
//! a card go: what it calls ejecting is then its own affair, and the card stays, until it is offered to it again.

use std::collections::VecDeque;

use serde::Serialize;
use serde_json::{Value, json};

use crate::config::NicConfig;

/// How many steps of its life a card remembers.
pub(super) const HISTORY_STEPS_MAX: usize = 16;

/// Where a network card of a running machine is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NicState {
    /// Its backend is being opened; the guest does not see it yet.
    Adding,
    /// The guest can see it; no driver has it.
    Attached,
    /// A driver in the guest has it.
    DriverReady,
    /// The guest let go of it without being asked. The VM keeps it, and the guest has it again after its next reset, or
    /// when it is offered.
    Released,
    /// The guest was asked to let go of it.
    EjectRequested,
    /// The guest does not have it any more; what it holds on the host is being given back.
    Ejected,
    /// Nothing of it is left.
    Removed,
}

impl NicState {
    /// Every state, in the order of a card's life.
    pub const ALL: [Self; 7] = [
        Self::Adding,
        Self::Attached,
        Self::DriverReady,
        Self::Released,
        Self::EjectRequested,
        Self::Ejected,
        Self::Removed,
    ];

    /// The state in lower case with dashes.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Adding => "adding",
            Self::Attached => "attached",
            Self::DriverReady => "driver-ready",
            Self::Released => "released",
            Self::EjectRequested => "eject-requested",
            Self::Ejected => "ejected",
            Self::Removed => "removed",
        }
    }
}

/// What happens to a card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CardEvent {
    /// It is in the machine and in the configuration.
    Added,
    /// A driver took it, or let go of it.
    Driver(bool),
    /// The guest is asked to let go of it.
    EjectRequested,
    /// The guest has not let go of it in time.
    NotReleased,
    /// The guest lets go of it, asked or not.
    Ejected { asked: bool },
    /// It is offered to the guest, which was not asked for it or is not any more.
    Offered,
    /// It is taken from the guest.
    Forced,
    /// The machine is reset: who was asked to let go of it is gone.
    Reset,
    /// What it held is given back, or was never had.
    Gone,
}

/// A network card of a running machine.
#[derive(Debug)]
pub(super) struct Card {
    pub nic: NicConfig,
    state: NicState,
    driver_ready: bool,
    /// The guest let go of it without being asked.
    released: bool,
    history: VecDeque<Step>,
    forgotten_count: u64,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Step {
    /// Milliseconds since the VM object was made.
    at_ms: u64,
    state: NicState,
}

impl Card {
    /// A card that begins its life at `at_ms`: as `Adding`, or as `Attached` with the machine.
    pub fn new(nic: NicConfig, state: NicState, at_ms: u64) -> Self {
        Self {
            nic,
            state,
            driver_ready: false,
            released: false,
            history: VecDeque::from([Step { at_ms, state }]),
            forgotten_count: 0,
        }
    }

    pub fn state(&self) -> NicState {
        self.state
    }

    /// Whether a driver in the guest has it.
    pub fn driver_ready(&self) -> bool {
        self.driver_ready
    }

    /// Whether nothing is being done to it.
    pub fn is_settled(&self) -> bool {
        matches!(
            self.state,
            NicState::Attached | NicState::DriverReady | NicState::Released
        )
    }

    /// Takes note of `event`; `false` when it means nothing now and nothing follows from it.
    pub fn apply(&mut self, event: CardEvent, at_ms: u64) -> bool {
        match event {
            CardEvent::Driver(ready) => {
                self.driver_ready = ready;
                // A driver that has it has it again.
                self.released &= !ready;
            }
            CardEvent::Ejected { asked: false } => self.released = true,
            CardEvent::Offered | CardEvent::Reset => self.released = false,
            CardEvent::Ejected { asked: true }
            | CardEvent::Added
            | CardEvent::EjectRequested
            | CardEvent::NotReleased
            | CardEvent::Forced
            | CardEvent::Gone => {}
        }
        let Some(to) = next(self.state, event, self.settled()) else {
            return false;
        };
        if to != self.state {
            self.state = to;
            if self.history.len() == HISTORY_STEPS_MAX {
                self.history.pop_front();
                self.forgotten_count += 1;
            }
            self.history.push_back(Step { at_ms, state: to });
        }
        true
    }

    /// Where it is when nothing is being done to it.
    const fn settled(&self) -> NicState {
        match (self.released, self.driver_ready) {
            (true, _) => NicState::Released,
            (false, true) => NicState::DriverReady,
            (false, false) => NicState::Attached,
        }
    }

    pub fn inspect(&self) -> Value {
        json!({
            "name": self.nic.name,
            "bdf": self.nic.bdf,
            "state": self.state,
            "history": self.history,
            "forgotten_count": self.forgotten_count,
        })
    }
}

/// Where a card goes from `state`; `None` when `event` means nothing there. `settled` is where it is behind `event` if
/// nothing is being done to it.
const fn next(state: NicState, event: CardEvent, settled: NicState) -> Option<NicState> {
    match state {
        NicState::Adding => adding(event, settled),
        NicState::Attached | NicState::DriverReady | NicState::Released => attached(event, settled),
        NicState::EjectRequested => eject_requested(event, settled),
        NicState::Ejected => ejected(event),
        NicState::Removed => None,
    }
}

const fn adding(event: CardEvent, settled: NicState) -> Option<NicState> {
    match event {
        CardEvent::Added => Some(settled),
        // Heard before it is known to be safe in the configuration.
        CardEvent::Driver(_) | CardEvent::Ejected { asked: false } | CardEvent::Reset => {
            Some(NicState::Adding)
        }
        CardEvent::Gone => Some(NicState::Removed),
        CardEvent::EjectRequested
        | CardEvent::NotReleased
        | CardEvent::Offered
        | CardEvent::Ejected { asked: true }
        | CardEvent::Forced => None,
    }
}

const fn attached(event: CardEvent, settled: NicState) -> Option<NicState> {
    match event {
        CardEvent::Driver(_)
        | CardEvent::Ejected { asked: false }
        | CardEvent::Offered
        | CardEvent::Reset => Some(settled),
        CardEvent::EjectRequested => Some(NicState::EjectRequested),
        CardEvent::Ejected { asked: true } => Some(NicState::Ejected),
        CardEvent::Forced => Some(NicState::Ejected),
        CardEvent::Added | CardEvent::NotReleased | CardEvent::Gone => None,
    }
}

const fn eject_requested(event: CardEvent, settled: NicState) -> Option<NicState> {
    match event {
        CardEvent::Driver(_) => Some(NicState::EjectRequested),
        CardEvent::NotReleased => Some(settled),
        CardEvent::Ejected { .. } | CardEvent::Forced | CardEvent::Reset => Some(NicState::Ejected),
        CardEvent::Gone => Some(NicState::Removed),
        CardEvent::Added | CardEvent::EjectRequested | CardEvent::Offered => None,
    }
}

const fn ejected(event: CardEvent) -> Option<NicState> {
    match event {
        CardEvent::Gone => Some(NicState::Removed),
        // Giving back what it held failed, and is tried again.
        CardEvent::Forced => Some(NicState::Ejected),
        CardEvent::Added
        | CardEvent::Driver(_)
        | CardEvent::EjectRequested
        | CardEvent::NotReleased
        | CardEvent::Ejected { .. }
        | CardEvent::Offered
        | CardEvent::Reset => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{NicSpec, VmConfig};

    fn card(state: NicState) -> Card {
        let config = VmConfig::builder("test", "/boot/vmlinuz").nic(NicSpec::new("lan", "tap0"));
        let config = config.build().expect("the configuration is valid");
        Card::new(config.nics()[0].clone(), state, 0)
    }

    fn steps(card: &Card) -> Vec<NicState> {
        card.history.iter().map(|step| step.state).collect()
    }

    #[test]
    fn a_card_lives_from_adding_to_removed() {
        let mut card = card(NicState::Adding);
        for event in [
            CardEvent::Added,
            CardEvent::Driver(true),
            CardEvent::Ejected { asked: false },
            CardEvent::EjectRequested,
            CardEvent::Ejected { asked: true },
            CardEvent::Gone,
        ] {
            assert!(card.apply(event, 1), "{event:?}");
        }
        assert_eq!(steps(&card), NicState::ALL);
    }

    #[test]
    fn a_driver_that_is_faster_than_the_host_is_not_forgotten() {
        let mut card = card(NicState::Adding);
        assert!(card.apply(CardEvent::Driver(true), 1));
        assert_eq!(card.state(), NicState::Adding);
        assert!(card.apply(CardEvent::Added, 2));
        assert_eq!(steps(&card), [NicState::Adding, NicState::DriverReady]);
    }

    #[test]
    fn a_guest_lets_go_only_of_what_it_was_asked_for_but_as_late_as_it_likes() {
        let mut card = card(NicState::Attached);
        assert!(card.apply(CardEvent::Driver(true), 1));
        assert!(card.apply(CardEvent::Ejected { asked: false }, 2));
        assert_eq!(card.state(), NicState::Released, "nobody asked");
        assert!(card.is_settled() && card.apply(CardEvent::Offered, 2));
        assert_eq!(card.state(), NicState::DriverReady);
        assert!(card.apply(CardEvent::EjectRequested, 3));
        assert!(card.apply(CardEvent::NotReleased, 4));
        assert_eq!(card.state(), NicState::DriverReady, "it works on");
        assert!(card.apply(CardEvent::Ejected { asked: true }, 5), "it was asked");
        assert_eq!(card.state(), NicState::Ejected);
    }

    #[test]
    fn what_the_guest_lets_go_of_while_it_is_added_is_released_when_it_is_there() {
        let mut card = card(NicState::Adding);
        assert!(card.apply(CardEvent::Ejected { asked: false }, 1));
        assert_eq!(card.state(), NicState::Adding);
        assert!(card.apply(CardEvent::Added, 2));
        assert_eq!(card.state(), NicState::Released);
        assert!(card.apply(CardEvent::EjectRequested, 3) && card.apply(CardEvent::NotReleased, 4));
        assert_eq!(card.state(), NicState::Released);
        assert!(card.apply(CardEvent::Reset, 5));
        assert_eq!(card.state(), NicState::Attached, "the next guest sees it");
    }

    #[test]
    fn a_reset_completes_what_is_waited_for_and_withdraws_what_is_not() {
        let mut waited_for = card(NicState::Attached);
        assert!(waited_for.apply(CardEvent::EjectRequested, 1));
        assert!(waited_for.apply(CardEvent::Reset, 2));
        assert_eq!(waited_for.state(), NicState::Ejected);
        let mut given_up = card(NicState::Attached);
        assert!(given_up.apply(CardEvent::EjectRequested, 1));
        assert!(given_up.apply(CardEvent::NotReleased, 2));
        assert!(given_up.apply(CardEvent::Reset, 3));
        assert_eq!(given_up.state(), NicState::Attached);
    }

    #[test]
    fn nothing_brings_a_removed_card_back_and_an_ejected_one_only_goes() {
        let events = [
            CardEvent::Added,
            CardEvent::Driver(true),
            CardEvent::Driver(false),
            CardEvent::EjectRequested,
            CardEvent::NotReleased,
            CardEvent::Offered,
            CardEvent::Ejected { asked: false },
            CardEvent::Ejected { asked: true },
            CardEvent::Forced,
            CardEvent::Reset,
            CardEvent::Gone,
        ];
        for event in events {
            for settled in [NicState::Attached, NicState::DriverReady, NicState::Released] {
                assert_eq!(next(NicState::Removed, event, settled), None, "{event:?}");
                let after = next(NicState::Ejected, event, settled);
                let goes = matches!(after, None | Some(NicState::Ejected | NicState::Removed));
                assert!(goes, "{event:?}");
            }
        }
    }

    #[test]
    fn a_long_life_is_remembered_in_bounds() {
        let mut card = card(NicState::Attached);
        for round in 0..100 {
            card.apply(CardEvent::Driver(round % 2 == 0), round);
        }
        let told = card.inspect();
        assert_eq!(
            told["history"].as_array().map(Vec::len),
            Some(HISTORY_STEPS_MAX),
            "{told}"
        );
        assert_eq!(told["forgotten_count"], 101 - HISTORY_STEPS_MAX);
        assert_eq!(told["history"][HISTORY_STEPS_MAX - 1]["at_ms"], 99);
    }
}
