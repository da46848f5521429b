//! The device status field and the order in which a driver sets its bits (virtio 1.2 §2.1, §3.1.1).
//!
//! ```text
//! 0 ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► DRIVER_OK        writing 0 resets from anywhere
//! ```
//! A pure table: [`next`] tells what a write means; the transport does it.

/// The guest has noticed the device.
pub const ACKNOWLEDGE: u8 = 1;
/// The guest knows how to drive the device.
pub const DRIVER: u8 = 2;
/// The driver is set up and ready.
pub const DRIVER_OK: u8 = 4;
/// Feature negotiation is complete.
pub const FEATURES_OK: u8 = 8;
/// The device cannot go on before a reset; set by the device only.
pub const DEVICE_NEEDS_RESET: u8 = 64;
/// The guest has given up on the device.
pub const FAILED: u8 = 128;

/// What a write to the status field means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatusChange {
    /// The driver resets the device.
    Reset,
    /// The field becomes `status`, but for what is refused below.
    Set {
        /// The new value.
        status: u8,
        /// `FEATURES_OK` is new: it stays only if the features can work.
        check_features: bool,
        /// `DRIVER_OK` is new: the device is to be activated.
        activate: bool,
    },
    /// The driver broke the order; the field stays as it was.
    Refused(&'static str),
}

/// What it means that the driver writes `written` while the field is `current`.
pub const fn next(current: u8, written: u8) -> StatusChange {
    if written == 0 {
        return StatusChange::Reset;
    }
    let kept = current & DEVICE_NEEDS_RESET;
    let status = written & !DEVICE_NEEDS_RESET;
    let known = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
    if status & !known != 0 {
        return StatusChange::Refused("a reserved bit is set");
    }
    if current & !DEVICE_NEEDS_RESET & !status != 0 {
        return StatusChange::Refused("a bit is cleared without a reset");
    }
    let driver_without_acknowledge = status & DRIVER != 0 && status & ACKNOWLEDGE == 0;
    let features_without_driver = status & FEATURES_OK != 0 && status & DRIVER == 0;
    let ready_without_features = status & DRIVER_OK != 0 && status & FEATURES_OK == 0;
    if driver_without_acknowledge || features_without_driver || ready_without_features {
        return StatusChange::Refused("a bit is set before the one it builds on");
    }
    if status & DRIVER_OK != 0 && current & (DRIVER_OK | FAILED) == FAILED {
        return StatusChange::Refused("the driver has given up on the device");
    }
    StatusChange::Set {
        status: status | kept,
        check_features: status & !current & FEATURES_OK != 0,
        activate: status & !current & DRIVER_OK != 0 && kept == 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_the_specification_is_followed_step_by_step() {
        let steps = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];
        let mut current = 0;
        for step in steps {
            let status = current | step;
            let expected = StatusChange::Set {
                status,
                check_features: step == FEATURES_OK,
                activate: step == DRIVER_OK,
            };
            assert_eq!(next(current, status), expected);
            current = status;
        }
        assert_eq!(next(current, 0), StatusChange::Reset);
    }

    #[test]
    fn over_the_whole_domain_no_write_clears_a_bit_skips_a_step_or_activates_twice() {
        for current in 0..=u8::MAX {
            for written in 0..=u8::MAX {
                let StatusChange::Set {
                    status,
                    check_features,
                    activate,
                } = next(current, written)
                else {
                    continue;
                };
                assert_eq!(current & !status, 0, "{current:#x} {written:#x}: a bit went");
                assert_eq!(
                    status & DEVICE_NEEDS_RESET,
                    current & DEVICE_NEEDS_RESET,
                    "{current:#x} {written:#x}: the bit is the device's"
                );
                let order = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];
                for pair in order.windows(2) {
                    assert!(
                        status & pair[1] == 0 || status & pair[0] != 0,
                        "{status:#x}: a step is missing"
                    );
                }
                assert!(
                    !activate || (status & !current & DRIVER_OK != 0 && status & DEVICE_NEEDS_RESET == 0)
                );
                assert_eq!(check_features, status & !current & FEATURES_OK != 0);
            }
        }
    }

    #[test]
    fn a_refusal_says_what_was_wrong() {
        assert_eq!(
            next(3, 1),
            StatusChange::Refused("a bit is cleared without a reset")
        );
        assert_eq!(
            next(1, 1 | 8),
            StatusChange::Refused("a bit is set before the one it builds on")
        );
        assert_eq!(next(0, 16), StatusChange::Refused("a reserved bit is set"));
        assert_eq!(
            next(FAILED | 11, FAILED | 15),
            StatusChange::Refused("the driver has given up on the device")
        );
    }
}
