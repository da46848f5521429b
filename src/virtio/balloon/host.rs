//! What the balloon asks of the VM and tells it.
//!
//! The VM implements [`BalloonHost`]; the device calls it on the device event loop, and when the device is reset, on
//! the thread that does that. The device is locked meanwhile, so an implementation must not call the device back.

use std::io;

use super::stats::BalloonStats;

/// The host's side of the balloon. Addresses are guest-physical; ranges are whole pages of 4 KiB and lie within one of
/// the ranges that the device was made with.
pub trait BalloonHost: Send + Sync {
    /// Takes the memory of this range back from the guest, which does not use it. The guest may do so again later,
    /// without another word, and then finds zeros.
    ///
    /// # Errors
    /// The host's error; the pages do not count as ballooned then, and the guest is told nothing.
    fn discard(&self, address: u64, length_bytes: u64) -> io::Result<()>;

    /// The balloon holds `ballooned_bytes` now, by the guest, a reset or a restore. Never blocks.
    fn changed(&self, ballooned_bytes: u64);

    /// The guest's statistics arrived: at driver start and after each `Balloon::request_stats`. Never blocks.
    fn stats(&self, stats: BalloonStats);

    /// In a round of hinting: the guest did not need this range when it said so. **Not to be discarded:** the guest may
    /// have written to it since. Good for those who know what was written since the round began
    /// (`Balloon::start_hinting`).
    fn hinted(&self, address: u64, length_bytes: u64);

    /// The guest has no more hints in this round, or was reset in the middle of it. Never blocks.
    fn hinting_done(&self);
}
