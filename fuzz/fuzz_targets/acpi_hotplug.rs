//! Cards that come, go and are renamed while the guest reads and writes the hot-plug registers as it likes. What the
//! guest sees in the slots, and what the host is told, is compared with a model at every step.
#![no_main]
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vm_lifecycle::acpi::device::AcpiDevice;
use vm_lifecycle::acpi::pci_hotplug::registers::{
    PCI_HOTPLUG_BYTES, PciHotplug, Removed, SlotListener, SlotName,
};
use vm_lifecycle::bus::{Bus, BusClaim, BusDevice};
use vm_lifecycle::ids::{Bdf, SlotLabel};
use vm_lifecycle::machine::fake::FakeVm;
use vm_lifecycle::machine::gsi::GsiTable;
use vm_lifecycle::memory::layout::{
    GED_GSI, HOTPLUG_EJECT_OFFSET, HOTPLUG_INDEX_OFFSET, HOTPLUG_LABEL_OFFSET, HOTPLUG_PRESENT_OFFSET, HOTPLUG_SELECT_OFFSET,
    ecam_address, mmio_slot,
};
use vm_lifecycle::pci::device::{Orphan, PciDevice};
use vm_lifecycle::pci::root::PciRoot;
use vm_lifecycle::unit::{PauseTicket, Unit};
use vm_lifecycle_fuzz::{Access, Deaf};

/// The numbers of slots there are, one that never holds anything, and one that does not exist.
const NUMBERS: [u8; 6] = [8, 31, 33, 127, 5, 200];

#[derive(Debug, Arbitrary)]
enum Step {
    Access(u16, Access),
    /// A slot of `NUMBERS`.
    Eject(u8),
    ReadName(u8),
    Insert(u8, Option<u16>, String),
    Announce(u8),
    RequestEject(u8),
    Remove(u8),
    Offer(u8),
    Rename(u8, String),
    Reset,
    SaveAndRestore,
}

struct Present;

impl PciDevice for Present {
    fn config_read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn config_write(&self, _offset: u16, _data: &[u8]) {}
}

