//! Damaged saved states for every kind of unit. What is accepted can be used, saved and restored again.
#![no_main]
#![forbid(unsafe_code)]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vm_lifecycle::acpi::device::AcpiDevice;
use vm_lifecycle::acpi::pvpanic::Pvpanic;
use vm_lifecycle::bus::{Bus, BusDevice};
use vm_lifecycle::legacy::rtc::Rtc;
use vm_lifecycle::legacy::serial::Serial;
use vm_lifecycle::machine::fake::FakeVm;
use vm_lifecycle::machine::gsi::GsiTable;
use vm_lifecycle::memory::layout::{GED_GSI, SERIAL_GSI};
use vm_lifecycle::pci::root::PciRoot;
use vm_lifecycle::unit::{Section, Unit};
use vm_lifecycle_fuzz::Deaf;
use vm_lifecycle_fuzz::edits::{Edit, damage};
use vm_lifecycle_fuzz::machine::{Kind, Machine, View};

const SLOT: u8 = 3;

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Target {
    Serial,
    Rtc,
    Acpi,
    Pvpanic,
    PciRoot,
    Virtio(Kind),
}

#[derive(Debug, Arbitrary)]
struct Input {
    target: Target,
    schema: Option<u32>,
    /// What a good guest did before, for a state with something in it.
    writes: Vec<(u8, u8)>,
    size_log2: u8,
    memory: Vec<u8>,
    edits: Vec<Edit>,
}

impl Input {
    fn damage(&self, mut section: Section) -> Section {
        section.schema = self.schema.unwrap_or(section.schema);
        damage(&mut section.body, &self.edits);
        section
    }

    /// A device of a few registers, on any bus.
    fn check_device<D: BusDevice + Unit>(&self, make: impl Fn() -> D) {
        let device = make();
        for (offset, value) in &self.writes {
            device.write(u64::from(offset % 16), &[*value]);
        }
        let restored = make();
        let section = self.damage(device.save().expect("it can be saved"));
        if restored.restore(&section).is_ok() {
            let again = make().restore(&restored.save().expect("it can be saved"));
            again.expect("its own save is accepted");
            restored.resume();
            (0..16).for_each(|offset| restored.read(offset, &mut [0xFF]));
        }
        restored.reset();
    }

    fn check_root(&self) {
        let root = || PciRoot::new(&Bus::new()).expect("the bus is empty");
        let restored = root();
        if restored
            .restore(&self.damage(root().save().expect("it can be saved")))
            .is_ok()
        {
            let saved = restored.save().expect("it can be saved");
            root().restore(&saved).expect("its own save is accepted");
        }
    }

    fn check_virtio(&self, kind: Kind) {
        let machine = Machine::default();
        let slotted = machine.put(kind, SLOT);
        let view = View {
            mmio: &machine.mmio,
            bdf: slotted.device.bdf(),
        };
        view.start_driver(u64::MAX, self.size_log2);
        machine.pause(&slotted.device);
        let section = self.damage(slotted.device.save().expect("it can be saved"));
        let twin = machine.twin();
        machine.check_empty(slotted);

        let machine = twin;
        machine.scribble(0x3000, &self.memory);
        let slotted = machine.put(kind, SLOT);
        if slotted.device.restore(&section).is_ok() {
            machine.check_save(kind, &slotted.device);
            slotted.device.resume();
            machine.settle();
        }
        slotted.device.reset();
        machine.pause(&slotted.device);
        machine.check_empty(slotted);
    }
}

fuzz_target!(|input: Input| {
    let gsi = GsiTable::new(Arc::new(FakeVm::default()));
    let line = |pin| gsi.line(pin).expect("the fake refuses nothing");
    match input.target {
        Target::Serial => {
            input.check_device(|| Serial::new(line(SERIAL_GSI), Box::new(std::io::sink())));
        }
        Target::Rtc => input.check_device(Rtc::new),
        Target::Acpi => input.check_device(|| AcpiDevice::new(line(GED_GSI), Arc::new(Deaf))),
        Target::Pvpanic => input.check_device(|| Pvpanic::new(Arc::new(Deaf))),
        Target::PciRoot => input.check_root(),
        Target::Virtio(kind) => input.check_virtio(kind),
    }
});
