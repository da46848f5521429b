//! Holds KVM in use for as long as the test host runs.
//!
//! The host's kernel patches its own code whenever the number of VMs, or of vCPUs with or without an in-kernel interrupt
//! controller, goes from none to one or back, and QEMU's emulation of a patched instruction can loop for ever: about one
//! hang in 45 guests. With one VM of each kind open all the time these numbers never touch zero.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::failure::{Context, Failure};

// linux/kvm.h: _IO(KVMIO, 0x01), _IO(KVMIO, 0x41), _IO(KVMIO, 0x60), KVMIO being 0xAE.
const KVM_CREATE_VM: libc::c_ulong = 0xae01;
const KVM_CREATE_VCPU: libc::c_ulong = 0xae41;
const KVM_CREATE_IRQCHIP: libc::c_ulong = 0xae60;

/// Two open VMs with a vCPU each; dropping it lets go of them.
#[derive(Debug)]
pub struct KvmKeeper {
    _open: Vec<OwnedFd>,
}

impl KvmKeeper {
    /// Opens the VMs.
    pub fn start() -> Result<Self, Failure> {
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
        let kvm = OwnedFd::from(kvm.context(|| "open /dev/kvm".to_string())?);
        let with_irqchip = descriptor(&kvm, KVM_CREATE_VM, "create a VM")?;
        ioctl(&with_irqchip, KVM_CREATE_IRQCHIP).context(|| "create an interrupt controller".to_string())?;
        let first_vcpu = descriptor(&with_irqchip, KVM_CREATE_VCPU, "create a vCPU")?;
        let without_irqchip = descriptor(&kvm, KVM_CREATE_VM, "create a second VM")?;
        let second_vcpu = descriptor(&without_irqchip, KVM_CREATE_VCPU, "create a second vCPU")?;
        Ok(KvmKeeper {
            _open: vec![first_vcpu, second_vcpu, with_irqchip, without_irqchip, kvm],
        })
    }
}

fn descriptor(on: &OwnedFd, request: libc::c_ulong, what: &str) -> Result<OwnedFd, Failure> {
    let fd = ioctl(on, request).context(|| what.to_string())?;
    // SAFETY: the two requests this is used with return a new file descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn ioctl(on: &OwnedFd, request: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: the requests above take an integer argument (machine type 0, vCPU 0, none), no pointer, so the kernel
    // reads and writes none of this process's memory; the descriptor is open for the length of the call.
    let result = unsafe { libc::ioctl(on.as_raw_fd(), request as _, 0) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
