//! What the supervisor needs of a machine to change its guest's memory.

use super::plan::Plan;
use crate::memory::host::HostMemoryError;

/// The memory of a machine. No verb waits for the guest, nor for what a device does on its behalf. The machine tells of
/// every change by `Mailbox::memory_changed`; a driver that comes reads by itself what it is asked for.
pub trait MachineMemory: Send + Sync {
    /// What the guest has now.
    fn observe(&self) -> Observed;

    /// Makes the host's promise `bytes`; a larger one than before only if the host has it, unless `unchecked`.
    ///
    /// # Errors
    /// [`HostMemoryError`]; the promise is as before.
    fn promise(&self, bytes: u64, unchecked: bool) -> Result<(), HostMemoryError>;

    /// Asks the guest for what `plan` says. The same again does no harm, and reaches its driver only if it `insists`:
    /// one that was refused memory, or could not give it, tries again at once.
    fn request(&self, plan: &Plan, insists: bool);

    /// Asks the guest to tell its total; an answer raises [`Observed::told_count`]. `false`: it has no driver for it.
    fn ask_guest_total(&self) -> bool;

    /// What the guest's memory costs the host, in bytes.
    fn resident_bytes(&self) -> u64;
}

/// What a guest has at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Observed {
    /// Blocks beyond the start-up size that it has plugged, in bytes.
    pub plugged_bytes: u64,
    /// What its balloon holds, in bytes.
    pub ballooned_bytes: u64,
    /// Whether it has a driver for blocks, be it one that broke the rules.
    pub mem_driver: bool,
    /// Whether it has a driver for the balloon, be it one that broke the rules.
    pub balloon_driver: bool,
    /// The host refused what it tried to plug last, and it was not reminded since.
    pub plug_refused: bool,
    /// What it told as its total last; nothing while it has no driver for the balloon.
    pub guest_total_bytes: Option<u64>,
    /// How often it has told.
    pub told_count: u64,
}
