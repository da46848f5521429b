//! The frozen saved forms of the serial port and the CMOS clock. What is read here is untrusted.

use serde::{Deserialize, Serialize};
use vm_superio::SerialState;

use super::calendar::TIME_REGISTER_COUNT;
use super::rtc::{NVRAM_BYTES, RtcState};
use super::serial::{FIFO_BYTES, INPUT_PENDING_BYTES_MAX};
use crate::unit::RestoreError;

/// The schema of [`SerialV1`].
pub(super) const SERIAL_SCHEMA: u32 = 1;
/// The schema of [`RtcV1`].
pub(super) const RTC_SCHEMA: u32 = 1;

/// Line status: data ready.
const LSR_DATA_READY: u8 = 1 << 0;
/// Line status of a port that can always send: transmitter holding register and transmitter empty.
const LSR_IDLE: u8 = 0b0110_0000;
/// Modem status of a line that is always up: CTS, DSR and DCD.
const MSR_UP: u8 = 0b1011_0000;
/// The bits of the interrupt enable register that exist.
const IER_VALID: u8 = 0b1111;
/// The values that the interrupt identification register takes: none, or any of the two that this port raises.
const IIR_VALID: [u8; 4] = [0b001, 0b010, 0b100, 0b110];

/// The serial port's registers and its unread input. Line and modem status follow from the rest.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SerialV1 {
    divisor_low: u8,
    divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    fifo: Vec<u8>,
    input_pending: Vec<u8>,
}

impl SerialV1 {
    /// The saved form of the registers `state` and of the input that did not fit into the FIFO.
    pub(super) fn new(state: SerialState, input_pending: Vec<u8>) -> Self {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status: _,
            modem_control,
            modem_status: _,
            scratch,
            in_buffer,
        } = state;
        Self {
            divisor_low: baud_divisor_low,
            divisor_high: baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            modem_control,
            scratch,
            fifo: in_buffer,
            input_pending,
        }
    }

    /// The registers and the input that does not fit into the FIFO.
    ///
    /// # Errors
    /// [`RestoreError::Value`] when no port can be in this state.
    pub(super) fn check(self) -> Result<(SerialState, Vec<u8>), RestoreError> {
        let Self {
            divisor_low,
            divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            modem_control,
            scratch,
            fifo,
            input_pending,
        } = self;
        let limits = [
            ("fifo", fifo.len(), FIFO_BYTES, "the fifo holds 64 bytes"),
            (
                "input_pending",
                input_pending.len(),
                INPUT_PENDING_BYTES_MAX,
                "the limit is 4096 bytes",
            ),
        ];
        for (field, length_bytes, max_bytes, reason) in limits {
            if length_bytes > max_bytes {
                let value = format!("{length_bytes} bytes");
                return Err(RestoreError::Value { field, value, reason });
            }
        }
        if interrupt_enable & !IER_VALID != 0 {
            let reason = "only bits 0 to 3 exist";
            return Err(register("interrupt_enable", interrupt_enable, reason));
        }
        if !IIR_VALID.contains(&interrupt_identification) {
            let reason = "the port never shows this";
            return Err(register(
                "interrupt_identification",
                interrupt_identification,
                reason,
            ));
        }
        let data_ready = if fifo.is_empty() { 0 } else { LSR_DATA_READY };
        let state = SerialState {
            baud_divisor_low: divisor_low,
            baud_divisor_high: divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status: LSR_IDLE | data_ready,
            modem_control,
            modem_status: MSR_UP,
            scratch,
            in_buffer: fifo,
        };
        Ok((state, input_pending))
    }
}

/// The clock's registers, its distance from the host's clock and its memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RtcV1 {
    index: u8,
    register_a: u8,
    offset_seconds: i64,
    /// The time registers while the guest sets them (register B SET), empty otherwise.
    time_being_set: Vec<u8>,
    alarm: [u8; 3],
    /// The 114 bytes from index 0x0E on.
    nvram: Vec<u8>,
}

impl From<RtcState> for RtcV1 {
    fn from(state: RtcState) -> Self {
        let RtcState {
            index,
            register_a,
            offset_seconds,
            time_being_set,
            alarm,
            nvram,
        } = state;
        Self {
            index,
            register_a,
            offset_seconds,
            time_being_set: time_being_set.map(Vec::from).unwrap_or_default(),
            alarm,
            nvram: nvram.to_vec(),
        }
    }
}

impl TryFrom<RtcV1> for RtcState {
    type Error = RestoreError;

    fn try_from(saved: RtcV1) -> Result<Self, RestoreError> {
        let RtcV1 {
            index,
            register_a,
            offset_seconds,
            time_being_set,
            alarm,
            nvram,
        } = saved;
        if index > 0x7F {
            return Err(register("index", index, "the clock has 128 registers"));
        }
        if register_a > 0x7F {
            return Err(register("register_a", register_a, "bit 7 is read-only"));
        }
        let time_being_set = match time_being_set.len() {
            0 => None,
            _ => Some(exact::<TIME_REGISTER_COUNT>(
                "time_being_set",
                &time_being_set,
                "expected 0 or 8",
            )?),
        };
        Ok(Self {
            index,
            register_a,
            offset_seconds,
            time_being_set,
            alarm,
            nvram: exact::<NVRAM_BYTES>("nvram", &nvram, "expected 114")?,
        })
    }
}

fn register(field: &'static str, value: u8, reason: &'static str) -> RestoreError {
    RestoreError::Value {
        field,
        value: format!("{value:#04x}"),
        reason,
    }
}

fn exact<const N: usize>(
    field: &'static str,
    bytes: &[u8],
    reason: &'static str,
) -> Result<[u8; N], RestoreError> {
    bytes.try_into().map_err(|_| RestoreError::Value {
        field,
        value: format!("{} bytes", bytes.len()),
        reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::testing::same_bytes;

    #[test]
    fn the_serial_ports_schema_1_reads_and_writes_these_bytes() {
        let text = concat!(
            r#"{"divisor_low":12,"divisor_high":0,"interrupt_enable":1,"interrupt_identification":4,"line_control":3,"#,
            r#""modem_control":8,"scratch":85,"fifo":[104,105],"input_pending":[33]}"#
        );
        same_bytes::<SerialV1>(text);
    }

    #[test]
    fn the_clocks_schema_1_reads_and_writes_these_bytes() {
        let text = concat!(
            r#"{"index":10,"register_a":38,"offset_seconds":-3600,"time_being_set":[0,1,2,3,4,5,6,32],"alarm":[0,30,12],"#,
            r#""nvram":[1,2,3]}"#
        );
        same_bytes::<RtcV1>(text);
    }
}
