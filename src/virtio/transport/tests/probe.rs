//! What a driver sees and does before and around `DRIVER_OK`.
//!
//! The order of accesses is the one of Linux's `virtio_pci_modern`: capabilities, reset, features, vectors, queues,
//! status, kicks.

use virtio_queue::QueueOwnedT;

use super::fake_device::Call;
use super::rig::{DRIVER_FEATURES, Rig, bdf};
use crate::memory::layout::{mmio_slot, mmio_window};
use crate::virtio::device::VirtioInterrupt;

#[test]
fn a_driver_brings_the_device_up_and_its_buffers_come_back() {
    let rig = Rig::new();
    assert_eq!(rig.config_read(0, 4), 0x1041_1AF4);
    let mut rings = rig.bring_up();
    rig.wait_for(&Call::Activate {
        driver_features: DRIVER_FEATURES,
        queues: vec![0, 2],
    });
    assert_eq!(rig.heard(), ["fake ready true"]);
    assert!(rig.device.driver_ready());
    rings[1].add_chain(1).expect("there is room");
    rig.kick(2);
    rig.wait_for(&Call::Queue(2));
    assert_eq!(rings[1].used().idx().load(), 1);
    assert_eq!(rig.pending(), 0b1000, "queue 2 has vector 3");
    assert_eq!(rig.bar_read(0x1000, 1), 1, "isr status");
    assert_eq!(rig.bar_read(0x1000, 1), 0, "reading clears it");
}

#[test]
fn kicks_go_to_the_kernel_only_while_a_driver_is_ready_and_where_the_bar_is() {
    let rig = Rig::new();
    rig.negotiate(DRIVER_FEATURES);
    assert!(rig.vm.ioevent_addresses().is_empty());
    rig.bring_up();
    let base = mmio_slot(bdf());
    assert_eq!(rig.vm.ioevent_addresses(), [base + 0x3000, base + 0x3008]);
    // The bar moves next door, as it does when the guest assigns addresses itself.
    let moved = mmio_window(1) + 0x10_0000;
    rig.config_write(0x10, &(moved as u32).to_le_bytes());
    assert_eq!(rig.vm.ioevent_addresses(), [moved + 0x3000, moved + 0x3008]);
    assert!(!rig.mmio.write(base + 0x3000, &[0, 0]), "the old place is free");
    assert!(rig.mmio.write(moved + 0x3000, &[0, 0]));
    rig.wait_for(&Call::Queue(0));
    // Outside the segment's window nobody answers.
    rig.config_write(0x10, &0xE000_0000u32.to_le_bytes());
    assert!(rig.vm.ioevent_addresses().is_empty());
    assert!(rig.inspect("bar").is_null());
    rig.config_write(0x10, &(base as u32).to_le_bytes());
    assert_eq!(rig.vm.ioevent_addresses().len(), 2);
    rig.config_write(4, &[0, 0]);
    assert!(
        rig.vm.ioevent_addresses().is_empty(),
        "memory accesses are disabled"
    );
    rig.config_write(4, &[2, 0]);
    assert_eq!(rig.vm.ioevent_addresses().len(), 2);
    rig.set_status(0);
    assert!(rig.vm.ioevent_addresses().is_empty());
}

#[test]
fn features_that_are_not_offered_or_legacy_leave_features_ok_clear() {
    let rig = Rig::new();
    assert!(!rig.negotiate(DRIVER_FEATURES | 1 << 40));
    assert!(!rig.negotiate(DRIVER_FEATURES & !(1 << 32)));
    assert_eq!(rig.status(), 3);
    rig.set_status(7);
    assert_eq!(rig.status(), 3, "DRIVER_OK without FEATURES_OK is ignored");
    assert!(rig.negotiate(DRIVER_FEATURES));
}

#[test]
fn vectors_that_do_not_exist_read_back_as_none() {
    let rig = Rig::new();
    rig.negotiate(DRIVER_FEATURES);
    rig.bar_write(0x10, &3u16.to_le_bytes());
    assert_eq!(rig.bar_read(0x10, 2), 3);
    rig.bar_write(0x10, &4u16.to_le_bytes());
    assert_eq!(rig.bar_read(0x10, 2), 0xFFFF);
    rig.bar_write(0x1A, &0x100u16.to_le_bytes());
    assert_eq!(rig.bar_read(0x1A, 2), 0xFFFF);
    assert_eq!(rig.bar_read(0x12, 2), 3, "num_queues");
}

