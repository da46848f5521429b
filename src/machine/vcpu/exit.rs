//! What is done when a vCPU leaves the guest: accesses go to the buses, everything else ends the vCPU's run.
//!
//! Called on the vCPU's thread, between two entries into the guest (KVM API 5). Ports, addresses, lengths and data are
//! the guest's; nothing here may panic, block or log without limit because of them.

use kvm_ioctls::VcpuExit;

use super::run_page::RunPage;
use super::{Buses, VcpuExitReason};
use crate::guest_log::GuestLog;

/// Handles one exit. Returns why the vCPU cannot go on, or `None` when it can.
pub(super) fn handle(
    exit: VcpuExit<'_>,
    buses: &Buses,
    page: &RunPage,
    log: &GuestLog,
) -> Option<VcpuExitReason> {
    match exit {
        // A string instruction brings many elements at once; to the device each is an access of its own. Nobody is
        // told of a port without a device: kernels probe for devices in this way.
        VcpuExit::IoOut(port, data) => {
            for element in data.chunks(page.pio_size_bytes()) {
                buses.pio.write(u64::from(port), element);
            }
        }
        VcpuExit::IoIn(port, data) => {
            for element in data.chunks_mut(page.pio_size_bytes()) {
                buses.pio.read(u64::from(port), element);
            }
        }
        VcpuExit::MmioRead(address, data) => {
            if !buses.mmio.read(address, data) {
                log.warn(format_args!(
                    "read of {} bytes at {address:#x}, where nothing is",
                    data.len()
                ));
            }
        }
        VcpuExit::MmioWrite(address, data) => {
            if !buses.mmio.write(address, data) {
                log.warn(format_args!(
                    "write of {} bytes at {address:#x}, where nothing is",
                    data.len()
                ));
            }
        }
        VcpuExit::Intr => {}
        VcpuExit::Shutdown => return Some(VcpuExitReason::Shutdown),
        VcpuExit::SystemEvent(kind, _) => return Some(VcpuExitReason::SystemEvent { kind }),
        VcpuExit::Hlt => return Some(VcpuExitReason::Halted),
        VcpuExit::InternalError => {
            let suberror = page.internal_suberror();
            return Some(VcpuExitReason::InternalError { suberror });
        }
        VcpuExit::FailEntry(reason, _) => return Some(VcpuExitReason::FailEntry { reason }),
        VcpuExit::MemoryFault { gpa, .. } => return Some(VcpuExitReason::MemoryFault { address: gpa }),
        other => {
            return Some(VcpuExitReason::Unsupported {
                exit: format!("{other:?}"),
            });
        }
    }
    None
}
