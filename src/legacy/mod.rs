//! The few PC devices that every kernel expects: 16550 serial port, i8042 reset, CMOS clock.
