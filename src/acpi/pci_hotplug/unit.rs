//! The unit `pci-hotplug`: reset, save and restore of the hot-plug registers.
//!
//! Which devices there are and what they are called is configuration; what the guest was told of them and has done
//! with them is saved.

use serde_json::{Value, json};

use super::registers::PciHotplug;
use super::state::{Slot, State};
use crate::acpi::saved::{PCI_HOTPLUG_SCHEMA, SavedPciHotplugV1, SavedRemnantV1, SavedUnansweredV1};
use crate::ids::{Bdf, UnitName};
use crate::memory::layout::{MMIO_SEGMENT_BYTES, SEGMENT_COUNT, mmio_window};
use crate::pci::device::Orphan;
use crate::unit::{PauseTicket, RestoreError, SaveError, Section, Unit};

impl Unit for PciHotplug {
    fn name(&self) -> UnitName {
        UnitName::new("pci-hotplug").expect("a short name")
    }

    /// A device that the guest ejected and the host kept is in its slot again; requests are for the guest that is
    /// gone, and whoever made them decides what follows.
    fn reset(&self) {
        let mut state = self.lock();
        state.changed = Default::default();
        state.eject_requests = Default::default();
        state.asked.clear();
        state.unanswered.clear();
        state.remnants.clear();
        state.show_all();
        state.select(0);
    }

    fn pause(&self, ticket: PauseTicket) {
        // Of these registers nothing is ever in flight, and the event device keeps its line quiet.
        for remnant in self.lock().remnants.values() {
            remnant.pause(ticket.clone());
        }
    }

    fn resume(&self) {
        for remnant in self.lock().remnants.values() {
            remnant.resume();
        }
    }

    fn save(&self) -> Result<Section, SaveError> {
        let state = self.lock();
        let ejected = state.slots.iter().filter(|(_, slot)| slot.is_hidden());
        let unanswered = state.unanswered.iter();
        let remnants = state.remnants.iter();
        let saved = SavedPciHotplugV1 {
            changed: state.changed,
            eject_requests: state.eject_requests,
            select: state.select,
            ejected: ejected.map(|(bdf, _)| *bdf).collect(),
            asked: state.asked.iter().copied().collect(),
            unanswered: unanswered
                .map(|(bdf, count)| SavedUnansweredV1 {
                    bdf: *bdf,
                    count: *count,
                })
                .collect(),
            remnants: remnants
                .map(|(bdf, remnant)| SavedRemnantV1 {
                    bdf: *bdf,
                    bar: remnant
                        .bar_range()
                        .map(|range| (range.start, range.end - range.start)),
                })
                .collect(),
        };
        Section::encode(PCI_HOTPLUG_SCHEMA, &saved)
    }

    fn restore(&self, section: &Section) -> Result<(), RestoreError> {
        let SavedPciHotplugV1 {
            changed,
            eject_requests,
            select,
            ejected,
            asked,
            unanswered,
            remnants,
        } = section.decode(PCI_HOTPLUG_SCHEMA)?;
        let mut state = self.lock();
        state.changed = changed;
        state.eject_requests = eject_requests;
        for SavedRemnantV1 { bdf, bar } in remnants {
            let remnant = self.restore_remnant(bdf, bar)?;
            state.remnants.insert(bdf, remnant);
        }
        for bdf in ejected {
            check_slot(&state, "ejected", bdf)?;
            state.hide(bdf);
        }
        for bdf in asked {
            check_slot(&state, "asked", bdf)?;
            state.asked.insert(bdf);
        }
        for SavedUnansweredV1 { bdf, count } in unanswered {
            if count > 0 {
                state.unanswered.insert(bdf, count);
            }
        }
        state.select(select);
        Ok(())
    }

    fn inspect(&self) -> Value {
        let state = self.lock();
        let remnants: Vec<_> = state.remnants.keys().collect();
        let slot = |(bdf, slot): (&Bdf, &Slot)| {
            let name = slot.name.as_ref();
            json!({
                "bdf": bdf,
                "ejected": slot.is_hidden(),
                "asked": state.asked.contains(bdf),
                "acpi_index": name.map(|name| name.acpi_index),
                "label": name.map(|name| name.label.as_str()),
            })
        };
        json!({
            "changed": state.changed,
            "eject_requests": state.eject_requests,
            "remnants": remnants,
            "slots": state.slots.iter().map(slot).collect::<Vec<_>>(),
        })
    }
}

impl PciHotplug {
    /// What was left of the device at `bdf`, whose registers were at `bar`. The values are untrusted.
    fn restore_remnant(&self, bdf: Bdf, bar: Option<(u64, u64)>) -> Result<Box<dyn Orphan>, RestoreError> {
        let refused = |reason| RestoreError::Value {
            field: "remnants",
            value: format!("{bdf}: {bar:#x?}"),
            reason,
        };
        let range = bar.map(|(base, len)| base..base.saturating_add(len));
        let window = mmio_window(bdf.segment());
        let window = window..window + MMIO_SEGMENT_BYTES;
        let inside = range
            .as_ref()
            .is_none_or(|range| window.start <= range.start && range.end <= window.end);
        if bdf.segment() >= SEGMENT_COUNT || !inside {
            return Err(refused("no device can have been there"));
        }
        self.restored_remnant(range)
            .map_err(|_| refused("something else answers there"))
    }
}

/// Only of a device that is there the guest can have been told.
fn check_slot(state: &State, field: &'static str, bdf: Bdf) -> Result<(), RestoreError> {
    if state.slots.contains_key(&bdf) {
        return Ok(());
    }
    Err(RestoreError::Value {
        field,
        value: bdf.to_string(),
        reason: "no device there can be ejected",
    })
}
