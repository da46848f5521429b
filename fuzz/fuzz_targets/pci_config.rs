//! Accesses of any width to the configuration spaces and BARs of two devices, BAR moves and unplugging included.
#![no_main]
#![forbid(unsafe_code)]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vm_lifecycle::ids::Bdf;
use vm_lifecycle::memory::layout::{ECAM_BASE, MMIO_BASE, ecam_address, mmio_slot, mmio_window};
use vm_lifecycle::unit::Unit;
use vm_lifecycle_fuzz::Access;
use vm_lifecycle_fuzz::machine::{Kind, Machine, Slotted, View};

const SLOT: u8 = 3;
/// The size of BAR 0, and a little of what follows it.
const BAR_BYTES: u64 = 0x8100;

#[derive(Debug, Arbitrary)]
struct Input {
    kind: Kind,
    started: bool,
    steps: Vec<Step>,
}

/// Where there is a `bool` it chooses the second device.
#[derive(Debug, Arbitrary)]
enum Step {
    Config(bool, u16, Access),
    /// In BAR 0 of the first device where it lies at power-on.
    Bar(u16, Access),
    /// Where it lies now.
    MovedBar(u16, Access),
    /// A KiB above the first memory window, and an offset.
    Window(u16, u16, Access),
    /// A KiB above the first ECAM, and an offset.
    Ecam(u16, u16, Access),
    /// Moves a BAR within and around its segment's window, by pages.
    Move(bool, u16),
    Command(bool, u8),
    Settle,
    Pause,
    Resume,
    Reset,
    Unplug,
}

fn play(machine: &Machine, first: &Slotted, second: &mut Option<Slotted>, step: &Step) {
    let view = |second: &bool| view(machine, SLOT + u8::from(*second));
    let kib = |count: &u16| u64::from(*count) << 10;
    let mmio = &machine.mmio;
    match step {
        Step::Config(second, offset, access) => {
            access.at(mmio, ecam_address(view(second).bdf) + u64::from(offset % 0x1000));
        }
        Step::Bar(offset, access) => {
            access.at(
                mmio,
                mmio_slot(first.device.bdf()) + u64::from(*offset) % BAR_BYTES,
            );
        }
        Step::MovedBar(offset, access) => {
            let base = view(&false).config_read(0x10, 4) & !0xF;
            access.at(mmio, base + u64::from(*offset) % BAR_BYTES);
        }
        Step::Window(page, offset, access) => access.at(mmio, MMIO_BASE + kib(page) + u64::from(*offset)),
        Step::Ecam(page, offset, access) => access.at(mmio, ECAM_BASE + kib(page) + u64::from(*offset)),
        Step::Move(second, to) => {
            view(second).config_write(0x10, mmio_window(1) - 0x8000 + (u64::from(*to) << 12), 4);
        }
        Step::Command(second, value) => view(second).config_write(4, (*value).into(), 2),
        Step::Settle => machine.settle(),
        Step::Pause => machine.pause(&first.device),
        Step::Resume => first.device.resume(),
        Step::Reset => first.device.reset(),
        Step::Unplug => *second = None,
    }
}

fn view(machine: &Machine, slot: u8) -> View<'_> {
    let bdf = Bdf::new(1, slot).expect("slots go to 31");
    View {
        mmio: &machine.mmio,
        bdf,
    }
}

fuzz_target!(|input: Input| {
    let machine = Machine::default();
    let first = machine.put(input.kind, SLOT);
    let mut second = Some(machine.put(Kind::Rng, SLOT + 1));
    let identity = view(&machine, SLOT).config_read(0, 4);
    if input.started {
        view(&machine, SLOT).start_driver(u64::MAX, 4);
    }
    for step in &input.steps {
        play(&machine, &first, &mut second, step);
        assert_eq!(view(&machine, SLOT).config_read(0, 4), identity);
    }
    drop(second);
    machine.check_save(input.kind, &first.device);
    machine.check_empty(first);
});
