//! Guest memory: where it lies in the guest's address space and what it costs the host.

mod file;
pub mod layout;
pub mod region;
