//! The in-kernel interrupt controllers (two 8259, one I/O APIC) and the interval timer (8254) as units.
//!
//! Their state lives in the host's kernel. The state after power-on is read when the unit is made, before any vCPU
//! ran, and written back by a reset. The local APICs belong to the vCPUs.

use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2,
};
use serde_json::{Value, json};
use vmm_sys_util::errno;

use super::kvm::{KvmError, KvmVm};
use super::saved::{HexBytes, IrqchipV1, PitV1};
use crate::ids::UnitName;
use crate::unit::{PauseTicket, RestoreError, SaveError, Section, Unit};

const SCHEMA: u32 = 1;
/// The chips in the order of [`IrqchipV1`]'s fields.
const CHIP_IDS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// The interrupt controllers; unit `irqchip`.
pub struct Irqchip {
    vm: Arc<KvmVm>,
    pristine: [kvm_irqchip; 3],
}

impl Irqchip {
    /// Makes the unit. What the chips hold now is what a reset brings back.
    ///
    /// # Errors
    /// [`KvmError::Host`] when the host does not tell their state.
    pub fn new(vm: Arc<KvmVm>) -> Result<Self, KvmError> {
        let pristine = read_chips(&vm).map_err(|error| KvmError::Host {
            what: "to tell the interrupt controllers' state",
            source: error.into(),
        })?;
        Ok(Self { vm, pristine })
    }
}

impl Unit for Irqchip {
    fn name(&self) -> UnitName {
        UnitName::new("irqchip").expect("a short name of letters")
    }

    fn reset(&self) {
        for chip in &self.pristine {
            if let Err(error) = self.vm.fd.set_irqchip(chip) {
                log::error!(
                    "irqchip: the host refused the reset of chip {}: {error}",
                    chip.chip_id
                );
            }
        }
    }

    fn pause(&self, _ticket: PauseTicket) {}

    fn resume(&self) {}

    fn save(&self) -> Result<Section, SaveError> {
        let chips = read_chips(&self.vm).map_err(|error| SaveError::Host {
            what: "the interrupt controllers".to_owned(),
            source: error.into(),
        })?;
        let [pic_master, pic_slave, ioapic] = chips.each_ref().map(HexBytes::of);
        let saved = IrqchipV1 {
            pic_master,
            pic_slave,
            ioapic,
        };
        Section::encode(SCHEMA, &saved)
    }

    fn restore(&self, section: &Section) -> Result<(), RestoreError> {
        let IrqchipV1 {
            pic_master,
            pic_slave,
            ioapic,
        } = section.decode(SCHEMA)?;
        let chips = [
            pic_master.read::<kvm_irqchip>("pic_master")?,
            pic_slave.read::<kvm_irqchip>("pic_slave")?,
            ioapic.read::<kvm_irqchip>("ioapic")?,
        ];
        for (chip, expected) in chips.iter().zip(CHIP_IDS) {
            if chip.chip_id != expected {
                return Err(RestoreError::Value {
                    field: "chip_id",
                    value: chip.chip_id.to_string(),
                    reason: "the chips are 0, 1 and 2 in this order",
                });
            }
        }
        for chip in &chips {
            self.vm.fd.set_irqchip(chip).map_err(|error| RestoreError::Host {
                what: format!("interrupt controller {}", chip.chip_id),
                source: error.into(),
            })?;
        }
        Ok(())
    }

    fn inspect(&self) -> Value {
        json!({ "chips": ["pic-master", "pic-slave", "ioapic"] })
    }
}

fn read_chips(vm: &KvmVm) -> Result<[kvm_irqchip; 3], errno::Error> {
    let mut chips = CHIP_IDS.map(|chip_id| kvm_irqchip {
        chip_id,
        ..Default::default()
    });
    for chip in &mut chips {
        vm.fd.get_irqchip(chip)?;
    }
    Ok(chips)
}

/// The interval timer; unit `pit`.
pub struct Pit {
    vm: Arc<KvmVm>,
    pristine: kvm_pit_state2,
}

