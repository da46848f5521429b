//! Guest memory: where it lies in the guest's address space and what it costs the host.
//!
//! [`layout`] is the address map, [`region`] the RAM itself; the file behind it decides what a page costs. What a VM
//! does to its memory at run time is the devices' (`virtio`) and the VM's.

mod file;
pub mod layout;
pub mod region;
