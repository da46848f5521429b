//! A machine without a guest, for tests and fuzzing of the supervisor and of programs built on it.
//!
//! It answers at once. Its [`FakeControl`] plays the guest: it can end, reset or ignore the power button.

mod memory;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use crate::config::{NicConfig, VmConfig};
use crate::event::EndCause;
use crate::ids::{Bdf, NicName, UnitName};
use crate::unit::{PauseTicket, PowerListener, PowerRequest, UnitListener};
use crate::vm::mailbox::Mailbox;
use crate::vm::memory::machine::MachineMemory;
use crate::vm::platform::{BuildError, DeviceStatus, Machine, Platform};

pub use memory::FakeMemory;

/// Makes machines without a guest.
#[derive(Clone, Default)]
pub struct FakePlatform {
    control: Arc<FakeControl>,
}

/// Plays the guest of the machine that was built last, and the host under it.
#[derive(Default)]
pub struct FakeControl {
    behaviour: Mutex<Behaviour>,
    changed: Condvar,
    /// Taken before `behaviour`.
    removals: Mutex<()>,
}

#[derive(Default)]
struct Behaviour {
    mailbox: Option<Mailbox>,
    refuses_build: bool,
    refuses_reset: bool,
    obeys_button: bool,
    alive_count: usize,
    hangs: bool,
    /// What does not stand before the host goes on.
    parks: Vec<(Mailbox, u32)>,
    ticket: Option<PauseTicket>,
    panics: bool,
    stopped_count: usize,
    memory: FakeMemory,
    refuses_nics: bool,
    takes_nics: bool,
    releases_nics: bool,
    nics: BTreeMap<Bdf, NicConfig>,
    /// Of `nics`, those that the guest was asked to let go of.
    asked: BTreeSet<Bdf>,
    /// Of `nics`, those that it does not see any more.
    hidden: BTreeSet<Bdf>,
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

    /// Whether the host hangs from now on when it builds, resets, adds a card or brings the machine to a stand.
    pub fn hang(&self, hangs: bool) {
        let mut behaviour = self.lock();
        behaviour.hangs = hangs;
        let stands = if hangs { None } else { Some(behaviour.stand()) };
        drop(behaviour);
        drop(stands);
        self.changed.notify_all();
    }

    /// Whether a device panics from now on when it is inspected.
    pub fn panic_when_inspected(&self, panics: bool) {
        self.lock().panics = panics;
    }

    /// How often vCPUs were told to stop for good.
    pub fn stopped_count(&self) -> usize {
        self.lock().stopped_count
    }