/// What is left of a card, and where.
struct Left(u64, #[expect(dead_code)] BusClaim);

impl Orphan for Left {
    fn bar_range(&self) -> Option<Range<u64>> {
        Some(self.0..self.0 + BAR_BYTES)
    }

    fn pause(&self, _ticket: PauseTicket) {}

    fn resume(&self) {}
}

struct Zeros;

impl BusDevice for Zeros {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[derive(Default)]
struct Heard(Mutex<Vec<(Bdf, bool)>>);

impl SlotListener for Heard {
    fn ejected(&self, bdf: Bdf, asked: bool) {
        self.0.lock().expect("nobody panics with it").push((bdf, asked));
    }
}

/// What should be in a slot.
struct Card {
    seen: bool,
    /// The guest was asked to let go of it.
    asked: bool,
    name: Option<SlotName>,
}

/// The size of a device's registers.
const BAR_BYTES: u64 = 0x8000;

struct Rig {
    mmio: Bus,
    root: Arc<PciRoot>,
    hotplug: Arc<PciHotplug>,
    heard: Arc<Heard>,
    model: BTreeMap<Bdf, Card>,
    /// What was taken by force, and not let go of as far as the zeros at its registers tell.
    remnants: BTreeSet<Bdf>,
    _claim: BusClaim,
}

impl Rig {
    fn new() -> Self {
        let gsi = GsiTable::new(Arc::new(FakeVm::default()));
        let line = gsi.line(GED_GSI).expect("the fake refuses nothing");
        let heard = Arc::new(Heard::default());
        let acpi = Arc::new(AcpiDevice::new(line, Arc::new(Deaf)));
        let mmio = Bus::new();
        let root = Arc::new(PciRoot::new(&mmio).expect("the bus is empty"));
        let hotplug = PciHotplug::new(acpi, root.clone(), mmio.clone(), heard.clone());
        let hotplug = Arc::new(hotplug);
        Self {
            root,
            _claim: mmio
                .claim(0, PCI_HOTPLUG_BYTES, hotplug.clone())
                .expect("the bus is empty"),
            mmio,
            hotplug,
            heard,
            model: BTreeMap::new(),
            remnants: BTreeSet::new(),
        }
    }

    fn insert(&mut self, bdf: Bdf, name: Option<SlotName>) {
        if let Ok(slot) = self.root.reserve(bdf) {
            self.hotplug.insert(slot, Arc::new(Present), name.clone());
            let card = Card {
                seen: !self.remnants.contains(&bdf),
                asked: false,
                name,
            };
            self.model.insert(bdf, card);
        }
    }

    fn play(&mut self, step: Step) {
        match step {
            Step::Access(offset, access) => access.at(&self.mmio, u64::from(offset) % 0x100),
            Step::Eject(choice) => self.write(HOTPLUG_EJECT_OFFSET, number(choice)),
            Step::ReadName(choice) => self.check_name(choice),
            Step::Insert(choice, acpi_index, label) => {
                let label = SlotLabel::new(label).ok();
                let name = acpi_index.zip(label);
                let name = name.map(|(acpi_index, label)| SlotName { acpi_index, label });
                slot(choice)
                    .into_iter()
                    .for_each(|bdf| self.insert(bdf, name.clone()));
            }
            Step::Announce(choice) => slot(choice)
                .into_iter()
                .for_each(|bdf| self.hotplug.announce(bdf)),
            Step::RequestEject(choice) => {
                if let Some(bdf) = slot(choice) {
                    assert_eq!(self.hotplug.request_eject(bdf), self.is_seen(bdf));
                    let card = self.model.get_mut(&bdf).filter(|card| card.seen);
                    card.into_iter().for_each(|card| card.asked = true);
                }
            }
            Step::Remove(choice) => {
                if let Some(bdf) = slot(choice) {
                    self.remove(bdf);
                }
            }
            Step::Offer(choice) => {
                if let Some(bdf) = slot(choice) {
                    self.offer(bdf);
                }
            }
            Step::Rename(choice, label) => {
                if let (Some(bdf), Ok(label)) = (slot(choice), SlotLabel::new(label)) {
                    self.hotplug.rename(bdf, &label);
                    let name = self.model.get_mut(&bdf).and_then(|card| card.name.as_mut());
                    name.into_iter().for_each(|name| name.label = label.clone());
                }
            }
            Step::Reset => {
                self.hotplug.reset();
                self.remnants.clear();
                for card in self.model.values_mut() {
                    (card.seen, card.asked) = (true, false);
                }
            }
            Step::SaveAndRestore => self.check_save(),
        }
    }

    /// Takes a card as the machine does: the guest finds zeros where it saw a card until now.
    fn remove(&mut self, bdf: Bdf) {
        let removed = self.hotplug.remove(bdf);
        let card = self.model.remove(&bdf);
        assert_eq!(removed.is_some(), card.is_some());
        if matches!(removed, Some(Removed::ByForce(_))) {
            assert!(card.is_some_and(|card| card.seen));
            let base = mmio_slot(bdf);
            let claim = self.mmio.claim(base, BAR_BYTES, Arc::new(Zeros));
            self.hotplug.tell_taken(bdf, Box::new(Left(base, claim.expect("nothing is there"))));
            self.remnants.insert(bdf);
        }
    }

    fn offer(&mut self, bdf: Bdf) {
        let offered = self.hotplug.offer(bdf);
        let waits = self.remnants.contains(&bdf);
        let card = self.model.get_mut(&bdf);
        assert_eq!(offered, card.as_ref().is_some_and(|card| card.seen || !card.asked));
        if let Some(card) = card.filter(|_| offered) {
            (card.seen, card.asked) = (!waits, false);
        }
    }

    fn write(&self, offset: u64, value: u32) {
        self.hotplug.write(offset, &value.to_le_bytes());
    }

    fn is_seen(&self, bdf: Bdf) -> bool {
        self.model.get(&bdf).is_some_and(|card| card.seen)
    }

    fn check_name(&self, choice: u8) {
        self.write(HOTPLUG_SELECT_OFFSET, number(choice));
        let mut index = [0; 4];
        self.hotplug.read(HOTPLUG_INDEX_OFFSET, &mut index);
        let mut label = [0; 136];
        for (offset, part) in (HOTPLUG_LABEL_OFFSET..).step_by(8).zip(label.chunks_mut(8)) {
            self.hotplug.read(offset, part);
        }
        let units = label.chunks(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
        let text = String::from_utf16(&units.take_while(|unit| *unit != 0).collect::<Vec<_>>());
        let text = text.expect("whole characters");
        let name = slot(choice).and_then(|bdf| self.model.get(&bdf)?.name.as_ref());
        let expected = name.map_or((0, ""), |name| (name.acpi_index.into(), name.label.as_str()));
        assert_eq!((u32::from_le_bytes(index), text.as_str()), expected);
    }

    fn check_save(&self) {
        let mut other = Self::new();
        for (bdf, card) in &self.model {
            other.insert(*bdf, card.name.clone());
        }
        // The machine that is restored has the cards and nothing else.
        let saved = self.hotplug.save().expect("it can be saved");
        other.hotplug.restore(&saved).expect("its own save is accepted");
        assert_eq!(other.hotplug.save().expect("it can be saved"), saved);
    }

    /// What was ejected was there, and what is there is seen.
    fn check(&mut self) {
        let mut data = [0; 4];
        let mut gone = |bdf: &Bdf| !self.mmio.read(mmio_slot(*bdf), &mut data);
        for bdf in self.remnants.extract_if(.., |bdf| gone(bdf)) {
            // The driver let go: who waited is shown.
            let card = self.model.get_mut(&bdf);
            card.into_iter().for_each(|card| card.seen = true);
        }
        for (bdf, asked) in std::mem::take(&mut *self.heard.0.lock().expect("nobody panics with it")) {
            let card = self.model.get_mut(&bdf).expect("it was there");
            assert!(std::mem::replace(&mut card.seen, false), "{bdf} is ejected once");
            assert_eq!(asked, card.asked, "{bdf}");
        }
        for bdf in NUMBERS.into_iter().filter_map(|number| place(number.into())) {
            let mut id = [0; 4];
            self.mmio.read(ecam_address(bdf), &mut id);
            assert_eq!(id == [0; 4], self.is_seen(bdf), "{bdf}");
            let mut present = [0; 4];
            let offset = HOTPLUG_PRESENT_OFFSET + 4 * u64::from(bdf.segment());
            self.hotplug.read(offset, &mut present);
            let present = u32::from_le_bytes(present) & 1 << bdf.slot() != 0;
            assert_eq!(present, self.is_seen(bdf), "{bdf}");
        }
    }
}

fn number(choice: u8) -> u32 {
    NUMBERS[usize::from(choice) % NUMBERS.len()].into()
}

fn slot(choice: u8) -> Option<Bdf> {
    place(number(choice)).filter(|bdf| *bdf != Bdf::new(0, 5).expect("slots go to 31"))
}

fn place(number: u32) -> Option<Bdf> {
    let segment = u16::try_from(number / 32).ok().filter(|segment| *segment < 4)?;
    Bdf::new(segment, (number % 32) as u8)
}

fuzz_target!(|steps: Vec<Step>| {
    let mut rig = Rig::new();
    for step in steps {
        rig.play(step);
        rig.check();
    }
    rig.check_save();
});
