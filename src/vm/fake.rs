//! A machine without a guest, for tests and fuzzing of the supervisor and of programs built on it.
//!
//! It answers at once. Its [`FakeControl`] plays the guest: it can end, reset or ignore the power button.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use crate::config::{NicConfig, VmConfig};
use crate::event::EndCause;
use crate::ids::{Bdf, NicName, UnitName};
use crate::memory::host::HostMemoryError;
use crate::unit::{PauseTicket, PowerListener, PowerRequest, UnitListener};
use crate::vm::mailbox::Mailbox;
use crate::vm::memory::machine::{MachineMemory, Observed};
use crate::vm::memory::plan::Plan;
use crate::vm::platform::{BuildError, DeviceStatus, Machine, Platform};

/// Makes machines without a guest.
#[derive(Clone, Default)]
pub struct FakePlatform {
    control: Arc<FakeControl>,
}

/// Plays the guest of the machine that was built last, and the host under it.
#[derive(Default)]
pub struct FakeControl {
    behaviour: Mutex<Behaviour>,
}

#[derive(Default)]
struct Behaviour {
    mailbox: Option<Mailbox>,
    refuses_build: bool,
    refuses_reset: bool,
    obeys_button: bool,
    alive_count: usize,
    memory: FakeMemory,
    refuses_nics: bool,
    takes_nics: bool,
    releases_nics: bool,
    nics: BTreeMap<Bdf, NicConfig>,
}

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

struct FakeMachine {
    vcpu_count: u32,
    mailbox: Mailbox,
    control: Arc<FakeControl>,
}

impl FakePlatform {
    /// The control of this platform's machines.
    pub fn control(&self) -> &FakeControl {
        &self.control
    }
}

impl FakeControl {
    /// The guest of the present machine asks for `request`.
    pub fn guest(&self, request: PowerRequest) {
        if let Some(mailbox) = self.mailbox() {
            mailbox.power_request(request);
        }
    }

    /// A vCPU of the present machine ends by itself.
    pub fn vcpu_ended(&self, cause: EndCause) {
        if let Some(mailbox) = self.mailbox() {
            mailbox.vcpu_ended(cause);
        }
    }

    /// From now on the host refuses to build, or to reset, or does not.
    pub fn refuse(&self, build: bool, reset: bool) {
        let mut behaviour = self.lock();
        behaviour.refuses_build = build;
        behaviour.refuses_reset = reset;
    }

    /// Whether the guest switches itself off when the power button is pressed.
    pub fn obey_button(&self, obeys: bool) {
        self.lock().obeys_button = obeys;
    }

