//! The transport as a driver meets it: through configuration space and BAR 0, with a small device behind it.

mod fake_device;
mod hostile;
mod lifecycle;
mod probe;
mod rig;
