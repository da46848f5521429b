//! Guest memory: where it lies in the guest's address space and what it costs the host.

pub mod layout;
pub mod region;
