//! Tests of the hot-plug registers, from both sides, and of the shape of their AML.

mod taken;

use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::registers::{self, PCI_HOTPLUG_BYTES, PciHotplug, Removed, SlotListener, SlotName};
use super::remnant;
use crate::acpi::device::AcpiDevice;
use crate::bus::{Bus, BusDevice};
use crate::ids::{Bdf, SlotLabel};
use crate::machine::fake::FakeVm;
use crate::machine::gsi::GsiTable;
use crate::memory::layout::{
    GED_GSI, GED_SELECT_OFFSET, HOTPLUG_EJECT_OFFSET, HOTPLUG_INDEX_OFFSET, HOTPLUG_LABEL_BYTES,
    HOTPLUG_LABEL_OFFSET, HOTPLUG_PRESENT_OFFSET, HOTPLUG_SELECT_OFFSET, SEGMENT_COUNT, ecam_address,
    mmio_slot,
};
use crate::pci::device::{Orphan, PciDevice};
use crate::pci::root::PciRoot;
use crate::unit::{PowerListener, PowerRequest, Unit};

/// Says nothing of itself but that it is there.
struct Present;

impl PciDevice for Present {
    fn config_read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0x55);
    }

    fn config_write(&self, _offset: u16, _data: &[u8]) {}
}

#[derive(Default)]
struct Heard(Mutex<Vec<(Bdf, bool)>>);

impl SlotListener for Heard {
    fn ejected(&self, bdf: Bdf, asked: bool) {
        self.0.lock().unwrap().push((bdf, asked));
    }
}

impl PowerListener for Heard {
    fn power_request(&self, _request: PowerRequest) {}
}

/// The registers of a machine with PCI.
struct Rig {
    mmio: Bus,
    root: Arc<PciRoot>,
    acpi: Arc<AcpiDevice>,
    hotplug: PciHotplug,
    heard: Arc<Heard>,
}

impl Rig {
    fn new() -> Self {
        let mmio = Bus::new();
        let heard = Arc::new(Heard::default());
        let line = GsiTable::new(Arc::new(FakeVm::default())).line(GED_GSI).unwrap();
        let acpi = Arc::new(AcpiDevice::new(line, heard.clone()));
        let root = Arc::new(PciRoot::new(&mmio).unwrap());
        Self {
            hotplug: PciHotplug::new(acpi.clone(), root.clone(), mmio.clone(), heard.clone()),
            root,
            mmio,
            acpi,
            heard,
        }
    }

    fn insert(&self, bdf: Bdf, name: Option<(u16, &str)>) {
        let name = name.map(|(acpi_index, label)| SlotName {
            acpi_index,
            label: SlotLabel::new(label).unwrap(),
        });
        let slot = self.root.reserve(bdf).unwrap();
        self.hotplug.insert(slot, Arc::new(Present), name);
    }

    /// What the slot's configuration space says, which its `_STA` has to say too.
    fn is_seen(&self, bdf: Bdf) -> bool {
        let mut data = [0; 4];
        self.mmio.read(ecam_address(bdf), &mut data);
        let seen = data != [0xFF; 4];
        let present = self.read(HOTPLUG_PRESENT_OFFSET + 4 * u64::from(bdf.segment()));
        assert_eq!(present & 1 << bdf.slot() != 0, seen, "{bdf}");
        seen
    }

    /// What is left of the device at `bdf`.
    fn left(&self, bdf: Bdf) -> Box<dyn Orphan> {
        let base = mmio_slot(bdf);
        remnant::restored(&self.mmio, Some(base..base + 0x8000)).unwrap()
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0xFF; 4];
        self.hotplug.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.hotplug.write(offset, &value.to_le_bytes());
    }

    /// The event device's bits.
    fn events(&self) -> u32 {
        let mut data = [0; 4];
        self.acpi.read(GED_SELECT_OFFSET, &mut data);
        u32::from_le_bytes(data)
    }

    /// What the guest reads as the slot's name.
    fn name(&self, number: u32) -> (u32, String) {
        self.write(HOTPLUG_SELECT_OFFSET, number);
        (self.read(HOTPLUG_INDEX_OFFSET), self.label())
    }

    fn label(&self) -> String {
        let mut units = Vec::new();
        for word in (0..HOTPLUG_LABEL_BYTES as u64).step_by(8) {
            let mut data = [0xFF; 8];
            self.hotplug.read(HOTPLUG_LABEL_OFFSET + word, &mut data);
            units.extend(data.chunks(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]])));
        }
        let end = units.iter().position(|unit| *unit == 0).expect("it ends");
        assert!(units[end..].iter().all(|unit| *unit == 0), "zeros to the end");
        String::from_utf16(&units[..end]).unwrap()
    }

    /// Which devices the guest has let go of, and whether it was asked to.
    fn heard(&self) -> Vec<(Bdf, bool)> {
        std::mem::take(&mut self.heard.0.lock().unwrap())
    }
}

