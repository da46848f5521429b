//! What the supervisor does, one file per noun. Each function is called on the supervisor's thread and never blocks.

pub(super) mod memory;
pub(super) mod nic;
pub(super) mod nic_add;
pub(super) mod nic_change;
pub(super) mod nic_remove;
pub(super) mod power;

use crate::ids::OperationId;
use crate::vm::supervisor::Supervisor;

/// The operation `id`, which goes on beside others, has had its time.
pub(super) fn deadline_passed(vm: &mut Supervisor, id: OperationId) {
    memory::deadline_passed(vm, id);
    nic::deadline_passed(vm, id);
}
