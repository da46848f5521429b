//! Runs a guest with a seccomp filter on each thread of its VM: a call that is not published ends the process.
//!
//! ```text
//! cargo run --example seccomp -- KERNEL INITRD DISK TAP
//! ```
//! The guest needs drivers for virtio disks, network cards and memory.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};
use vm_lifecycle::config::{DiskSpec, NicSpec, VmConfig};
use vm_lifecycle::vm::Vm;
use vm_lifecycle::vm::host::{HostDevices, KvmPlatform};
use vm_lifecycle::vm::memory::ResizeOptions;
use vm_lifecycle::vm::operation::{Ended, Operation};
use vm_lifecycle::vm::thread_role::ThreadRole;

const WITHIN: Duration = Duration::from_secs(300);

struct Filtered;

impl HostDevices for Filtered {
    fn thread_started(&self, role: ThreadRole) {
        // No thread goes on without its filter.
        if let Err(error) = filter(role) {
            eprintln!("no filter for the {role:?}: {error}");
            std::process::abort();
        }
    }
}

fn filter(role: ThreadRole) -> Result<(), Box<dyn Error>> {
    let rules = role.syscalls().into_iter().map(|number| (number, Vec::new()));
    let (others, listed) = (SeccompAction::KillProcess, SeccompAction::Allow);
    let filter = SeccompFilter::new(rules.collect(), others, listed, TargetArch::x86_64)?;
    let program: BpfProgram = filter.try_into()?;
    Ok(apply_filter(&program)?)
}

fn done<O: Ended>(operation: &Operation<O>) -> Result<(), Box<dyn Error>> {
    match operation.wait(WITHIN) {
        Some(outcome) if outcome.is_done() => Ok(()),
        Some(outcome) => Err(outcome.to_string().into()),
        None => Err("an operation goes on for ever".into()),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let [kernel, initrd, disk, tap] = &words[..] else {
        return Err("usage: seccomp KERNEL INITRD DISK TAP".into());
    };
    let config = VmConfig::builder("filtered", kernel)
        .initrd(initrd)
        .cmdline("console=ttyS0 quiet panic=-1 memhp_default_state=online_movable")
        .maximum_bytes(1 << 30)
        .disk(DiskSpec::new("data", disk))
        .build()?;
    let vm = Vm::new(config, Arc::new(KvmPlatform::new(Filtered)))?;
    done(&vm.start()?)?;
    let options = ResizeOptions {
        within: WITHIN,
        ..ResizeOptions::default()
    };
    done(&vm.resize_memory(1 << 30, options)?)?;
    let (card, added) = vm.add_nic(NicSpec::new("Fred", tap), WITHIN)?;
    done(&added)?;
    done(&vm.remove_nic(&card.config.name, WITHIN)?)?;
    done(&vm.pause()?)?;
    done(&vm.resume()?)?;
    done(&vm.reset()?)?;

    // The main thread alone has none (proc(5): `Seccomp: 0`).
    let tasks = std::fs::read_dir("/proc/self/task")?.flatten();
    let status = tasks.flat_map(|task| std::fs::read_to_string(task.path().join("status")));
    let (free, filtered): (Vec<_>, Vec<_>) = status.partition(|text| text.contains("\nSeccomp:\t0"));
    assert!(free.len() == 1 && filtered.len() > 2, "{free:?}");
    done(&vm.power_off()?)?;
    println!("a guest ran, and its VM called for nothing that it had not published");
    Ok(())
}
