//! The Generic Event Device: pending events and the interrupt that announces them (ACPI 6.5 §5.6.9).
//!
//! Whoever has news for the guest raises an event: its bit is set in the select register, then the line is triggered.
//! The guest's `_EVT` reads the register once, which clears it, and notifies one device per bit. Bits that are raised
//! before the guest reads are told together; one raised after the read triggers the line again, so none is lost.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::machine::gsi::IrqLine;

/// An event the guest can be told. Its value is its bit in the select register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum GedEvent {
    /// The power button was pressed.
    PowerButton = 1 << 0,
    /// Something changed in a PCI slot, or shall; the hot-plug registers tell what.
    PciHotplug = 1 << 1,
}

impl GedEvent {
    /// The bits of all events.
    pub const ALL_BITS: u32 = Self::PowerButton.bit() | Self::PciHotplug.bit();

    /// The event's bit in the select register.
    pub const fn bit(self) -> u32 {
        self as u32
    }
}

/// The device's state. Every method may be called from any thread and never blocks.
pub struct Ged {
    line: IrqLine,
    pending: AtomicU32,
    paused: AtomicBool,
}

impl Ged {
    /// Makes a device without pending events that interrupts through `line`.
    pub fn new(line: IrqLine) -> Self {
        Self {
            line,
            pending: AtomicU32::new(0),
            paused: AtomicBool::new(false),
        }
    }

    /// Tells the guest of `event`, or does so when the device is resumed.
    pub fn raise(&self, event: GedEvent) {
        self.pending.fetch_or(event.bit(), Ordering::SeqCst);
        self.announce();
    }

    /// The events that the guest has not read yet.
    pub fn pending(&self) -> u32 {
        self.pending.load(Ordering::SeqCst)
    }

    /// The guest reads the select register: tells the pending events and clears them.
    pub fn take_pending(&self) -> u32 {
        self.pending.swap(0, Ordering::SeqCst)
    }

    /// Replaces the pending events, for reset and restore. Triggers nothing.
    pub fn set_pending(&self, pending: u32) {
        self.pending.store(pending, Ordering::SeqCst);
    }

    /// Keeps the line quiet from now on; events are only collected.
    pub fn pause(&self) {
        self.paused.store(true, Ordering::SeqCst);
    }

    /// Announces what is pending, which after a restore may be a second time; an event told twice is read once.
    pub fn resume(&self) {
        self.paused.store(false, Ordering::SeqCst);
        self.announce();
    }

    fn announce(&self) {
        if !self.paused.load(Ordering::SeqCst) && self.pending() != 0 {
            self.line.trigger();
        }
    }
}