fn bdf(segment: u16, slot: u8) -> Bdf {
    Bdf::new(segment, slot).unwrap()
}

#[test]
fn a_new_device_is_seen_and_then_told_of_once() {
    let rig = Rig::new();
    rig.insert(bdf(2, 31), None);
    assert!(rig.is_seen(bdf(2, 31)));
    assert_eq!(rig.events(), 0, "a guest that finds it by itself needs no event");
    rig.hotplug.announce(bdf(2, 31));
    assert_eq!(rig.events(), 2);
    let bits: Vec<_> = (0..8).map(|register| rig.read(register * 4)).collect();
    assert_eq!(bits, [0, 0, 0, 0, 1 << 31, 0, 0, 0]);
    assert_eq!(rig.read(0x10), 0, "reading clears");
}

#[test]
fn a_device_is_asked_back_ejected_and_taken_away() {
    let rig = Rig::new();
    let place = bdf(0, 8);
    assert!(!rig.hotplug.request_eject(place), "nothing is there");
    rig.insert(place, None);
    assert!(rig.hotplug.request_eject(place));
    assert_eq!((rig.events(), rig.read(4), rig.read(4)), (2, 1 << 8, 0));
    assert!(rig.is_seen(place), "the guest may keep it");
    rig.write(HOTPLUG_EJECT_OFFSET, 8);
    assert_eq!((rig.is_seen(place), rig.heard()), (false, vec![(place, true)]));
    rig.write(HOTPLUG_EJECT_OFFSET, 8);
    assert_eq!(rig.heard(), [], "once");
    assert!(!rig.hotplug.request_eject(place), "it is on its way out");
    assert!(
        rig.root.reserve(place).is_err(),
        "the slot is taken until the end"
    );
    let slot = rig.hotplug.remove(place).expect("it was there");
    assert!(matches!(slot, Removed::Ejected(_)));
    assert!(rig.root.reserve(place).is_err(), "and until its holder lets go");
    drop(slot);
    assert!(rig.root.reserve(place).is_ok());
    assert!(rig.hotplug.remove(place).is_none(), "once");
    assert_eq!(rig.events(), 0, "the guest knows already");
}

#[test]
fn a_request_that_is_answered_twice_takes_one_device() {
    let rig = Rig::new();
    let place = bdf(0, 8);
    let (take, answer) = (|| rig.read(4), || rig.write(HOTPLUG_EJECT_OFFSET, 8));
    // Asked twice: the guest has queued two answers, and the first is done when the next card comes.
    rig.insert(place, None);
    for _ in 0..2 {
        assert!(rig.hotplug.request_eject(place));
        assert_eq!(take(), 1 << 8);
    }
    answer();
    assert_eq!(rig.heard(), [(place, true)]);
    drop(rig.hotplug.remove(place));
    rig.insert(place, None);
    rig.events();
    answer();
    assert_eq!((rig.heard(), rig.is_seen(place)), (vec![], true));
    assert_eq!((rig.events(), rig.read(0)), (2, 1 << 8), "it looks again");

    // Asked once and then taken by force, with the next card behind what is left.
    assert!(rig.hotplug.request_eject(place));
    take();
    drop(rig.hotplug.remove(place));
    rig.hotplug.tell_taken(place, rig.left(place));
    take();
    rig.insert(place, None);
    answer();
    assert!(rig.is_seen(place), "the first answer shows it");
    answer();
    assert_eq!((rig.heard(), rig.is_seen(place)), (vec![], true));

    // Nothing is unanswered any more: what the guest does now is its own affair.
    answer();
    assert_eq!((rig.heard(), rig.is_seen(place)), (vec![(place, false)], false));
}

#[test]
fn a_request_that_was_not_read_is_not_about_the_next_device() {
    let rig = Rig::new();
    let place = bdf(0, 8);
    rig.insert(place, None);
    assert!(rig.hotplug.request_eject(place));
    rig.read(4);
    drop(rig.hotplug.remove(place));
    rig.hotplug.tell_taken(place, rig.left(place));
    rig.insert(place, None);
    rig.write(HOTPLUG_EJECT_OFFSET, 8);
    assert_eq!(rig.read(4), 0, "it was about the device before");
}

