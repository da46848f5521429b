//! Damaged saved states of virtio devices with a driver, over any guest memory. What is accepted can be resumed,
//! saved and restored again.
#![no_main]
#![forbid(unsafe_code)]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vm_lifecycle::unit::Unit;
use vm_lifecycle_fuzz::edits::{Edit, damage};
use vm_lifecycle_fuzz::machine::{Kind, Machine, View};

const SLOT: u8 = 3;

#[derive(Debug, Arbitrary)]
struct Input {
    kind: Kind,
    features: u64,
    size_log2: u8,
    memory: Vec<(u16, Vec<u8>)>,
    edits: Vec<Edit>,
}

fuzz_target!(|input: Input| {
    let machine = Machine::default();
    let slotted = machine.put(input.kind, SLOT);
    let view = View {
        mmio: &machine.mmio,
        bdf: slotted.device.bdf(),
    };
    view.start_driver(input.features, input.size_log2);
    machine.pause(&slotted.device);
    let mut section = slotted.device.save().expect("it can be saved");
    damage(&mut section.body, &input.edits);
    let twin = machine.twin();
    machine.check_empty(slotted);

    let machine = twin;
    for (address, bytes) in &input.memory {
        machine.scribble((*address).into(), bytes);
    }
    let slotted = machine.put(input.kind, SLOT);
    if slotted.device.restore(&section).is_ok() {
        machine.check_save(input.kind, &slotted.device);
        slotted.device.resume();
        machine.settle();
    }
    slotted.device.reset();
    machine.pause(&slotted.device);
    machine.check_empty(slotted);
});
