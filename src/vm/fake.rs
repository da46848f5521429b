//! A machine without a guest, for tests and fuzzing of the supervisor and of programs built on it.
//!
//! It answers at once. Its [`FakeControl`] plays the guest: it can end, reset or ignore the power button.

use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};

use crate::config::{NicConfig, VmConfig};
use crate::event::EndCause;
use crate::ids::{NicName, UnitName};
use crate::unit::{PauseTicket, PowerListener, PowerRequest};
use crate::vm::mailbox::Mailbox;
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
        let mut behaviour = self.behaviour.lock().unwrap_or_else(PoisonError::into_inner);
        behaviour.refuses_build = build;
        behaviour.refuses_reset = reset;
    }

    /// Whether the guest switches itself off when the power button is pressed.
    pub fn obey_button(&self, obeys: bool) {
        self.behaviour
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .obeys_button = obeys;
    }

    /// The number of machines that exist.
    pub fn alive_count(&self) -> usize {
        self.behaviour
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .alive_count
    }

    fn mailbox(&self) -> Option<Mailbox> {
        self.behaviour
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .mailbox
            .clone()
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
        let mut behaviour = self
            .control
            .behaviour
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if behaviour.refuses_build {
            return Err(refused("guest memory"));
        }
        behaviour.mailbox = Some(mailbox.clone());
        behaviour.alive_count += 1;
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
        let behaviour = self
            .control
            .behaviour
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if behaviour.refuses_reset {
            Err(refused("the kernel file"))
        } else {
            Ok(())
        }
    }

    fn press_power_button(&self) {
        let obeys = self
            .control
            .behaviour
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .obeys_button;
        if obeys {
            self.mailbox.power_request(PowerRequest::PowerOff);
        }
    }

    fn tear_down(&self) {}

    fn add_nic(&self, _nic: &NicConfig) -> Result<(), BuildError> {
        Ok(())
    }

    fn request_eject(&self, _unit: &UnitName) -> bool {
        false
    }

    fn remove_device(&self, _unit: &UnitName) -> bool {
        false
    }

    fn rename_nic(&self, _unit: &UnitName, _name: &NicName) {}

    fn set_link(&self, _unit: &UnitName, _up: bool) {}

    fn devices(&self) -> Vec<DeviceStatus> {
        Vec::new()
    }

    fn inspect(&self) -> Value {
        json!({ "fake": true })
    }
}

impl Drop for FakeMachine {
    fn drop(&mut self) {
        self.control
            .behaviour
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .alive_count -= 1;
    }
}
