//! The few PC devices that every kernel expects: 16550 serial port, CMOS clock and the two old ways to reset.
//!
//! All of them sit on the port bus and are called on vCPU threads. The serial port and the clock hold state that the
//! guest can see and are units; the reset ports hold none.

mod calendar;
pub mod i8042;
pub mod reset_control;
pub mod rtc;
mod saved;
pub mod serial;
pub mod serial_output;
