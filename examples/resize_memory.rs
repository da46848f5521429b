//! Gives a running guest more memory and takes it away again: `resize_memory KERNEL INITRD [CMDLINE]`.
//!
//! The guest needs the drivers virtio_mem and virtio_balloon, and `memhp_default_state=online_movable` on its command
//! line so that it uses what it is given. Every step checks its own claim.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use vm_lifecycle::config::VmConfig;
use vm_lifecycle::vm::Vm;
use vm_lifecycle::vm::host::{DefaultHost, KvmPlatform};
use vm_lifecycle::vm::memory::ResizeOptions;
use vm_lifecycle::vm::operation::Ended;

const MIB: u64 = 1 << 20;
const CMDLINE: &str = "console=ttyS0 quiet memhp_default_state=online_movable";
/// A guest boots, loads its drivers and obeys in this time.
const WITHIN: Duration = Duration::from_secs(120);

fn main() -> Result<(), Box<dyn Error>> {
    let mut words = std::env::args().skip(1);
    let (kernel, initrd) = words
        .next()
        .zip(words.next())
        .ok_or("KERNEL and INITRD are missing")?;
    let config = VmConfig::builder("elastic", std::path::absolute(kernel)?)
        .initrd(std::path::absolute(initrd)?)
        .cmdline(words.next().unwrap_or_else(|| CMDLINE.to_owned()))
        .startup_bytes(512 * MIB)
        .maximum_bytes(2048 * MIB)
        .build()?;
    let vm = Vm::new(config, Arc::new(KvmPlatform::new(DefaultHost)))?;
    let started = vm.start()?.wait(WITHIN).ok_or("it does not start")?;
    assert!(started.is_done(), "{started}");

    let options = ResizeOptions {
        within: WITHIN,
        ..ResizeOptions::default()
    };
    for target in [1024 * MIB, 384 * MIB, 512 * MIB] {
        let outcome = vm
            .resize_memory(target, options)?
            .wait(WITHIN * 2)
            .ok_or("it does not end")?;
        assert!(outcome.is_done(), "{outcome}");
        assert_eq!(outcome.reached_bytes, target);
        let memory = vm.memory()?;
        println!(
            "assigned {} MiB; the guest says {:?} MiB; the host spends {} MiB",
            memory.assigned_bytes / MIB,
            memory.guest_total_bytes.map(|bytes| bytes / MIB),
            memory.resident_bytes / MIB
        );
    }
    let refused = vm
        .resize_memory(96 * MIB, options)
        .expect_err("no guest can live in 96 MiB");
    println!("{refused}");
    Ok(())
}
