//! The guest's clock (kvmclock) as a unit: it stands still while the VM is paused.
//!
//! KVM's clock goes on whatever the vCPUs do. A pause reads it, a resume sets it back to that reading, so a guest
//! that uses it sees no jump however long it was paused (KVM API 4.29, 4.30). Resume order: this before the vCPUs,
//! which then tell the guest that it was paused.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_clock_data;
use serde_json::{Value, json};
use vmm_sys_util::errno;

use super::kvm::KvmVm;
use super::saved::ClockV1;
use crate::ids::UnitName;
use crate::unit::{PauseTicket, RestoreError, SaveError, Section, Unit};

const SCHEMA: u32 = 1;

/// The guest's clock; unit `clock`.
pub struct Clock {
    vm: Arc<KvmVm>,
    /// The reading of the moment at which the clock was stopped, in nanoseconds.
    stopped_at_ns: Mutex<Option<u64>>,
}

impl Clock {
    /// Makes the unit; the clock goes.
    pub fn new(vm: Arc<KvmVm>) -> Self {
        Self {
            vm,
            stopped_at_ns: Mutex::new(None),
        }
    }

    /// Sets the clock; a stopped clock stays stopped there.
    fn set(&self, kvmclock_ns: u64) -> Result<(), errno::Error> {
        let mut stopped_at_ns = self.stopped();
        if stopped_at_ns.is_some() {
            *stopped_at_ns = Some(kvmclock_ns);
        }
        self.write(kvmclock_ns)
    }

    /// No flag: the clock is set to the value itself, not to it plus the real time that has passed.
    fn write(&self, kvmclock_ns: u64) -> Result<(), errno::Error> {
        self.vm.fd.set_clock(&kvm_clock_data {
            clock: kvmclock_ns,
            ..Default::default()
        })
    }

    fn stopped(&self) -> MutexGuard<'_, Option<u64>> {
        self.stopped_at_ns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Unit for Clock {
    fn name(&self) -> UnitName {
        UnitName::new("clock").expect("a short name of letters")
    }

    fn reset(&self) {
        if let Err(error) = self.set(0) {
            log::error!("clock: the host refused the reset: {error}");
        }
    }

    fn pause(&self, _ticket: PauseTicket) {
        let mut stopped_at_ns = self.stopped();
        if stopped_at_ns.is_none() {
            match self.vm.fd.get_clock() {
                Ok(clock) => *stopped_at_ns = Some(clock.clock),
                Err(error) => log::error!("clock: the host does not tell it, it goes on: {error}"),
            }
        }
    }

    fn resume(&self) {
        if let Some(kvmclock_ns) = self.stopped().take()
            && let Err(error) = self.write(kvmclock_ns)
        {
            log::error!("clock: the host refused to set it back: {error}");
        }
    }

    fn save(&self) -> Result<Section, SaveError> {
        let stopped_at_ns = *self.stopped();
        let kvmclock_ns = match stopped_at_ns {
            Some(kvmclock_ns) => kvmclock_ns,
            None => {
                let clock = self.vm.fd.get_clock().map_err(|error| SaveError::Host {
                    what: "the clock".to_owned(),
                    source: error.into(),
                })?;
                clock.clock
            }
        };
        Section::encode(SCHEMA, &ClockV1 { kvmclock_ns })
    }

    fn restore(&self, section: &Section) -> Result<(), RestoreError> {
        let ClockV1 { kvmclock_ns } = section.decode(SCHEMA)?;
        self.set(kvmclock_ns).map_err(|error| RestoreError::Host {
            what: "the clock".to_owned(),
            source: error.into(),
        })
    }

    fn inspect(&self) -> Value {
        json!({ "stopped_at_ns": *self.stopped() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::kvm::Kvm;

    fn saved_ns(clock: &Clock) -> u64 {
        let section = clock.save().expect("kvm tells its clock");
        section
            .decode::<ClockV1>(SCHEMA)
            .expect("just written")
            .kvmclock_ns
    }

    #[test]
    #[ignore = "needs /dev/kvm"]
    fn a_paused_clock_stands_still_and_goes_on_from_there() {
        let kvm = Kvm::open().expect("this test needs /dev/kvm");
        let clock = Clock::new(kvm.create_vm().expect("kvm makes vms"));
        let hour_ns = 3_600_000_000_000;
        let section = Section::encode(SCHEMA, &ClockV1 { kvmclock_ns: hour_ns }).expect("plain data");
        clock.restore(&section).expect("kvm sets its clock");
        clock.pause(PauseTicket::new(|| ()));
        let paused_ns = saved_ns(&clock);
        assert!(paused_ns >= hour_ns);
        // The host's clock is moved away behind the unit's back, as time does.
        clock.write(2 * hour_ns).expect("kvm sets its clock");
        assert_eq!(saved_ns(&clock), paused_ns);
        clock.pause(PauseTicket::new(|| ()));
        assert_eq!(saved_ns(&clock), paused_ns);
        clock.resume();
        assert!((paused_ns..2 * hour_ns).contains(&saved_ns(&clock)));
    }

    #[test]
    #[ignore = "needs /dev/kvm"]
    fn a_reset_while_paused_starts_the_clock_at_zero() {
        let kvm = Kvm::open().expect("this test needs /dev/kvm");
        let clock = Clock::new(kvm.create_vm().expect("kvm makes vms"));
        clock.pause(PauseTicket::new(|| ()));
        clock.reset();
        assert_eq!(saved_ns(&clock), 0);
    }
}
