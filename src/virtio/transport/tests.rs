//! The transport as a driver meets it: through configuration space and BAR 0, with a small device behind it.
//!
//! `rig` is the machine and the driver, `fake_device` what the transport calls; the others are sorted by promise:
//! what a driver finds (`probe`), how a device lives and ends (`lifecycle`), what a bad driver gets (`hostile`).

mod fake_device;
mod hostile;
mod lifecycle;
mod probe;
mod rig;
