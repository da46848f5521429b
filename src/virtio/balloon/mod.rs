//! virtio-balloon (virtio 1.2 §5.5): the guest gives pages of its start-up RAM back, and tells what it has.
//!
//! ```text
//! host ── set_target ──▶ configuration ── interrupt ──▶ driver
//! driver ── inflate: page numbers ──▶ pages ── BalloonHost::discard ──▶ host, and only then the chain comes back
//! ```
//! What counts as ballooned is what was discarded, not what the driver claims: one bit per page.
//!
//! | file | |
//! |---|---|
//! | `device` | configuration, activation, the host's calls |
//! | `serve` | what each queue is for, done chain by chain |
//! | `queues` | which queue is which, and taking chains from them |
//! | `pages` | which pages of the RAM are in the balloon |
//! | `hinting` | rounds of free page hints |
//! | `stats` | the guest's statistics |
//! | `host` | what the device asks of and tells the VM |
//! | `saved` | the frozen saved form |

mod device;
#[cfg(test)]
mod hint_tests;
mod hinting;
mod host;
mod pages;
mod queues;
mod saved;
mod serve;
mod stats;

pub use device::{Balloon, BalloonConfig, BalloonError, PAGE_BYTES, TargetError};
pub use host::BalloonHost;
pub use serve::PAGES_PER_CHAIN_MAX;
pub use stats::BalloonStats;

#[cfg(test)]
mod tests;