#[test]
fn the_device_configuration_is_the_devices_and_its_changes_are_noticed() {
    let rig = Rig::new();
    rig.bring_up();
    assert_eq!(rig.bar_read(0x2000, 4), 0x4433_2211);
    assert_eq!(rig.bar_read(0x2006, 2), 0x8877);
    assert_eq!(rig.bar_read(0x2008, 8), 0, "past its end");
    rig.bar_write(0x2001, &[0xAA]);
    assert_eq!(rig.bar_read(0x2000, 8), 0x8877_6655_4433_AA11);
    let generation = rig.bar_read(0x15, 1);
    rig.change(|device| device.config[0] = 0xBB);
    let silent = rig.bar_read(0x15, 1);
    assert_ne!(silent, generation);
    assert_eq!(rig.pending(), 0);
    rig.change(|device| device.interrupt.as_ref().expect("active").signal_config());
    assert_ne!(rig.bar_read(0x15, 1), silent);
    assert_eq!((rig.pending(), rig.bar_read(0x1000, 1)), (1, 2));
}

#[test]
fn every_structure_can_be_reached_through_configuration_space() {
    let rig = Rig::new();
    rig.config_write(4, &[2, 0]);
    // The last capability of the list.
    let mut cap = u64::from(rig.config_read(0x34, 1));
    while rig.config_read(cap + 1, 1) != 0 {
        cap = u64::from(rig.config_read(cap + 1, 1));
    }
    assert_eq!(rig.config_read(cap + 3, 1), 5, "configuration access");
    let select = |bar: u8, offset: u32, length: u32| {
        rig.config_write(cap + 4, &[bar]);
        rig.config_write(cap + 8, &offset.to_le_bytes());
        rig.config_write(cap + 12, &length.to_le_bytes());
    };
    select(0, 0x14, 1);
    rig.config_write(cap + 16, &1u32.to_le_bytes());
    assert_eq!(rig.status(), 1, "the write reached device_status");
    select(0, 0x12, 2);
    assert_eq!(rig.config_read(cap + 16, 2), 3, "num_queues");
    select(0, 0x2000, 4);
    assert_eq!(rig.config_read(cap + 16, 4), 0x4433_2211);
    // The bar need not be enabled for it.
    rig.config_write(4, &[0, 0]);
    select(0, 0x2004, 4);
    assert_eq!(rig.config_read(cap + 16, 4), 0x8877_6655);
    for (bar, offset, length) in [
        (1, 0x2000, 4),
        (0, 0x2001, 4),
        (0, 0x2000, 3),
        (0, 0x8000, 1),
        (0, 0, 0),
    ] {
        select(bar, offset, length);
        rig.config_write(cap + 16, &0x0102_0304u32.to_le_bytes());
        assert_eq!(
            rig.config_read(cap + 16, 4),
            0x0102_0304,
            "no access, the register keeps its value"
        );
    }
    assert_eq!(
        rig.change(|device| device.config),
        [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88]
    );
}

#[test]
fn an_msix_vector_reaches_the_host_only_after_the_driver_unmasks_it() {
    let rig = Rig::new();
    rig.bring_up();
    assert_eq!((rig.vm.irqfd_count(), rig.vm.routing_count()), (0, 0));
    rig.bar_write(0x4010, &0xFEE0_0000u32.to_le_bytes());
    rig.bar_write(0x4018, &0x31u32.to_le_bytes());
    rig.bar_write(0x401C, &0u32.to_le_bytes());
    let control = u64::from(rig.config_read(0x34, 1)) + 2;
    rig.config_write(control, &0x8000u16.to_le_bytes());
    assert_eq!(
        (rig.vm.irqfd_count(), rig.vm.routing_count(), rig.gsi.msi_count()),
        (1, 1, 1)
    );
    rig.device.shared.interrupts.signal_queue(0);
    assert_eq!(rig.pending(), 0, "it was delivered");
    rig.config_write(control, &0u16.to_le_bytes());
    assert_eq!((rig.vm.irqfd_count(), rig.gsi.msi_count()), (0, 0));
}

#[test]
fn a_ring_works_on_over_many_kicks() {
    let rig = Rig::new();
    let mut rings = rig.bring_up();
    for round in 1..=4 {
        rings[0].add_chain(1).expect("there is room");
        rig.kick(0);
        rig.wait_for(&Call::Queue(0));
        assert_eq!(rings[0].used().idx().load(), round);
    }
    let position = rig.change(|device| device.queues[0].queue().state());
    assert_eq!((position.next_avail, position.next_used), (4, 4));
    let mut queue = rings[0]
        .create_queue::<virtio_queue::Queue>()
        .expect("a good ring");
    assert_eq!(queue.iter(&*rig.memory).expect("a good ring").count(), 4);
}
