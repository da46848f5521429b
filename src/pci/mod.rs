//! PCI as the guest sees it: configuration space, BARs, capabilities, MSI-X, host bridges and slots.
//!
//! ```text
//! ECAM of segment n ── PciSegment ── slot 0: HostBridge in segment 0, empty in the others
//!                          │         slot 1…31: Arc<dyn PciDevice>, one function each
//!                          └ Slots: empty → reserved → occupied, held by guards
//! ```
//! Nothing here knows what kind of device sits in a slot. A device is made of the parts in this folder: its
//! [`config_space::ConfigSpace`], one [`bar::MemoryBar`] and its [`msix::Msix`] vectors.

pub mod bar;
pub mod capability;
pub mod config_space;
pub mod device;
pub mod host_bridge;
pub mod msix;
pub mod root;
pub mod saved;
pub mod slots;
