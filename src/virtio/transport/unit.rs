//! The unit's verbs: reset, pause, resume, save and restore of a whole virtio PCI device.
//!
//! A restored device is active again at once, but paused: its rings are checked and in the device's hands, so that it
//! can be saved again as it is, and [`Unit::resume`] lets it work.

use serde_json::{Value, json};

use super::device::VirtioPciDevice;
use super::queue_setup::RingPosition;
use super::runtime::Core;
use super::saved::{SavedQueueV1, SavedVirtioPciV1, VIRTIO_PCI_SCHEMA};
use super::shared::Driver;
use crate::ids::UnitName;
use crate::unit::{PauseTicket, RestoreError, SaveError, Section, Unit};
use crate::virtio::device::DeviceFault;
use crate::virtio::features;
use crate::virtio::status::{DEVICE_NEEDS_RESET, DRIVER_OK, FEATURES_OK, StatusChange, next};

impl Unit for VirtioPciDevice {
    fn name(&self) -> UnitName {
        self.shared.name.clone()
    }

    fn reset(&self) {
        let shared = &*self.shared;
        let mut core = shared.core();
        shared.reset_device(&mut core);
        shared.function().reset(&shared.interrupts, &shared.log);
        shared.follow_bus_master(&mut core);
        shared.interrupts.reset();
    }

    fn pause(&self, ticket: PauseTicket) {
        self.shared.pause_work(&mut self.shared.core(), ticket);
    }

    fn resume(&self) {
        self.shared.resume_work(&mut self.shared.core());
    }

    fn save(&self) -> Result<Section, SaveError> {
        let core = self.shared.core();
        let queues = core.config.queues.iter().zip(core.ring_positions());
        let saved = SavedVirtioPciV1 {
            device_type: core.device.device_type() as u16,
            device_feature_select: core.config.device_feature_select,
            driver_feature_select: core.config.driver_feature_select,
            driver_features: core.config.driver_features,
            status: core.config.status,
            queue_select: core.config.queue_select,
            queues: queues
                .map(|(setup, position)| SavedQueueV1::new(setup, position))
                .collect(),
            interrupts: self.shared.interrupts.save(),
            config_space: self.shared.function().save(),
            device: core.device.save()?,
        };
        Section::encode(VIRTIO_PCI_SCHEMA, &saved)
    }

    fn restore(&self, section: &Section) -> Result<(), RestoreError> {
        let saved: SavedVirtioPciV1 = section.decode(VIRTIO_PCI_SCHEMA)?;
        let mut core = self.shared.core();
        core.paused = true;
        self.shared.driver.set(Driver::Absent);
        let positions = restore_registers(&mut core, &saved)?;
        core.device.restore(&saved.device)?;
        self.shared.interrupts.restore(&saved.interrupts)?;
        // The MSI-X table is in place before the control bits that let its vectors fire.
        self.shared
            .function()
            .restore(&saved.config_space, &self.shared.interrupts, &self.shared.log)?;
        self.shared.follow_bus_master(&mut core);
        if core.config.is_ready() {
            self.shared.activate(&mut core, &positions).map_err(refused)?;
            self.shared.driver.set(Driver::Ready);
            self.shared.listener.driver_ready(&self.shared.name, true);
        } else if core.config.status & DEVICE_NEEDS_RESET != 0 {
            self.shared.driver.set(Driver::Broken);
        }
        Ok(())
    }

    fn inspect(&self) -> Value {
        let core = self.shared.core();
        let positions = core.ring_positions();
        let queues = core.config.queues.iter().zip(positions).map(|(setup, position)| {
            json!({
                "size": setup.size,
                "enabled": setup.enabled,
                "next_avail": position.next_avail,
                "next_used": position.next_used,
            })
        });
        json!({
            "bdf": self.bdf,
            "bar": self.shared.function().bar_address(),
            "status": core.config.status,
            "driver_features": core.config.driver_features,
            "paused": core.paused,
            "in_flight": core.device.in_flight_count(),
            "queues": queues.collect::<Vec<_>>(),
            "device": core.device.inspect(),
        })
    }
}

/// Takes over the registers and tells where each ring stands. The values are untrusted; the rings are checked when
/// they are built.
fn restore_registers(core: &mut Core, saved: &SavedVirtioPciV1) -> Result<Vec<RingPosition>, RestoreError> {
    let SavedVirtioPciV1 {
        device_type,
        device_feature_select,
        driver_feature_select,
        driver_features,
        status,
        queue_select,
        queues,
        // These parts belong to others.
        interrupts: _,
        config_space: _,
        device: _,
    } = saved;
    let impossible = |field, value: String, reason| RestoreError::Value { field, value, reason };
    if *device_type != core.device.device_type() as u16 {
        let reason = "the device is of another type";
        return Err(impossible("device_type", device_type.to_string(), reason));
    }
    if queues.len() != core.config.queues.len() {
        let reason = "the device has another number of queues";
        return Err(impossible("queues", queues.len().to_string(), reason));
    }
    if !is_status(*status) {
        let reason = "no driver can have got there";
        return Err(impossible("status", format!("{status:#x}"), reason));
    }
    let negotiated = *status & FEATURES_OK != 0;
    if negotiated && features::check(core.config.offered_features, *driver_features).is_err() {
        let reason = "the device does not offer that";
        return Err(impossible(
            "driver_features",
            format!("{driver_features:#x}"),
            reason,
        ));
    }
    core.config.device_feature_select = *device_feature_select;
    core.config.driver_feature_select = *driver_feature_select;
    core.config.driver_features = *driver_features;
    core.config.status = *status;
    core.config.queue_select = *queue_select;
    let mut positions = Vec::with_capacity(queues.len());
    for (setup, saved) in core.config.queues.iter_mut().zip(queues) {
        let (restored, position) = saved.parts(setup.size_max);
        *setup = restored;
        positions.push(position);
    }
    Ok(positions)
}

/// Whether a driver and a device can have set these bits together.
fn is_status(status: u8) -> bool {
    let driver = status & !DEVICE_NEEDS_RESET;
    let broken = status & DEVICE_NEEDS_RESET != 0;
    let reachable = driver == 0 || matches!(next(0, driver), StatusChange::Set { .. });
    reachable && (!broken || driver & DRIVER_OK != 0)
}

/// Rings or features that the device cannot work with.
fn refused(fault: DeviceFault) -> RestoreError {
    RestoreError::Value {
        field: "queues",
        value: fault.to_string(),
        reason: "the device cannot work with that",
    }
}
