//! The sleep and reset registers of a hardware-reduced platform (ACPI 6.5 §4.8.3.6 and §4.8.3.7).
//!
//! The values come from the guest: everything that is not exactly a power-off or a reset is ignored. Both registers
//! hold nothing: `SLP_EN` reads as zero, and a guest that never sleeps never finds a wake status.

use crate::memory::layout::RESET_VALUE;
use crate::unit::PowerRequest;

/// The sleep type that switches off; the guest learns it from `\_S5`.
pub const SLP_TYP_S5: u8 = 5;
/// `SLP_TYPx`, bits 4:2 of the sleep control register (ACPI 6.5 table 4.22).
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 0b111 << SLP_TYP_SHIFT;
/// `SLP_EN`, bit 5 of the sleep control register.
const SLP_EN: u8 = 1 << 5;

/// What a guest's write to the sleep control register asks for.
pub fn sleep_control(value: u8) -> Option<PowerRequest> {
    let sleep_type = (value & SLP_TYP_MASK) >> SLP_TYP_SHIFT;
    (value & SLP_EN != 0 && sleep_type == SLP_TYP_S5).then_some(PowerRequest::PowerOff)
}

/// What a guest's write to the reset register asks for.
pub fn reset(value: u8) -> Option<PowerRequest> {
    (value == RESET_VALUE).then_some(PowerRequest::Reset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_the_written_values_switch_off_or_reset() {
        for value in 0..=u8::MAX {
            // 0x34 is SLP_EN with type 5; the bits outside both fields are reserved and ignored.
            let off = (value & 0x3C == 0x34).then_some(PowerRequest::PowerOff);
            assert_eq!(sleep_control(value), off, "sleep control {value:#x}");
            let reset_expected = (value == 0x42).then_some(PowerRequest::Reset);
            assert_eq!(reset(value), reset_expected, "reset {value:#x}");
        }
    }
}
