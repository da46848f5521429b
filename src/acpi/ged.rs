//! The Generic Event Device: pending events and the interrupt that announces them (ACPI 6.5 §5.6.9).
//!
//! Whoever has news for the guest raises an event: its bit is set in the select register, and the line is held active
//! for as long as a bit is set. The guest's `_EVT` reads the register once, which clears it, and notifies one device
//! per bit. The line is a level, so that a guest which does not listen yet, early in its boot, hears of what is pending
//! when it does.

use std::sync::{Mutex, MutexGuard, PoisonError};

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
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    pending: u32,
    paused: bool,
}

impl Ged {
    /// Makes a device without pending events that interrupts through `line`.
    pub fn new(line: IrqLine) -> Self {
        Self {
            line,
            state: Mutex::default(),
        }
    }

    /// Tells the guest of `event`, or does so when the device is resumed.
    pub fn raise(&self, event: GedEvent) {
        self.change(|state| state.pending |= event.bit());
    }

    /// The events that the guest has not read yet.
    pub fn pending(&self) -> u32 {
        self.lock().pending
    }

    /// The guest reads the select register: tells the pending events and clears them.
    pub fn take_pending(&self) -> u32 {
        self.change(|state| std::mem::take(&mut state.pending))
    }

    /// Replaces the pending events, for reset and restore of a paused device.
    pub fn set_pending(&self, pending: u32) {
        self.change(|state| state.pending = pending);
    }

    /// Keeps the line quiet from now on; events are only collected.
    pub fn pause(&self) {
        self.change(|state| state.paused = true);
    }

    /// Announces what is pending, which may be a second time; an event told twice is read once.
    pub fn resume(&self) {
        self.change(|state| state.paused = false);
    }

    /// Changes the state and lets the line follow before anybody else can.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let before = state.is_active();
        let result = change(&mut state);
        if state.is_active() != before {
            self.line.hold(state.is_active());
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_active(&self) -> bool {
        !self.paused && self.pending != 0
    }
}
