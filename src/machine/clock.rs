//! SKELETON: the guest's clock (kvmclock) as a unit.
use std::sync::Arc;

use super::kvm::KvmVm;

/// SKELETON: implements Unit, name `clock`.
pub struct Clock(pub Arc<KvmVm>);
impl Clock {
    /// Makes the unit.
    pub fn new(vm: Arc<KvmVm>) -> Self {
        Self(vm)
    }
}
