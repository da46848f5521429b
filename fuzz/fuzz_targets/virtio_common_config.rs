//! Sequences on the common configuration, with any guest memory behind the rings: set-up, kicks, resets, pauses.
//!
//! What comes out can be saved, and the save can be restored; a reset leaves nothing behind.
#![no_main]
#![forbid(unsafe_code)]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vm_lifecycle::memory::layout::mmio_slot;
use vm_lifecycle::unit::Unit;
use vm_lifecycle_fuzz::Access;
use vm_lifecycle_fuzz::machine::{
    DEVICE_CONFIG, DEVICE_STATUS, Kind, MSIX_TABLE, Machine, NOTIFY, Slotted, View,
};

const SLOT: u8 = 3;

#[derive(Debug, Arbitrary)]
struct Input {
    kind: Kind,
    steps: Vec<Step>,
}

#[derive(Debug, Arbitrary)]
enum Step {
    Common(u8, Access),
    DeviceConfig(u16, Access),
    Status(u8),
    /// A driver that keeps to the rules comes up, with these features and a size of its rings.
    Start(u64, u8),
    /// Queue, part of it, address.
    Ring(u8, u8, u32),
    Enable(u8),
    /// A word of the MSI-X table.
    Vector(u8, u32),
    /// The MSI-X capability's control word.
    MsixControl(u16),
    Notify(u8),
    /// Queue, length, flags: a buffer at the place where `Start` puts the rings.
    Offer(u8, u32, u8),
    Memory(u32, Vec<u8>),
    Settle,
    Pause,
    Resume,
    Save,
    Reset,
}

fn play(machine: &Machine, slotted: &Slotted, kind: Kind, step: &Step) {
    let view = View {
        mmio: &machine.mmio,
        bdf: slotted.device.bdf(),
    };
    let bar = mmio_slot(view.bdf);
    match step {
        Step::Common(offset, access) => access.at(view.mmio, bar + u64::from(offset % 0x40)),
        Step::DeviceConfig(offset, access) => {
            access.at(view.mmio, bar + DEVICE_CONFIG + u64::from(offset % 0x1000));
        }
        Step::Status(status) => view.bar_write(DEVICE_STATUS, (*status).into(), 1),
        Step::Start(features, size_log2) => view.start_driver(*features, *size_log2),
        Step::Ring(queue, part, address) => {
            view.bar_write(0x16, u64::from(queue % 8), 2);
            view.bar_write(0x20 + u64::from(part % 3) * 8, (*address).into(), 8);
        }
        Step::Enable(queue) => {
            view.bar_write(0x16, u64::from(queue % 8), 2);
            view.bar_write(0x1C, 1, 2);
        }
        Step::Vector(word, value) => view.bar_write(MSIX_TABLE + u64::from(*word) * 4, (*value).into(), 4),
        Step::MsixControl(word) => {
            let capability = view.config_read(0x34, 1);
            view.config_write(capability + 2, (*word).into(), 2);
        }
        Step::Notify(queue) => view.bar_write(NOTIFY + u64::from(*queue) * 4, 0, 2),
        Step::Offer(queue, length, flags) => {
            let base = (u64::from(queue % 6) + 1) * 0x3000;
            let rest = u64::from(*flags) << 32 | u64::from(*length);
            machine.scribble(base, &[0x3_0000u64.to_le_bytes(), rest.to_le_bytes()].concat());
            machine.scribble(base + 0x1002, &[1, 0]);
            view.bar_write(NOTIFY + u64::from(queue % 6) * 4, 0, 2);
        }
        Step::Memory(address, bytes) => machine.scribble((*address).into(), bytes),
        Step::Settle => machine.settle(),
        Step::Pause => machine.pause(&slotted.device),
        Step::Resume => slotted.device.resume(),
        Step::Save => {
            machine.check_save(kind, &slotted.device);
            slotted.device.resume();
        }
        Step::Reset => slotted.device.reset(),
    }
}

fuzz_target!(|input: Input| {
    let machine = Machine::default();
    let slotted = machine.put(input.kind, SLOT);
    let view = View {
        mmio: &machine.mmio,
        bdf: slotted.device.bdf(),
    };
    view.config_write(4, 6, 2);
    for step in &input.steps {
        play(&machine, &slotted, input.kind, step);
    }
    machine.check_save(input.kind, &slotted.device);
    slotted.device.reset();
    machine.settle();
    machine.pause(&slotted.device);
    assert!(!slotted.device.driver_ready());
    assert!(
        machine.vm.ioevent_addresses().is_empty(),
        "a reset device has ioeventfds"
    );
    assert_eq!(machine.vm.irqfd_count(), 0, "a reset device has irqfds");
    view.config_write(4, 6, 2);
    assert_eq!(view.bar_read(DEVICE_STATUS, 1), 0, "a reset device has a status");
    machine.check_empty(slotted);
});
