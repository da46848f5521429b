//! What the fuzz targets share: a driver with rings of its own, a machine with PCI, and damage to saved states.
//!
//! | module | what |
//! |---|---|
//! | `board` | the devices at fixed ports and addresses |
//! | `disk` | a disk that is full, fails, and answers out of order |
//! | `driver` | rings laid out by the input, for a virtio device without a transport |
//! | `machine` | the bus, PCI and event loop of a VM over a host that only keeps books |
//! | `memory` | the host of the devices that resize memory, which checks what it is asked |
//! | `edits` | changes to a JSON value at places that the input chooses |
//!
//! A target describes what the guest or the file may do as a type that is built from the input's bytes, does it, and
//! checks what must hold afterwards. Everything is made anew for every input, so that a finding can be repeated.

#![forbid(unsafe_code)]

pub mod board;
pub mod disk;
pub mod driver;
pub mod edits;
pub mod machine;
pub mod memory;

use arbitrary::Arbitrary;
use vm_lifecycle::acpi::pci_hotplug::registers::SlotListener;
use vm_lifecycle::bus::Bus;
use vm_lifecycle::event_loop::LoopListener;
use vm_lifecycle::ids::{Bdf, UnitName};
use vm_lifecycle::unit::{PowerListener, PowerRequest, UnitListener};

/// A guest's access to a bus.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct Access {
    length: u8,
    /// Nothing is a read.
    value: Option<u64>,
}

impl Access {
    /// Does it at `address`.
    pub fn at(&self, bus: &Bus, address: u64) {
        // Half of them bytes, as most registers want; the rest any length that a bus can be asked for.
        let length = if self.length < 128 {
            1
        } else {
            1 + usize::from(self.length % 8)
        };
        match self.value {
            Some(value) => bus.write(address, &value.to_le_bytes()[..length]),
            None => bus.read(address, &mut [0; 8][..length]),
        };
    }
}

/// Listens to nothing.
#[derive(Debug, Clone, Copy)]
pub struct Deaf;

impl UnitListener for Deaf {
    fn driver_ready(&self, _unit: &UnitName, _ready: bool) {}

    fn needs_reset(&self, _unit: &UnitName, _reason: &str) {}
}

impl LoopListener for Deaf {
    fn loop_started(&self) {}

    /// A panic has ended the fuzzer before.
    fn loop_failed(&self, _words: &str) {}
}

impl PowerListener for Deaf {
    fn power_request(&self, _request: PowerRequest) {}
}

impl SlotListener for Deaf {
    fn ejected(&self, _bdf: Bdf, _asked: bool) {}
}
