//! The network cards of a running machine, with the operations that wait for them, and the lives of those that went.
//!
//! A card is known by its PCI address, which it keeps for its whole life; its name can change.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use serde_json::{Value, json};

use crate::config::NicConfig;
use crate::ids::{Bdf, UnitName};
use crate::vm::card::{Card, CardEvent, NicState};
use crate::vm::nic::{AddNicOutcome, RemoveNicOutcome};
use crate::vm::operation::Operation;

/// How many cards that went are remembered.
pub(super) const PAST_CARDS_MAX: usize = 64;

/// A card and who waits for it.
pub(super) struct Present {
    pub card: Card,
    /// The operation that added it waits for the driver.
    pub add: Option<Operation<AddNicOutcome>>,
    /// The operation that adds it has had its time before the card was there.
    pub add_is_late: bool,
    /// The operation that removes it waits for the guest, or for the host to take back what it held.
    pub removal: Option<Operation<RemoveNicOutcome>>,
    /// A worker gives back what it held.
    pub going: bool,
    /// It goes with a reset that is on its way.
    pub goes_with_reset: bool,
}

/// Every card of the machine.
pub(super) struct Cards {
    made_at: Instant,
    present: BTreeMap<Bdf, Present>,
    past: VecDeque<Value>,
}

impl Default for Cards {
    fn default() -> Self {
        Self {
            made_at: Instant::now(),
            present: BTreeMap::new(),
            past: VecDeque::new(),
        }
    }
}

impl Cards {
    /// A card begins its life; `add` is the operation that adds it.
    pub fn insert(&mut self, nic: NicConfig, state: NicState, add: Option<Operation<AddNicOutcome>>) {
        let (bdf, at_ms) = (nic.bdf, self.now_ms());
        let present = Present {
            card: Card::new(nic, state, at_ms),
            add,
            add_is_late: false,
            removal: None,
            going: false,
            goes_with_reset: false,
        };
        self.present.insert(bdf, present);
    }

    /// Tells the card at `bdf` of `event`; the card, if something follows from it.
    pub fn apply(&mut self, bdf: Bdf, event: CardEvent) -> Option<&mut Present> {
        let at_ms = self.now_ms();
        let present = self.present.get_mut(&bdf)?;
        present.card.apply(event, at_ms).then_some(present)
    }

    pub fn at(&mut self, bdf: Bdf) -> Option<&mut Present> {
        self.present.get_mut(&bdf)
    }

    pub fn find(&self, bdf: Bdf) -> Option<&Present> {
        self.present.get(&bdf)
    }

    pub fn all(&self) -> impl Iterator<Item = &Present> {
        self.present.values()
    }

    /// Cards that the configuration may not hold yet.
    pub fn adding(&self) -> impl Iterator<Item = &NicConfig> {
        let adding = |present: &&Present| present.card.state() == NicState::Adding;
        self.all().filter(adding).map(|present| &present.card.nic)
    }

    /// The address of the card of the unit.
    pub fn of_unit(&self, unit: &UnitName) -> Option<Bdf> {
        let nics = self.all().map(|present| &present.card.nic);
        nics.filter(|nic| nic.unit_name() == *unit)
            .map(|nic| nic.bdf)
            .next()
    }

    pub fn addresses(&self) -> Vec<Bdf> {
        self.present.keys().copied().collect()
    }

    /// The card at `bdf` is gone.
    pub fn remove(&mut self, bdf: Bdf) -> Option<Present> {
        let at_ms = self.now_ms();
        let mut present = self.present.remove(&bdf)?;
        present.card.apply(CardEvent::Gone, at_ms);
        if self.past.len() == PAST_CARDS_MAX {
            self.past.pop_front();
        }
        self.past.push_back(present.card.inspect());
        Some(present)
    }

    pub fn inspect(&self) -> Value {
        let present: Vec<_> = self.all().map(|present| present.card.inspect()).collect();
        json!({ "present": present, "past": self.past })
    }

    fn now_ms(&self) -> u64 {
        self.made_at.elapsed().as_millis() as u64
    }
}
