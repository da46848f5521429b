//! The keyboard controller (i8042), as far as a machine without a keyboard needs it: the command that resets.
//!
//! Only the command port 0x64 is answered. The status register always shows a full output buffer and an empty input
//! buffer: a kernel that looks for a keyboard reads the buffer a few times, sees that it never empties and concludes
//! that there is no controller, while one that wants to reset finds the command port ready at once. The ACPI tables
//! do not announce a controller, so most kernels never look.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::unit::{PowerListener, PowerRequest};

/// Status bit 0, OBF: the output buffer holds a byte.
const STATUS_OUTPUT_FULL: u8 = 1 << 0;
/// Pulses output line 0, which is wired to the processor's reset.
const COMMAND_PULSE_RESET: u8 = 0xFE;

/// The command port of a keyboard controller. Claim one port at `layout::I8042_COMMAND_PORT` for it.
pub struct I8042 {
    power: Arc<dyn PowerListener>,
}

impl I8042 {
    /// Makes a controller that tells `power` when the guest asks for a reset.
    pub fn new(power: Arc<dyn PowerListener>) -> Self {
        Self { power }
    }
}

impl BusDevice for I8042 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        if let [byte] = data {
            *byte = STATUS_OUTPUT_FULL;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data == [COMMAND_PULSE_RESET] {
            self.power.power_request(PowerRequest::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Requests(Mutex<Vec<PowerRequest>>);

    impl PowerListener for Requests {
        fn power_request(&self, request: PowerRequest) {
            self.0.lock().expect("no panic while locked").push(request);
        }
    }

    #[test]
    fn only_the_reset_command_resets() {
        let requests = Arc::new(Requests::default());
        let controller = I8042::new(requests.clone());
        for command in 0..=0xFF {
            controller.write(0, &[command]);
        }
        controller.write(0, &[0xFE, 0xFE]);
        let seen = requests.0.lock().expect("no panic while locked").clone();
        assert_eq!(seen, [PowerRequest::Reset]);
    }

    #[test]
    fn status_accepts_commands_and_never_runs_out_of_output() {
        let controller = I8042::new(Arc::new(Requests::default()));
        for _ in 0..100 {
            let mut status = [0xFF];
            controller.read(0, &mut status);
            assert_eq!(status[0] & 0b11, 0b01);
        }
    }
}
