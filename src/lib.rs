//! VM objects on Linux KVM that stay alive while their memory, network cards, storage, host and configuration change.
//!
//! | layer | modules | what it does |
//! |---|---|---|
//! | 4 | [`vm`] | decides, owns, orders |
//! | 2 | [`pci`], [`acpi`], [`legacy`], [`virtio`], [`boot`] | what the guest sees |
//! | 1 | [`machine`], [`memory`], [`bus`], [`storage`], [`net`], [`event_loop`] | what the host gives |
//! | 0 | [`ids`], [`event`], [`state`], [`mod@unit`], [`guest_log`], [`config`] | pure: no KVM, no guest memory, no threads |
//!
//! `docs/ARCHITECTURE.md` tells how they fit together.

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod config;
pub mod event;
pub mod event_loop;
pub mod guest_log;
pub mod ids;
pub mod legacy;
pub mod machine;
pub mod memory;
pub mod net;
pub mod pci;
pub mod state;
pub mod storage;
pub mod unit;
pub mod virtio;
pub mod vm;

/// Compiles the example of the read-me.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadMe;
