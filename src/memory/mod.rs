//! Guest memory: where it lies in the guest's address space and what it costs the host.
//!
//! [`layout`] is the address map, [`region`] the RAM that is there from power-on, [`runtime`] what comes and goes while
//! the guest runs; the files behind both decide what a page costs. [`host`] tells how much the host can still promise.
//! Who gets how much is the VM's decision.

mod file;
pub mod host;
pub mod layout;
pub mod region;
pub mod runtime;
