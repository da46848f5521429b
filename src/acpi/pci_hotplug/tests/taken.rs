//! Tests of what is left of a device that was taken by force.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::{Rig, bdf};
use crate::acpi::pci_hotplug::registers::Removed;
use crate::acpi::saved::PCI_HOTPLUG_SCHEMA;
use crate::ids::Bdf;
use crate::memory::layout::{HOTPLUG_EJECT_OFFSET, mmio_slot};
use crate::pci::device::Orphan;
use crate::unit::{PauseTicket, Section, Unit};

/// Lets a device come to `place` and takes it by force.
fn take(rig: &Rig, place: Bdf) {
    rig.insert(place, None);
    drop(rig.hotplug.remove(place));
    rig.hotplug.tell_taken(place, rig.left(place));
}

#[test]
fn what_is_left_of_a_device_taken_by_force_goes_with_its_driver() {
    let rig = Rig::new();
    let place = bdf(1, 1);
    let is_left = || rig.mmio.read(mmio_slot(place), &mut [0xFF; 4]);
    rig.insert(place, None);
    assert!(matches!(
        rig.hotplug.remove(place),
        Some(Removed::ByForce(slot)) if slot.bdf() == place
    ));
    rig.hotplug.tell_taken(place, rig.left(place));
    assert!(is_left() && !rig.is_seen(place));
    assert_eq!((rig.events(), rig.read(8), rig.read(12)), (2, 0, 1 << 1));
    rig.write(HOTPLUG_EJECT_OFFSET, 33);
    assert!(!is_left(), "the driver let go");
    assert_eq!(rig.heard(), [], "the host knows already");
    rig.hotplug.tell_taken(place, rig.left(place));
    rig.hotplug.reset();
    assert!(!is_left(), "no driver is left");
}

#[test]
fn a_device_waits_until_the_guest_has_let_go_of_the_one_before() {
    let rig = Rig::new();
    let place = bdf(0, 8);
    take(&rig, place);
    rig.insert(place, None);
    rig.hotplug.announce(place);
    assert_eq!((rig.events(), rig.read(0), rig.read(4)), (2, 0, 1 << 8));
    assert!(!rig.is_seen(place) && !rig.hotplug.request_eject(place));
    rig.write(HOTPLUG_EJECT_OFFSET, 8);
    assert_eq!(rig.heard(), [], "it let go of the one before");
    assert!(rig.is_seen(place));
    assert_eq!((rig.events(), rig.read(0)), (2, 1 << 8), "and looks again");
    rig.write(HOTPLUG_EJECT_OFFSET, 8);
    assert_eq!(rig.heard(), [(place, false)]);
}

#[test]
fn what_is_left_of_a_device_is_asked_for_whatever_becomes_of_the_next() {
    let rig = Rig::new();
    let place = bdf(0, 8);
    take(&rig, place);
    rig.insert(place, None);
    drop(rig.hotplug.remove(place));
    assert_eq!(rig.read(4), 1 << 8, "the next one went before it was read");
    rig.insert(place, None);
    assert!(rig.hotplug.offer(place));
    assert_eq!(
        (rig.events(), rig.read(0), rig.read(4)),
        (2, 0, 1 << 8),
        "asked again"
    );
    rig.write(HOTPLUG_EJECT_OFFSET, 8);
    assert!(rig.is_seen(place));
}

#[test]
fn what_is_left_of_a_device_is_saved_with_the_one_that_waits_behind_it() {
    let (rig, other) = (Rig::new(), Rig::new());
    let (place, base) = (bdf(1, 1), mmio_slot(bdf(1, 1)));
    take(&rig, place);
    rig.read(12);
    rig.insert(place, None);
    let section = rig.hotplug.save().expect("it can be saved");
    other.insert(place, None);
    other.hotplug.restore(&section).expect("its own save is accepted");
    assert_eq!(other.hotplug.save().expect("it can be saved"), section);
    let mut data = [0xFF; 4];
    assert!(other.mmio.read(base, &mut data) && data == [0; 4]);
    assert!(!other.is_seen(place), "it waits");
    other.write(HOTPLUG_EJECT_OFFSET, 33);
    assert!(other.is_seen(place) && !other.mmio.read(base, &mut data));
    assert_eq!(
        (other.heard(), other.read(8)),
        (vec![], 1 << 1),
        "and is announced"
    );

    // Two machines cannot have been one.
    let error = other
        .hotplug
        .restore(&section)
        .and_then(|()| other.hotplug.restore(&section));
    assert!(
        error
            .expect_err("refused")
            .to_string()
            .ends_with("something else answers there")
    );
    let mut outside: serde_json::Value = section.decode(PCI_HOTPLUG_SCHEMA).expect("it was encoded so");
    outside["remnants"][0]["bar"][0] = 0x1000.into();
    let outside = Section::encode(PCI_HOTPLUG_SCHEMA, &outside).expect("it is JSON");
    let error = Rig::new()
        .hotplug
        .restore(&outside)
        .expect_err("refused")
        .to_string();
    assert!(error.ends_with("no device can have been there"), "{error}");
}

/// Keeps the tickets of a pause until it goes on.
struct Busy(Arc<Mutex<Vec<PauseTicket>>>);

impl Orphan for Busy {
    fn bar_range(&self) -> Option<Range<u64>> {
        None
    }

    fn pause(&self, ticket: PauseTicket) {
        self.0.lock().expect("nobody panics with it").push(ticket);
    }

    fn resume(&self) {
        self.0.lock().expect("nobody panics with it").clear();
    }
}

#[test]
fn what_is_left_of_a_device_is_paused_with_the_machine() {
    let rig = Rig::new();
    let tickets = Arc::default();
    rig.hotplug
        .tell_taken(bdf(0, 8), Box::new(Busy(Arc::clone(&tickets))));
    rig.hotplug.pause(PauseTicket::new(|| ()));
    assert_eq!(tickets.lock().expect("nobody panics with it").len(), 1);
    rig.hotplug.resume();
    assert_eq!(tickets.lock().expect("nobody panics with it").len(), 0);
}