impl Pit {
    /// Makes the unit. What the timer holds now is what a reset brings back.
    ///
    /// # Errors
    /// [`KvmError::Host`] when the host does not tell its state.
    pub fn new(vm: Arc<KvmVm>) -> Result<Self, KvmError> {
        let pristine = vm.fd.get_pit2().map_err(|error| KvmError::Host {
            what: "to tell the interval timer's state",
            source: error.into(),
        })?;
        Ok(Self { vm, pristine })
    }
}

impl Unit for Pit {
    fn name(&self) -> UnitName {
        UnitName::new("pit").expect("a short name of letters")
    }

    fn reset(&self) {
        if let Err(error) = self.vm.fd.set_pit2(&self.pristine) {
            log::error!("pit: the host refused the reset: {error}");
        }
    }

    fn pause(&self, _ticket: PauseTicket) {}

    fn resume(&self) {}

    fn save(&self) -> Result<Section, SaveError> {
        let state = self.vm.fd.get_pit2().map_err(|error| SaveError::Host {
            what: "the interval timer".to_owned(),
            source: error.into(),
        })?;
        let saved = PitV1 {
            state: HexBytes::of(&state),
        };
        Section::encode(SCHEMA, &saved)
    }

    fn restore(&self, section: &Section) -> Result<(), RestoreError> {
        let PitV1 { state } = section.decode(SCHEMA)?;
        let state = state.read::<kvm_pit_state2>("state")?;
        self.vm.fd.set_pit2(&state).map_err(|error| RestoreError::Host {
            what: "the interval timer".to_owned(),
            source: error.into(),
        })
    }

    fn inspect(&self) -> Value {
        json!({})
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::kvm::Kvm;

    fn vm() -> Arc<KvmVm> {
        let kvm = Kvm::open().expect("this test needs /dev/kvm");
        kvm.create_vm().expect("kvm makes vms")
    }

    #[test]
    #[ignore = "needs /dev/kvm"]
    fn chips_come_back_as_saved_and_reset_as_at_power_on() {
        let unit = Irqchip::new(vm()).expect("kvm tells its chips");
        let fresh = unit.save().expect("kvm tells its chips");
        let mut changed = fresh.clone();
        let Value::String(master) = &mut changed.body["pic_master"] else {
            panic!("the chip is text");
        };
        // Behind chip_id, pad, last_irr and irr comes imr, the interrupt mask.
        master.replace_range(20..22, "5a");
        unit.restore(&changed).expect("a mask can be anything");
        assert_eq!(unit.save().expect("kvm tells its chips"), changed);
        assert_ne!(changed, fresh);
        unit.reset();
        assert_eq!(unit.save().expect("kvm tells its chips"), fresh);
    }

    #[test]
    #[ignore = "needs /dev/kvm"]
    fn swapped_chips_are_refused() {
        let unit = Irqchip::new(vm()).expect("kvm tells its chips");
        let fresh = unit.save().expect("kvm tells its chips");
        let mut saved: IrqchipV1 = fresh.decode(SCHEMA).expect("just written");
        saved.pic_slave = saved.ioapic.clone();
        let section = Section::encode(SCHEMA, &saved).expect("plain data");
        let error = unit.restore(&section).expect_err("chip 2 in the place of 1");
        assert_eq!(
            error.to_string(),
            "saved chip_id is 2: the chips are 0, 1 and 2 in this order"
        );
    }

    #[test]
    #[ignore = "needs /dev/kvm"]
    fn the_timer_comes_back_as_saved() {
        let unit = Pit::new(vm()).expect("kvm tells its timer");
        let mut state = unit.pristine;
        state.channels[2].mode = 3;
        state.channels[2].count = 0x1234;
        let saved = PitV1 {
            state: HexBytes::of(&state),
        };
        unit.restore(&Section::encode(SCHEMA, &saved).expect("plain data"))
            .expect("mode 3 exists");
        let read = unit.vm.fd.get_pit2().expect("kvm tells its timer");
        assert_eq!((read.channels[2].mode, read.channels[2].count), (3, 0x1234));
    }
}
