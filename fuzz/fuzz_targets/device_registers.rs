//! Accesses of any width to the ports and the ACPI registers, at and around every device, with input and pauses.
#![no_main]
#![forbid(unsafe_code)]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vm_lifecycle::memory::layout::{ACPI_REGISTERS_BASE, RTC_PORT};
use vm_lifecycle::unit::PauseTicket;
use vm_lifecycle_fuzz::Access;
use vm_lifecycle_fuzz::board::{Board, PORTS};

#[derive(Debug, Arbitrary)]
enum Step {
    /// Device, register, access.
    Device(u8, u8, Access),
    Port(u16, Access),
    /// Writes a register of the clock.
    Clock(u8, u8),
    Acpi(u16, Access),
    Type(Vec<u8>),
    PressPowerButton,
    Pause,
    Resume,
    SaveAndRestore,
    Reset,
}

fn play(board: &Board, step: &Step) {
    match step {
        Step::Device(device, register, access) => {
            let port = PORTS[usize::from(*device) % PORTS.len()] + u16::from(register % 9);
            access.at(&board.pio, port.into());
        }
        Step::Port(port, access) => access.at(&board.pio, (*port).into()),
        Step::Clock(index, value) => {
            board.pio.write(RTC_PORT.into(), &[*index]);
            board.pio.write(u64::from(RTC_PORT) + 1, &[*value]);
        }
        Step::Acpi(offset, access) => {
            access.at(&board.mmio, ACPI_REGISTERS_BASE + u64::from(offset % 0x2000));
        }
        Step::Type(bytes) => assert!(board.serial.input(bytes) <= bytes.len()),
        Step::PressPowerButton => board.acpi.press_power_button(),
        Step::Pause => {
            let pause = PauseTicket::new(|| ());
            board.units.iter().for_each(|unit| unit.pause(pause.clone()));
        }
        Step::Resume => board.units.iter().for_each(|unit| unit.resume()),
        Step::Reset => board.units.iter().for_each(|unit| unit.reset()),
        Step::SaveAndRestore => check_save(board),
    }
}

fn check_save(board: &Board) {
    for (unit, other) in board.units.iter().zip(Board::default().units) {
        let saved = unit.save().expect("it can be saved");
        other.restore(&saved).expect("its own save is accepted");
        assert_eq!(other.save().expect("it can be saved"), saved);
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let board = Board::default();
    steps.iter().for_each(|step| play(&board, step));
    check_save(&board);
});
