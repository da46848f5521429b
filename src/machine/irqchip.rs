//! SKELETON: the in-kernel interrupt controllers and interval timer as units.
use std::sync::Arc;

use super::kvm::{KvmError, KvmVm};

/// SKELETON: implements Unit, name `irqchip`.
pub struct Irqchip(pub Arc<KvmVm>);
impl Irqchip {
    /// Makes the unit; its state now is the one after power-on.
    pub fn new(vm: Arc<KvmVm>) -> Result<Self, KvmError> {
        Ok(Self(vm))
    }
}
/// SKELETON: implements Unit, name `pit`.
pub struct Pit(pub Arc<KvmVm>);
impl Pit {
    /// Makes the unit; its state now is the one after power-on.
    pub fn new(vm: Arc<KvmVm>) -> Result<Self, KvmError> {
        Ok(Self(vm))
    }
}
