//! The PCI transport (virtio 1.2 §4.1): configuration structures, notification, interrupts, status.
//!
//! ```text
//! vCPU ── ECAM ──► VirtioPciDevice ─┐          ┌─ Core        registers, pausing, the VirtioDevice
//!      ── BAR 0 ─► BarWindow ───────┼► Shared ─┼─ Function    configuration space, BAR, ioeventfds
//!      ── ioeventfd ─► Handler ─────┘          └─ Interrupts  MSI-X, ISR, generation
//! ```
//! | file | what |
//! |---|---|
//! | `layout` | what lies where in BAR 0, and the capabilities that say so |
//! | `common_config`, `queue_setup` | the registers, and from them to a ring |
//! | `interrupts` | vectors, ISR status, generation |
//! | `function` | configuration space, BAR and ioeventfds, kept in step |
//! | `device` | the device as its owner holds it: how it is made and how it ends |
//! | `shared` | the locks, and how accesses to BAR 0 reach the parts |
//! | `runtime` | activation, kicks, faults, reset, pausing |
//! | `gone` | what stands in for a device that was taken away |
//! | `unit`, `saved` | the unit's verbs and its saved form |

mod common_config;
mod device;
mod function;
mod gone;
mod interrupts;
mod layout;
mod queue_setup;
mod runtime;
pub mod saved;
mod shared;
mod unit;

#[cfg(test)]
mod tests;

pub use device::{TransportError, TransportResources, VirtioPciDevice};
pub use shared::Driver;