#[test]
fn a_device_that_is_asked_for_goes_with_whatever_answer_comes() {
    let rig = Rig::new();
    let place = bdf(0, 8);
    rig.insert(place, None);
    for _ in 0..2 {
        assert!(rig.hotplug.request_eject(place));
        rig.read(4);
    }
    rig.write(HOTPLUG_EJECT_OFFSET, 8);
    drop(rig.hotplug.remove(place));
    rig.insert(place, None);
    assert!(rig.hotplug.request_eject(place));
    rig.write(HOTPLUG_EJECT_OFFSET, 8);
    assert_eq!(rig.heard(), [(place, true), (place, true)]);
    rig.hotplug.reset();
    rig.write(HOTPLUG_EJECT_OFFSET, 8);
    assert_eq!(rig.heard(), [(place, false)], "a new guest has nothing to answer");
}

#[test]
fn a_device_is_offered_again_unless_the_guest_did_as_it_was_asked() {
    let rig = Rig::new();
    let place = bdf(0, 8);
    assert!(!rig.hotplug.offer(place), "nothing is there");
    rig.insert(place, None);
    rig.write(HOTPLUG_EJECT_OFFSET, 8);
    assert_eq!((rig.heard(), rig.is_seen(place)), (vec![(place, false)], false));
    assert!(rig.hotplug.offer(place) && rig.is_seen(place));
    assert_eq!((rig.events(), rig.read(0)), (2, 1 << 8));
    // Withdrawn before the guest reads it, and behind that.
    assert!(rig.hotplug.request_eject(place) && rig.hotplug.offer(place));
    assert_eq!(rig.read(4), 0);
    assert!(rig.hotplug.request_eject(place));
    assert_eq!(rig.read(4), 1 << 8);
    assert!(rig.hotplug.offer(place));
    rig.write(HOTPLUG_EJECT_OFFSET, 8);
    assert_eq!(
        (rig.heard(), rig.is_seen(place)),
        (vec![], true),
        "it answers too late"
    );
    assert!(rig.hotplug.request_eject(place));
    rig.write(HOTPLUG_EJECT_OFFSET, 8);
    assert!(!rig.hotplug.offer(place) && !rig.is_seen(place));
}

#[test]
fn nothing_but_a_hot_pluggable_device_can_be_ejected() {
    let rig = Rig::new();
    let fixed = rig.root.reserve(bdf(0, 9)).unwrap().occupy(Arc::new(Present));
    for number in [0, 9, 10, 31, 127, 128, 1 << 16 | 9, u32::MAX] {
        rig.write(HOTPLUG_EJECT_OFFSET, number);
    }
    assert_eq!(rig.heard(), []);
    assert!(rig.is_seen(bdf(0, 0)) && rig.is_seen(fixed.bdf()));
    assert!(rig.hotplug.remove(fixed.bdf()).is_none());
}

#[test]
fn names_are_read_as_they_are_when_the_slot_is_selected() {
    let rig = Rig::new();
    rig.insert(bdf(0, 8), None);
    rig.insert(bdf(3, 2), Some((16383, "büro 🖧")));
    assert_eq!(rig.name(8), (0, String::new()), "a version without names");
    assert_eq!(rig.name(9), (0, String::new()), "nothing is there");
    assert_eq!(rig.name(4 * 32), (0, String::new()), "no such slot");
    assert_eq!(rig.name(3 * 32 + 2), (16383, "büro 🖧".to_owned()));
    for name in [
        "x".repeat(64),
        "é".repeat(32),
        "🦀".repeat(16),
        "\u{FFFE}".to_owned(),
    ] {
        rig.hotplug
            .rename(bdf(3, 2), &SlotLabel::new(name.as_str()).unwrap());
        assert_ne!(rig.label(), name, "nothing changes under a reader");
        assert_eq!(rig.name(3 * 32 + 2), (16383, name));
    }
    rig.hotplug.rename(bdf(0, 8), &SlotLabel::new("LAN").unwrap());
    assert_eq!(rig.name(8), (0, String::new()), "still without a name");
}

