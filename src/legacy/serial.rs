//! The first serial port (16550A): the guest's console, and where early kernel messages go.
//!
//! Called on vCPU threads for every byte the guest writes, and by the host with [`Serial::input`]. The registers are
//! `vm-superio`'s. Output is collected and handed to the sink's thread (`serial_output.rs`) when a line ends, when
//! [`OUTPUT_BUFFER_BYTES`] are waiting, when the guest touches a register other than data and line status (so that a
//! prompt without a newline becomes visible as soon as the driver stops sending), and at pause, reset and drop. A sink
//! that blocks or fails loses output; it never stops the guest.

use std::convert::Infallible;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use vm_superio::serial::{NoEvents, Serial as Uart};
use vm_superio::{SerialState, Trigger};

use super::saved::{SERIAL_SCHEMA, SerialV1};
use super::serial_output::{Counts, Output};
use crate::bus::BusDevice;
use crate::guest_log::GuestLog;
use crate::ids::UnitName;
use crate::machine::gsi::IrqLine;
use crate::unit::{PauseTicket, RestoreError, SaveError, Section, Unit};

/// Output is handed to the sink when this many bytes are waiting.
pub const OUTPUT_BUFFER_BYTES: usize = 256;
/// Input that the guest has not read yet, beyond the port's own FIFO, is kept up to this size.
pub const INPUT_PENDING_BYTES_MAX: usize = 4096;

/// The size of `vm-superio`'s receive FIFO.
pub(super) const FIFO_BYTES: usize = 64;
/// Receiver buffer and transmitter holding register; the divisor's low byte while LCR.DLAB is set.
const DATA_OFFSET: u64 = 0;
/// Line status register.
const LSR_OFFSET: u64 = 5;
/// One more than the last register.
const REGISTER_COUNT: u64 = 8;
/// IIR bit 0: no interrupt is pending.
const IIR_NONE: u8 = 1 << 0;

/// The serial port. Claim `layout::SERIAL_PORT_COUNT` ports at `layout::SERIAL_PORT` for it.
pub struct Serial {
    inner: Mutex<Inner>,
    log: GuestLog,
}

struct Inner {
    /// Its writer holds the output of a line that has not ended.
    uart: Uart<Line, NoEvents, Vec<u8>>,
    line: Line,
    output: Output,
    /// Input that found no room in the FIFO, oldest first.
    input_pending: Vec<u8>,
}

/// The port's interrupt.
#[derive(Clone)]
struct Line(Arc<IrqLine>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.trigger();
        Ok(())
    }
}

impl Serial {
    /// Makes a port that interrupts through `line` and writes what the guest sends to `sink`, on a thread of its own,
    /// on which `begin` is called first. The sink may block; output that it has no room for is lost.
    pub fn new(line: IrqLine, sink: Box<dyn Write + Send>, begin: impl FnOnce() + Send + 'static) -> Self {
        let line = Line(Arc::new(line));
        Self {
            inner: Mutex::new(Inner {
                uart: Uart::new(line.clone(), Vec::new()),
                line,
                output: Output::new(sink, Box::new(begin)),
                input_pending: Vec::new(),
            }),
            log: GuestLog::new("serial"),
        }
    }

    /// Types `bytes` into the port. Returns how many were taken; the rest did not fit, because the guest has
    /// [`INPUT_PENDING_BYTES_MAX`] bytes still to read, and can be offered again later.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut inner = self.lock();
        let room = INPUT_PENDING_BYTES_MAX - inner.input_pending.len();
        let taken = bytes.len().min(room);
        inner.input_pending.extend_from_slice(&bytes[..taken]);
        inner.fill_fifo();
        taken
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flush(&self, inner: &mut Inner) {
        if !inner.output.push(inner.uart.writer_mut()) {
            self.log
                .warn(format_args!("output is lost, the other end does not take it"));
        }
    }
}

impl Inner {
    /// Moves waiting input into the FIFO once the guest has emptied it.
    fn fill_fifo(&mut self) {
        if self.input_pending.is_empty() || self.uart.fifo_capacity() < FIFO_BYTES {
            return;
        }
        // A full FIFO was excluded and the interrupt cannot fail; in loop-back mode nothing is taken.
        if let Ok(taken) = self.uart.enqueue_raw_bytes(&self.input_pending) {
            self.input_pending.drain(..taken);
        }
    }

    fn line_is_complete(&self) -> bool {
        let waiting = self.uart.writer();
        waiting.len() >= OUTPUT_BUFFER_BYTES || waiting.last() == Some(&b'\n')
    }

    /// The UART's registers, made anew from `state`.
    fn replace_uart(&mut self, state: &SerialState) -> Result<(), RestoreError> {
        let uart = Uart::from_state(state, self.line.clone(), NoEvents, Vec::new());
        self.uart = uart.map_err(|error| RestoreError::Value {
            field: "in_buffer",
            value: format!("{} bytes", state.in_buffer.len()),
            reason: match error {
                vm_superio::serial::Error::FullFifo => "the fifo holds 64",
                _ => "the port refuses it",
            },
        })?;
        Ok(())
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let [byte] = data else { return };
        if offset >= REGISTER_COUNT {
            return;
        }
        let mut inner = self.lock();
        *byte = inner.uart.read(offset as u8);
        inner.fill_fifo();
        if offset != DATA_OFFSET && offset != LSR_OFFSET {
            self.flush(&mut inner);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [byte] = data else { return };
        if offset >= REGISTER_COUNT {
            return;
        }
        let mut inner = self.lock();
        // The only errors are those of the interrupt and of the writer, and neither has any.
        let _ = inner.uart.write(offset as u8, *byte);
        if offset != DATA_OFFSET || inner.line_is_complete() {
            self.flush(&mut inner);
        }
    }
}

impl Unit for Serial {
    fn name(&self) -> UnitName {
        UnitName::new("serial").expect("a short name without control characters")
    }

    fn reset(&self) {
        let mut inner = self.lock();
        self.flush(&mut inner);
        inner.input_pending.clear();
        inner.uart = Uart::new(inner.line.clone(), Vec::new());
    }

    fn pause(&self, ticket: PauseTicket) {
        self.flush(&mut self.lock());
        drop(ticket);
    }

    fn resume(&self) {
        let inner = self.lock();
        // An interrupt raised while the interrupt controllers were being restored may have been lost.
        if inner.uart.state().interrupt_identification & IIR_NONE == 0 {
            inner.line.0.trigger();
        }
    }

    fn save(&self) -> Result<Section, SaveError> {
        let mut inner = self.lock();
        self.flush(&mut inner);
        let state = SerialV1::new(inner.uart.state(), inner.input_pending.clone());
        Section::encode(SERIAL_SCHEMA, &state)
    }

    fn restore(&self, section: &Section) -> Result<(), RestoreError> {
        let (state, input_pending) = section.decode::<SerialV1>(SERIAL_SCHEMA)?.check()?;
        let mut inner = self.lock();
        inner.replace_uart(&state)?;
        inner.input_pending = input_pending;
        Ok(())
    }

    fn inspect(&self) -> Value {
        let inner = self.lock();
        let Counts {
            written_bytes,
            lost_bytes,
        } = inner.output.counts();
        json!({
            "output_bytes": written_bytes,
            "lost_bytes": lost_bytes,
            "input_pending_bytes": inner.input_pending.len() + FIFO_BYTES - inner.uart.fifo_capacity(),
        })
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        self.flush(&mut self.lock());
    }
}

#[cfg(test)]
mod tests;