    /// Waits until no machine exists.
    pub fn wait_until_none_is_alive(&self) {
        let waited = self
            .changed
            .wait_while(self.lock(), |behaviour| behaviour.alive_count > 0);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
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

    /// The host gives nothing of a network card back for as long as this is held.
    pub fn hold_removals(&self) -> MutexGuard<'_, ()> {
        self.removals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest lets go of the device at `bdf`, asked or not.
    pub fn eject(&self, bdf: Bdf) {
        self.lock().eject(bdf);
    }

    /// The guest's driver takes the unit, or lets go of it.
    pub fn driver(&self, unit: &UnitName, ready: bool) {
        if let Some(mailbox) = self.mailbox() {
            mailbox.driver_ready(unit, ready);
        }
    }

    /// The guest's driver breaks the rules of the unit.
    pub fn needs_reset(&self, unit: &UnitName) {
        if let Some(mailbox) = self.mailbox() {
            mailbox.needs_reset(unit, "the driver broke the rules");
        }
    }

    /// The network cards of the present machine.
    pub fn nics(&self) -> Vec<NicConfig> {
        self.lock().nics.values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Behaviour> {
        self.behaviour.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the host does, once it does not hang.
    fn host(&self) -> MutexGuard<'_, Behaviour> {
        let waited = self.changed.wait_while(self.lock(), |behaviour| behaviour.hangs);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    fn mailbox(&self) -> Option<Mailbox> {
        self.lock().mailbox.clone()
    }
}

impl Behaviour {
    /// Lets come to a stand what could not; the ticket is for the caller to drop.
    fn stand(&mut self) -> Option<PauseTicket> {
        let parks = self.parks.drain(..);
        parks.for_each(|(mailbox, vcpu)| mailbox.vcpu_parked(vcpu));
        self.ticket.take()
    }

    fn eject(&mut self, bdf: Bdf) {
        if let Some(mailbox) = &self.mailbox
            && self.nics.contains_key(&bdf)
            && self.hidden.insert(bdf)
        {
            mailbox.ejected(bdf, self.asked.contains(&bdf));
        }
    }

    fn forget_requests(&mut self) {
        self.asked.clear();
        self.hidden.clear();
    }

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
        let mut behaviour = self.control.host();
        if behaviour.refuses_build {
            return Err(refused("guest memory"));
        }
        behaviour.mailbox = Some(mailbox.clone());
        behaviour.alive_count += 1;
        behaviour.memory.power_on();
        behaviour.forget_requests();
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

    fn run_vcpus(&self) {
        self.control.lock().parks.clear();
    }

    fn park_vcpus(&self) {
        let mut behaviour = self.control.lock();
        let parks = (0..self.vcpu_count).map(|vcpu| (self.mailbox.clone(), vcpu));
        behaviour.parks.extend(parks);
        if !behaviour.hangs {
            let none = behaviour.stand();
            drop(behaviour);
            drop(none);
        }
    }

    fn pause_units(&self, ticket: PauseTicket) {
        let mut behaviour = self.control.lock();
        if behaviour.hangs {
            behaviour.ticket = Some(ticket);
        }
    }

    fn resume_units(&self) {
        let ticket = self.control.lock().ticket.take();
        drop(ticket);
    }

    fn reset(&self) -> Result<(), BuildError> {
        let mut behaviour = self.control.host();
        if behaviour.refuses_reset {
            Err(refused("the kernel file"))
        } else {
            behaviour.memory.power_on();
            behaviour.forget_requests();
            Ok(())
        }
    }

    fn press_power_button(&self) {
        let obeys = self.control.lock().obeys_button;
        if obeys {
            self.mailbox.power_request(PowerRequest::PowerOff);
        }
    }

    fn serial_input(&self, bytes: &[u8]) -> usize {
        bytes.len()
    }

    fn tear_down(&self) {
        let mut behaviour = self.control.lock();
        behaviour.stopped_count += 1;
        behaviour.parks.clear();
        let ticket = behaviour.ticket.take();
        drop(behaviour);
        drop(ticket);
    }

    fn memory(&self) -> &dyn MachineMemory {
        self
    }

    fn add_nic(&self, nic: &NicConfig) -> Result<(), BuildError> {
        let mut behaviour = self.control.host();
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
        let mut behaviour = self.control.lock();
        let Some(bdf) = behaviour.nic(unit).map(|nic| nic.bdf) else {
            return false;
        };
        if behaviour.hidden.contains(&bdf) {
            return false;
        }
        behaviour.asked.insert(bdf);
        if behaviour.releases_nics {
            behaviour.eject(bdf);
        }
        true
    }

    fn offer(&self, unit: &UnitName) -> bool {
        let mut behaviour = self.control.lock();
        let Some(bdf) = behaviour.nic(unit).map(|nic| nic.bdf) else {
            return false;
        };
        if behaviour.hidden.contains(&bdf) && behaviour.asked.contains(&bdf) {
            return false;
        }
        behaviour.asked.remove(&bdf);
        if behaviour.hidden.remove(&bdf) && behaviour.takes_nics {
            self.mailbox.driver_ready(unit, true);
        }
        true
    }

    fn remove_device(&self, unit: &UnitName) -> bool {
        let _turn = self.control.hold_removals();
        let mut behaviour = self.control.lock();
        let Some(bdf) = behaviour.nic(unit).map(|nic| nic.bdf) else {
            return false;
        };
        behaviour.asked.remove(&bdf);
        behaviour.hidden.remove(&bdf);
        behaviour.nics.remove(&bdf).is_some()
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
        let panics = self.control.lock().panics;
        assert!(!panics, "the device panics, as the test wants");
        json!({ "fake": true })
    }
}

impl Drop for FakeMachine {
    fn drop(&mut self) {
        let mut behaviour = self.control.lock();
        behaviour.alive_count -= 1;
        behaviour.nics.clear();
        drop(behaviour);
        self.control.changed.notify_all();
    }
}