#[test]
fn a_reset_shows_what_the_host_has_kept_and_forgets_requests() {
    let rig = Rig::new();
    rig.insert(bdf(0, 8), Some((1, "LAN")));
    rig.insert(bdf(0, 9), None);
    rig.write(HOTPLUG_EJECT_OFFSET, 8);
    assert!(rig.hotplug.request_eject(bdf(0, 9)));
    rig.hotplug.announce(bdf(0, 9));
    rig.name(8);
    rig.hotplug.reset();
    assert!(rig.is_seen(bdf(0, 8)) && rig.is_seen(bdf(0, 9)));
    assert_eq!(
        (rig.read(0), rig.read(4), rig.read(HOTPLUG_INDEX_OFFSET)),
        (0, 0, 0)
    );
    assert_eq!(rig.heard(), [(bdf(0, 8), false)], "who kept it was told before");
}

#[test]
fn events_selection_and_ejected_slots_are_saved() {
    let (rig, other) = (Rig::new(), Rig::new());
    for rig in [&rig, &other] {
        rig.insert(bdf(0, 8), Some((7, "LAN")));
        rig.insert(bdf(1, 3), None);
    }
    rig.hotplug.announce(bdf(0, 8));
    assert!(rig.hotplug.request_eject(bdf(0, 8)));
    rig.read(4);
    assert!(rig.hotplug.request_eject(bdf(0, 8)));
    rig.write(HOTPLUG_EJECT_OFFSET, 32 + 3);
    rig.write(HOTPLUG_SELECT_OFFSET, 8);
    let section = rig.hotplug.save().unwrap();
    other.hotplug.restore(&section).unwrap();
    assert_eq!(other.hotplug.save().unwrap(), section);
    assert!(!other.is_seen(bdf(1, 3)));
    assert_eq!((other.read(0), other.read(4)), (1 << 8, 1 << 8));
    assert_eq!(
        (other.read(HOTPLUG_INDEX_OFFSET), other.label()),
        (7, "LAN".to_owned())
    );
    other.write(HOTPLUG_EJECT_OFFSET, 8);
    assert_eq!(other.heard(), [(bdf(0, 8), true)], "it was asked before");
    let empty = Rig::new().hotplug.restore(&section).unwrap_err();
    assert_eq!(
        empty.to_string(),
        "saved ejected is 0001:00:03.0: no device there can be ejected"
    );
}

#[test]
fn every_slot_of_a_bridge_is_described_once() {
    let mut shared = Vec::new();
    registers::shared(&mut shared);
    let holds = |aml: &[u8], what: &[u8]| aml.windows(what.len()).filter(|part| *part == what).count();
    assert_eq!(holds(&shared, b"HPSC"), 1, "the scan");
    for segment in 0..SEGMENT_COUNT {
        let first_slot = crate::config::first_slot(segment);
        let mut slots = Vec::new();
        acpi_tables::Aml::to_aml_bytes(&registers::SlotDevices { segment, first_slot }, &mut slots);
        for method in [b"_STA", b"_EJ0"] {
            assert_eq!(holds(&slots, method), usize::from(32 - first_slot));
        }
        for slot in first_slot..32 {
            let address = [b"_ADR\x0C\0\0", &[slot, 0][..]].concat();
            assert_eq!(holds(&slots, &address), 1, "slot {slot}");
            let notify = [b"\x86S".as_slice(), format!("{slot:02X}_").as_bytes()].concat();
            assert_eq!(holds(&slots, &notify), 1, "slot {slot}");
        }
        let bytes_max = 92 * usize::from(32 - first_slot) + 80;
        assert!(slots.len() <= bytes_max, "{} bytes of AML", slots.len());
    }
}

proptest! {
    #[test]
    fn any_access_is_answered_and_any_state_can_be_saved(
        accesses in prop::collection::vec(
            (prop_oneof![0..0x60u64, 0..PCI_HOTPLUG_BYTES], 1usize..9, prop::option::of(prop_oneof![0..40u64, any::<u64>()])),
            0..60,
        ),
    ) {
        let (rig, other) = (Rig::new(), Rig::new());
        for rig in [&rig, &other] {
            rig.insert(bdf(0, 8), Some((7, "LAN")));
        }
        for (offset, length, value) in accesses {
            match value {
                Some(value) => rig.hotplug.write(offset, &value.to_le_bytes()[..length]),
                None => rig.hotplug.read(offset, &mut [0; 8][..length]),
            }
        }
        let section = rig.hotplug.save().unwrap();
        other.hotplug.restore(&section).unwrap();
        prop_assert_eq!(other.hotplug.save().unwrap(), section);
        prop_assert_eq!(rig.is_seen(bdf(0, 8)), rig.heard().is_empty());
    }
}
