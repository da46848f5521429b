//! What tests, benchmarks and the demo need around the VMs they start: kernels and images, a way to ask the guest, taps,
//! counters of what a process spends.
//!
//! Nothing here knows the crate under test, so that a guest's answer never depends on what it is asked about. Include it
//! with `#[path = "../harness/mod.rs"] mod harness;`.

// Every program that includes this uses a part of it.
#![allow(dead_code)]

pub mod artefacts;
pub mod base64;
pub mod guest_shell;
pub mod kvm;
pub mod qemu;
pub mod resources;
pub mod tap;
pub mod wait;
