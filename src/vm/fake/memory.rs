//! The memory of a guest that is not there: what it has, what it does when it is to change, what the host promises.

use super::FakeMachine;
use crate::memory::host::HostMemoryError;
use crate::vm::memory::machine::{MachineMemory, Observed};
use crate::vm::memory::plan::Plan;

/// The memory of a guest that is not there.
#[derive(Debug, Clone)]
pub struct FakeMemory {
    /// What the guest has.
    pub now: Observed,
    /// Whether it does at once what it is asked for.
    pub obeys: bool,
    /// Whether it tells its total when it is asked.
    pub tells: bool,
    /// Whether the host refuses to promise more.
    pub host_refuses: bool,
    /// What the host promised last, in bytes.
    pub promised_bytes: u64,
    /// How often the guest was reminded of what it is asked for.
    pub reminded_count: u32,
}

impl Default for FakeMemory {
    fn default() -> Self {
        let now = Observed {
            mem_driver: true,
            balloon_driver: true,
            ..Observed::default()
        };
        Self {
            now,
            obeys: true,
            tells: true,
            host_refuses: false,
            promised_bytes: 0,
            reminded_count: 0,
        }
    }
}

impl FakeMemory {
    pub(super) fn power_on(&mut self) {
        self.now.plugged_bytes = 0;
        self.now.ballooned_bytes = 0;
    }
}

impl MachineMemory for FakeMachine {
    fn observe(&self) -> Observed {
        self.control.lock().memory.now
    }

    fn promise(&self, bytes: u64, unchecked: bool) -> Result<(), HostMemoryError> {
        let mut behaviour = self.control.lock();
        let memory = &mut behaviour.memory;
        if memory.host_refuses && !unchecked && bytes > memory.promised_bytes {
            return Err(HostMemoryError::Unavailable {
                need_bytes: bytes,
                available_bytes: memory.promised_bytes,
            });
        }
        memory.promised_bytes = bytes;
        Ok(())
    }

    fn request(&self, plan: &Plan, insists: bool) {
        let mut behaviour = self.control.lock();
        let memory = &mut behaviour.memory;
        memory.reminded_count += u32::from(insists);
        if memory.obeys && !plan.is_reached(&memory.now) {
            memory.now.plugged_bytes = plan.plugged_bytes;
            memory.now.ballooned_bytes = plan.ballooned_bytes;
            self.mailbox.memory_changed();
        }
    }

    fn ask_guest_total(&self) -> bool {
        let mut driver = false;
        self.control.memory(|memory| {
            driver = memory.now.balloon_driver;
            if driver && memory.tells {
                memory.now.told_count += 1;
                memory.now.guest_total_bytes = Some(memory.now.plugged_bytes);
            }
        });
        driver
    }

    fn resident_bytes(&self) -> u64 {
        0
    }
}