    /// What the guest does when its memory is to change.
    pub fn memory(&self, change: impl FnOnce(&mut FakeMemory)) {
        let mut behaviour = self.behaviour.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut behaviour.memory);
        let mailbox = behaviour.mailbox.clone();
        drop(behaviour);
        if let Some(mailbox) = mailbox {
            mailbox.memory_changed();
        }
    }

    /// The host has memory again.
    pub fn host_memory_freed(&self) {
        self.memory(|memory| memory.host_refuses = false);
        if let Some(mailbox) = self.mailbox() {
            mailbox.host_memory_freed();
        }
    }

    /// The number of machines that exist.
    pub fn alive_count(&self) -> usize {
        self.lock().alive_count
    }

    /// Whether the host refuses network cards from now on.
    pub fn refuse_nics(&self, refuses: bool) {
        self.lock().refuses_nics = refuses;
    }

    /// Whether the guest's driver takes new network cards at once, and whether the guest lets go at once of those that
    /// it is asked for.
    pub fn obey_hot_plug(&self, takes: bool, releases: bool) {
        let mut behaviour = self.lock();
        behaviour.takes_nics = takes;
        behaviour.releases_nics = releases;
    }

    /// The guest lets go of the device at `bdf`, asked or not.
    pub fn eject(&self, bdf: Bdf) {
        if let Some(mailbox) = self.mailbox() {
            mailbox.ejected(bdf);
        }
    }

    /// The guest's driver takes the unit, or lets go of it.
    pub fn driver(&self, unit: &UnitName, ready: bool) {
        if let Some(mailbox) = self.mailbox() {
            mailbox.driver_ready(unit, ready);
        }
    }

    /// The network cards of the present machine.
    pub fn nics(&self) -> Vec<NicConfig> {
        self.lock().nics.values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Behaviour> {
        self.behaviour.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mailbox(&self) -> Option<Mailbox> {
        self.lock().mailbox.clone()
    }
}

impl Behaviour {
    fn nic(&self, unit: &UnitName) -> Option<&NicConfig> {
        self.nics.values().find(|nic| nic.unit_name() == *unit)
    }

    fn nic_mut(&mut self, unit: &UnitName) -> Option<&mut NicConfig> {
        self.nics.values_mut().find(|nic| nic.unit_name() == *unit)
    }
}

fn refused(what: &'static str) -> BuildError {
    BuildError::Host {
        what,
        source: std::io::Error::from_raw_os_error(libc::ENOMEM),
    }
}

impl Platform for FakePlatform {
    fn check(&self, _config: &VmConfig) -> Result<(), BuildError> {
        Ok(())
    }

    fn build(&self, config: &VmConfig, mailbox: Mailbox) -> Result<Arc<dyn Machine>, BuildError> {
        let mut behaviour = self.control.lock();
        if behaviour.refuses_build {
            return Err(refused("guest memory"));
        }
        behaviour.mailbox = Some(mailbox.clone());
        behaviour.alive_count += 1;
        behaviour.memory.power_on();
        behaviour.nics = config.nics().iter().map(|nic| (nic.bdf, nic.clone())).collect();
        Ok(Arc::new(FakeMachine {
            vcpu_count: config.cpu_count().into(),
            mailbox,
            control: self.control.clone(),
        }))
    }
}

impl Machine for FakeMachine {
    fn vcpu_count(&self) -> u32 {
        self.vcpu_count
    }

    fn run_vcpus(&self) {}

    fn park_vcpus(&self) {
        (0..self.vcpu_count).for_each(|_| self.mailbox.vcpu_parked());
    }

    fn pause_units(&self, ticket: PauseTicket) {
        drop(ticket);
    }

    fn resume_units(&self) {}

    fn reset(&self) -> Result<(), BuildError> {
        let mut behaviour = self.control.lock();
        if behaviour.refuses_reset {
            Err(refused("the kernel file"))
        } else {
            behaviour.memory.power_on();
            Ok(())
        }
    }

    fn press_power_button(&self) {
        let obeys = self.control.lock().obeys_button;
        if obeys {
            self.mailbox.power_request(PowerRequest::PowerOff);
        }
    }

    fn tear_down(&self) {}

    fn memory(&self) -> &dyn MachineMemory {
        self
    }

    fn add_nic(&self, nic: &NicConfig) -> Result<(), BuildError> {
        let mut behaviour = self.control.lock();
        if behaviour.refuses_nics {
            return Err(refused("a network card"));
        }
        behaviour.nics.insert(nic.bdf, nic.clone());
        Ok(())
    }

    fn announce(&self, unit: &UnitName) {
        let takes = self.control.lock().takes_nics;
        if takes {
            self.mailbox.driver_ready(unit, true);
        }
    }

    fn request_eject(&self, unit: &UnitName) -> bool {
        let behaviour = self.control.lock();
        let Some(nic) = behaviour.nic(unit) else {
            return false;
        };
        if behaviour.releases_nics {
            self.mailbox.ejected(nic.bdf);
        }
        true
    }

    fn remove_device(&self, unit: &UnitName) -> bool {
        let mut behaviour = self.control.lock();
        let bdf = behaviour.nic(unit).map(|nic| nic.bdf);
        bdf.and_then(|bdf| behaviour.nics.remove(&bdf)).is_some()
    }

    fn rename_nic(&self, unit: &UnitName, name: &NicName) {
        if let Some(nic) = self.control.lock().nic_mut(unit) {
            nic.name = name.clone();
        }
    }

    fn set_link(&self, unit: &UnitName, up: bool) {
        if let Some(nic) = self.control.lock().nic_mut(unit) {
            nic.link_up = up;
        }
    }

    fn devices(&self) -> Vec<DeviceStatus> {
        Vec::new()
    }

    fn inspect(&self) -> Value {
        json!({ "fake": true })
    }
}

impl FakeMemory {
    fn power_on(&mut self) {
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

impl Drop for FakeMachine {
    fn drop(&mut self) {
        let mut behaviour = self.control.lock();
        behaviour.alive_count -= 1;
        behaviour.nics.clear();
    }
}
