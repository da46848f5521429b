//! What the supervisor does, one file per noun. Each function is called on the supervisor's thread and never blocks.

pub(super) mod power;

use crate::ids::{Bdf, OperationId};
use crate::vm::supervisor::Supervisor;

/// The operation `id`, which goes on beside others, has had its time.
pub(super) fn deadline_passed(_vm: &mut Supervisor, _id: OperationId) {}

/// The guest has let go of the device at `bdf`: what it holds on the host is given back.
pub(super) fn ejected(vm: &mut Supervisor, bdf: Bdf) {
    let nic = vm.config.nics().iter().find(|nic| nic.bdf == bdf);
    if let (Some(nic), Some(machine)) = (nic, vm.machine.clone()) {
        let unit = nic.unit_name();
        vm.work("vm-eject", move || machine.remove_device(&unit), |_, _| {});
    }
}
