//! What the memory device asks of the VM, and how the VM refuses.
//!
//! The VM implements [`MemHost`]; the device calls it on the device event loop, and on the thread that resets or
//! restores the VM. The device is locked meanwhile, so an implementation must not call the device back.

use std::io;

/// The host's side of the region. Offsets are in bytes from the start of the region; offsets and lengths are
/// multiples of the block size and lie in the region.
pub trait MemHost: Send + Sync {
    /// Gives the guest the blocks of this range, all of them unplugged so far; on return it can use them. Their
    /// content is undefined.
    ///
    /// # Errors
    /// [`PlugError`] when the host cannot do that now. The range is then as it was, and the driver will ask again.
    fn plug(&self, offset: u64, length_bytes: u64) -> Result<(), PlugError>;

    /// Takes from the guest the blocks of this range, plugged or not; on return it cannot reach them and the host has
    /// their memory back.
    ///
    /// # Errors
    /// [`PlugError`] when the host cannot do that now. The blocks count as plugged still, and the driver will ask
    /// again; their content may be lost, as the driver gave them up.
    fn unplug(&self, offset: u64, length_bytes: u64) -> Result<(), PlugError>;

    /// What is plugged may have changed, by the guest, a reset or a restore: it is `plugged_bytes` now. Never blocks.
    fn changed(&self, plugged_bytes: u64);
}

/// Why the host does not plug or unplug blocks now. The driver is told that it is busy.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// Something of which there is a limited number or amount is used up.
    #[error("{what} are used up, the limit is {limit}")]
    Exhausted {
        /// What, in the plural, such as `memslots`.
        what: &'static str,
        /// How much there is of it.
        limit: u64,
    },
    /// The host refused a step.
    #[error("the host refused {what}")]
    Host {
        /// The step.
        what: &'static str,
        /// The host's error.
        #[source]
        source: io::Error,
    },
}
