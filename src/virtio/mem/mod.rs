//! virtio-mem (virtio 1.2 §5.15): memory above the start-up RAM that the guest plugs and unplugs at run time.
//!
//! ```text
//! host ── set_requested ──▶ configuration ── interrupt ──▶ driver
//! driver ── PLUG, UNPLUG, … ──▶ region ── MemHost::plug, unplug ──▶ host, and only then ACK ──▶ driver
//! ```
//!
//! | file | |
//! |---|---|
//! | `device` | queue, configuration, the host's calls |
//! | `region` | what is requested, usable and plugged, and what each request does to it; no rings |
//! | `blocks` | one bit per block |
//! | `request` | requests and responses in guest memory |
//! | `host` | what the device asks of the VM |
//! | `saved` | the frozen saved form |

mod blocks;
mod device;
mod host;
#[cfg(test)]
mod refusal_tests;
mod region;
mod request;
mod saved;

pub use device::Mem;
pub use host::{MemHost, PlugError};
pub use region::{BLOCK_BYTES, MemConfig, MemError, REGION_ALIGN_BYTES, REGION_BYTES_MAX, RequestedError};

#[cfg(test)]
mod tests;
