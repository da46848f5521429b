//! PCI hot-plug by ACPI: the registers on the host's side and the AML that reads them in the guest.
//!
//! ```text
//! host                       registers                     guest's AML
//! insert, announce ────► changed bits, GED event ────► _EVT → HPSC → Notify (slot, 1)    looks at the slot
//! request_eject    ────► eject bits,   GED event ────► _EVT → HPSC → Notify (slot, 3)    lets go of the device
//! listener         ◄──── eject register          ◄──── slot's _EJ0                       has let go of it
//! offer            ────► changed bits, GED event ────► as for a new device                looks again
//! tell_taken       ────► eject bits,   GED event ────► the same for what was taken by force, and is kept until then
//! insert, rename   ────► index and label         ────► slot's _DSM, function 7           reads the device's name
//! ```
//! A slot's `_STA` tells what was present when the guest was told last (`docs/decisions/0009-slot-status.md`).

pub mod registers;
mod remnant;
mod state;
mod unit;

#[cfg(test)]
mod tests;
