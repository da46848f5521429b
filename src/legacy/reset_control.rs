//! The reset control register at port 0xCF9 (Intel ICH): the way to reset that needs neither ACPI nor a keyboard
//! controller.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::unit::{PowerListener, PowerRequest};

/// Bit 2, RST_CPU: resets when it becomes set.
const RST_CPU: u8 = 1 << 2;

/// The reset control register. Claim one port at `layout::RESET_CONTROL_PORT` for it. It reads as zero: the kind of reset a driver selects first (bits 1 and 3) makes no
/// difference to a virtual machine, so it is not kept.
pub struct ResetControl {
    power: Arc<dyn PowerListener>,
}

impl ResetControl {
    /// Makes a register that tells `power` when the guest asks for a reset.
    pub fn new(power: Arc<dyn PowerListener>) -> Self {
        Self { power }
    }
}

impl BusDevice for ResetControl {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        if let [byte] = data {
            *byte = 0;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if matches!(data, [value] if value & RST_CPU != 0) {
            self.power.power_request(PowerRequest::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[derive(Default)]
    struct Count(AtomicU32);

    impl PowerListener for Count {
        fn power_request(&self, request: PowerRequest) {
            assert_eq!(request, PowerRequest::Reset);
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn the_second_of_the_two_usual_writes_resets() {
        let count = Arc::new(Count::default());
        let register = ResetControl::new(count.clone());
        register.write(0, &[0x02]);
        assert_eq!(count.0.load(Ordering::SeqCst), 0);
        register.write(0, &[0x06]);
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
    }
}
