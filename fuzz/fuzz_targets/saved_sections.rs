//! Damaged saved states of the simple units. What is accepted can be used, saved and restored again.
#![no_main]
#![forbid(unsafe_code)]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vm_lifecycle::acpi::device::AcpiDevice;
use vm_lifecycle::acpi::pci_hotplug::registers::PciHotplug;
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

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Target {
    Serial,
    Rtc,
    Acpi,
    PciHotplug,
    Pvpanic,
    PciRoot,
}

#[derive(Debug, Arbitrary)]
struct Input {
    target: Target,
    schema_is_next: u8,
    /// What a good guest did before, for a state with something in it.
    writes: Vec<(u8, u8)>,
    edits: Vec<Edit>,
}

impl Input {
    fn damage(&self, mut section: Section) -> Section {
        section.schema += u32::from(self.schema_is_next == u8::MAX);
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
}

fuzz_target!(|input: Input| {
    let gsi = GsiTable::new(Arc::new(FakeVm::default()));
    let line = |pin| gsi.line(pin).expect("the fake refuses nothing");
    match input.target {
        Target::Serial => {
            input.check_device(|| Serial::new(line(SERIAL_GSI), Box::new(std::io::sink()), || ()));
        }
        Target::Rtc => input.check_device(Rtc::new),
        Target::Acpi => input.check_device(|| AcpiDevice::new(line(GED_GSI), Arc::new(Deaf))),
        Target::PciHotplug => input.check_device(|| {
            let acpi = Arc::new(AcpiDevice::new(line(GED_GSI), Arc::new(Deaf)));
            let mmio = Bus::new();
            let pci = Arc::new(PciRoot::new(&mmio).expect("the bus is empty"));
            PciHotplug::new(acpi, pci, mmio, Arc::new(Deaf))
        }),
        Target::Pvpanic => input.check_device(|| Pvpanic::new(Arc::new(Deaf))),
        Target::PciRoot => input.check_root(),
    }
});
