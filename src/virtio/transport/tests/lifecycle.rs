//! Reset, draining, pausing, saving, restoring and the end of a device.
//!
//! Waiting is for calls and tickets, never for time: what must not happen is looked for after the event loop has
//! provably gone round.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use serde_json::{Value, json};

use super::fake_device::{Call, FakeDevice};
use super::rig::{PATIENCE, Rig, bdf};
use crate::bus::BusDevice;
use crate::memory::layout::mmio_slot;
use crate::pci::device::PciDevice;
use crate::unit::{PauseTicket, Section, Unit};
use crate::virtio::device::VirtioInterrupt;

fn ticket() -> (PauseTicket, Receiver<()>) {
    let (sender, receiver) = channel();
    let quiet = move || {
        let _ = sender.send(());
    };
    (PauseTicket::new(quiet), receiver)
}

struct Silent;

impl BusDevice for Silent {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}
    fn write(&self, _offset: u64, _data: &[u8]) {}
}

/// A device with one chain in flight on queue 0.
fn with_work_in_flight() -> Rig {
    let rig = Rig::with(|device| device.hold = true);
    let mut rings = rig.bring_up();
    rings[0].add_chain(1).expect("there is room");
    rig.kick(0);
    rig.wait_for(&Call::Queue(0));
    assert_eq!(rig.inspect("in_flight"), 1);
    drop(rings);
    rig
}

#[test]
fn a_reset_of_an_idle_device_is_done_at_once() {
    let rig = Rig::new();
    rig.bring_up();
    rig.drop_calls();
    rig.set_status(0);
    assert_eq!(rig.status(), 0);
    assert_eq!(rig.heard(), ["fake ready true", "fake ready false"]);
    rig.bar_write(0x16, &0u16.to_le_bytes());
    assert_eq!((rig.bar_read(0x1C, 2), rig.bar_read(0x1A, 2)), (0, 0xFFFF));
    assert_eq!(rig.bar_read(0x20, 8), 0);
    rig.kick(0);
    rig.settle_loop();
    let calls: Vec<_> = rig.calls.try_iter().collect();
    assert_eq!(calls, [Call::Reset], "a stale kick does nothing");
    rig.bring_up();
    rig.wait_for(&Call::Queue(0));
}

#[test]
fn a_reset_with_work_in_flight_ends_with_the_last_completion() {
    let rig = with_work_in_flight();
    rig.set_status(0);
    assert_ne!(rig.status(), 0, "the driver must wait");
    assert!(!rig.device.driver_ready());
    rig.set_status(1);
    assert_ne!(rig.status(), 1, "and nothing else");
    let done = rig.change(|device| device.done.clone());
    done.write(1).expect("the counter is not full");
    rig.wait_for(&Call::Event { paused: true });
    rig.settle_loop();
    assert_eq!(rig.status(), 0);
    assert_eq!(rig.ring(0).used().idx().load(), 0, "the void took the completion");
    rig.bring_up();
}

#[test]
fn a_pause_is_complete_when_nothing_is_in_flight() {
    let rig = with_work_in_flight();
    let (first, quiet) = ticket();
    rig.device.pause(first);
    assert!(quiet.try_recv().is_err());
    let done = rig.change(|device| {
        device.hold = false;
        device.done.clone()
    });
    rig.kick(2);
    rig.settle_loop();
    done.write(1).expect("the counter is not full");
    quiet.recv().expect("the pause completes");
    rig.wait_for(&Call::Event { paused: true });
    let (second, quiet) = ticket();
    rig.device.pause(second);
    quiet.recv().expect("a paused device is quiet at once");
    // Nothing is processed now, and nothing is watched that could wake the loop.
    rig.kick(0);
    done.write(1).expect("the counter is not full");
    rig.settle_loop();
    assert_eq!(rig.calls.try_iter().collect::<Vec<_>>(), []);
    rig.device.resume();
    rig.wait_for(&Call::Queue(0));
    rig.wait_for(&Call::Queue(2));
    rig.wait_for(&Call::Event { paused: false });
    assert_eq!(rig.pending() & 0b1010, 0b1010, "every queue was signalled");
}

#[test]
fn a_buffer_that_came_during_a_pause_is_served_at_the_resume() {
    let rig = Rig::new();
    let mut rings = rig.bring_up();
    let (ticket, quiet) = ticket();
    rig.device.pause(ticket);
    quiet.recv().expect("idle");
    rings[0].add_chain(1).expect("there is room");
    rig.kick(0);
    rig.settle_loop();
    assert_eq!(rings[0].used().idx().load(), 0);
    rig.device.resume();
    rig.wait_for(&Call::Queue(0));
    assert_eq!(rings[0].used().idx().load(), 1);
}

#[test]
fn a_device_that_is_no_bus_master_leaves_memory_and_interrupts_alone() {
    let rig = Rig::new();
    let mut rings = rig.bring_up();
    let control = u64::from(rig.config_read(0x34, 1)) + 2;
    rig.config_write(control, &0x8000u16.to_le_bytes());
    rig.bar_write(0x401C, &0u32.to_le_bytes());
    assert_eq!(rig.pending() & 0b10, 0, "queue 0 can interrupt");
    rig.config_write(4, &[2, 0]);
    rig.drop_calls();
    rings[0].add_chain(1).expect("there is room");
    rig.kick(0);
    rig.device.shared.interrupts.signal_queue(0);
    rig.settle_loop();
    assert_eq!(rig.calls.try_iter().collect::<Vec<_>>(), []);
    assert_eq!(rings[0].used().idx().load(), 0);
    assert_eq!(rig.pending() & 0b10, 0b10, "the interrupt is kept");
    rig.config_write(4, &[6, 0]);
    rig.wait_for(&Call::Queue(0));
    assert_eq!(rings[0].used().idx().load(), 1);
    assert_eq!(rig.pending() & 0b10, 0, "and delivered");
    // A pause and a bus that is taken away do not end each other.
    let (ticket, quiet) = ticket();
    rig.device.pause(ticket);
    quiet.recv().expect("idle");
    rig.config_write(4, &[2, 0]);
    rig.device.resume();
    rig.config_write(4, &[6, 0]);
    rig.wait_for(&Call::Queue(0));
    rig.device.reset();
    rig.config_write(4, &[2, 0]);
    assert!(!rig.device.driver_ready());
}

#[test]
fn a_driver_that_becomes_ready_during_a_pause_is_served_at_the_resume() {
    let rig = Rig::new();
    let (ticket, quiet) = ticket();
    rig.device.pause(ticket);
    quiet.recv().expect("idle");
    let mut rings = rig.bring_up();
    rings[0].add_chain(1).expect("there is room");
    rig.kick(0);
    rig.settle_loop();
    assert_eq!(rings[0].used().idx().load(), 0);
    rig.device.resume();
    rig.wait_for(&Call::Queue(0));
    assert_eq!(rings[0].used().idx().load(), 1);
}

#[test]
fn a_reset_of_the_machine_brings_power_on_values_back() {
    let rig = Rig::new();
    rig.bring_up();
    rig.bar_write(0x401C, &0u32.to_le_bytes());
    let control = u64::from(rig.config_read(0x34, 1)) + 2;
    rig.config_write(control, &0x8000u16.to_le_bytes());
    rig.config_write(0x10, &(mmio_slot(bdf()) as u32 + 0x8000).to_le_bytes());
    assert_eq!(rig.vm.irqfd_count(), 1);
    let ranges_without_bar = rig.mmio.range_count() - 1;
    rig.device.reset();
    assert_eq!((rig.vm.irqfd_count(), rig.gsi.msi_count()), (0, 0));
    assert!(rig.vm.ioevent_addresses().is_empty());
    assert_eq!(rig.mmio.range_count(), ranges_without_bar);
    assert_eq!(rig.config_read(4, 2), 0);
    assert_eq!(rig.config_read(0x10, 4), mmio_slot(bdf()) as u32);
    assert_eq!(rig.config_read(control, 2) & 0xC000, 0);
    rig.bring_up();
    assert_eq!(
        rig.heard(),
        ["fake ready true", "fake ready false", "fake ready true"]
    );
}

/// A running device, saved after one of two buffers was served.
fn saved() -> (Rig, Section) {
    let rig = Rig::new();
    let mut rings = rig.bring_up();
    rings[0].add_chain(1).expect("there is room");
    rig.kick(0);
    rig.wait_for(&Call::Queue(0));
    rig.change(|device| device.config[0] = 0x99);
    let (ticket, quiet) = ticket();
    rig.device.pause(ticket);
    quiet.recv().expect("idle");
    rings[0].add_chain(1).expect("there is room");
    drop(rings);
    let section = rig.device.save().expect("it encodes");
    (rig, section)
}

#[test]
fn a_restored_device_continues_where_it_was() {
    let (mut rig, section) = saved();
    assert_eq!(section.schema, 1);
    assert_eq!(section.body["queues"][0]["next_avail"], 1);
    rig.replace_device();
    rig.heard();
    assert_eq!(rig.inspect("bar"), Value::Null);
    rig.device.restore(&section).expect("its own state");
    assert_eq!(rig.heard(), ["fake ready true"]);
    assert_eq!(rig.vm.ioevent_addresses().len(), 2);
    assert_eq!((rig.status(), rig.bar_read(0x2000, 1)), (15, 0x99));
    let again = rig.device.save().expect("it encodes");
    assert_eq!(again, section, "saved before it has run, it is the same");
    rig.settle_loop();
    assert!(
        rig.calls
            .try_iter()
            .all(|call| matches!(call, Call::Activate { .. }))
    );
    rig.device.resume();
    rig.wait_for(&Call::Queue(0));
    let position = rig.change(|device| device.queues[0].queue().state());
    assert_eq!(
        (position.next_avail, position.next_used),
        (2, 2),
        "the second buffer was served"
    );
    assert_eq!(rig.pending() & 0b0010, 0b0010);
}

#[test]
fn a_device_that_no_driver_has_touched_is_restored_as_such() {
    let mut rig = Rig::new();
    let section = rig.device.save().expect("it encodes");
    rig.replace_device();
    rig.device.restore(&section).expect("its own state");
    rig.device.resume();
    assert_eq!(rig.heard(), Vec::<String>::new());
    rig.bring_up();
    rig.kick(0);
    rig.wait_for(&Call::Queue(0));
}

#[test]
fn impossible_saved_states_are_refused_by_name() {
    let (mut rig, section) = saved();
    let cases: [(&str, Value, &str); 11] = [
        (
            "/device_type",
            json!(2),
            "saved device_type is 2: the device is of another type",
        ),
        (
            "/queues",
            json!([]),
            "saved queues is 0: the device has another number of queues",
        ),
        (
            "/status",
            json!(4),
            "saved status is 0x4: no driver can have got there",
        ),
        (
            "/status",
            json!(64),
            "saved status is 0x40: no driver can have got there",
        ),
        (
            "/driver_features",
            json!(1u64 << 32 | 1 << 50),
            "saved driver_features is 0x4000100000000: the device does not offer that",
        ),
        (
            "/queues/0/used_ring",
            json!(0x10_0000),
            "saved queues is queue 0: the used ring at 0x100000+0x86 is outside guest memory: the device cannot \
             work with that",
        ),
        (
            "/queues/2/size",
            json!(17),
            "saved queues is queue 2: size 17 is not a power of two up to 16: the device cannot work with that",
        ),
        (
            "/interrupts/queue_vectors",
            json!([0]),
            "saved interrupts.queue_vectors is 1: the device has another number of queues",
        ),
        (
            "/interrupts/msix/vectors",
            json!([]),
            "saved msix.vectors is 0: the device has another number of vectors",
        ),
        (
            "/config_space",
            json!({"0": 1}),
            "saved config_space is 0x01 at 0x000: the register cannot hold it",
        ),
        ("/queues/0/size", json!("big"), "the saved state is malformed"),
    ];
    for (pointer, value, message) in cases {
        let mut section = section.clone();
        *section.body.pointer_mut(pointer).expect("the field exists") = value;
        rig.replace_device();
        let error = rig.device.restore(&section).expect_err(pointer);
        assert_eq!(error.to_string(), message, "{pointer}");
    }
}

#[test]
fn a_dropped_device_leaves_nothing_behind() {
    let mut rig = Rig::new();
    rig.bring_up();
    rig.bar_write(0x401C, &0u32.to_le_bytes());
    let control = u64::from(rig.config_read(0x34, 1)) + 2;
    rig.config_write(control, &0x8000u16.to_le_bytes());
    rig.kick(0);
    rig.wait_for(&Call::Queue(0));
    assert_eq!((rig.vm.irqfd_count(), rig.vm.ioevent_addresses().len()), (1, 2));
    let ranges_without_bar = rig.mmio.range_count() - 1;
    let done = rig.change(|device| Arc::downgrade(&device.done));
    let Rig { slot, device, .. } = &mut rig;
    let weak = Arc::downgrade(device);
    *slot = None;
    assert_eq!(Arc::strong_count(device), 1, "only its owners hold a device");
    // Whatever the loop is doing with the device now, all is free when the last owner has let go.
    rig.kick(2);
    rig.replace_device();
    assert_eq!(weak.strong_count(), 0);
    assert_eq!((rig.vm.irqfd_count(), rig.gsi.msi_count()), (0, 0));
    assert!(rig.vm.ioevent_addresses().is_empty());
    assert_eq!(rig.mmio.range_count(), ranges_without_bar);
    rig.settle_loop();
    assert!(done.upgrade().is_none(), "the device itself is gone");
    rig.bring_up();
    rig.kick(2);
    rig.wait_for(&Call::Queue(2));
}

#[test]
fn a_device_that_is_taken_away_is_gone_though_a_vcpu_is_in_the_middle_of_an_access() {
    let mut rig = Rig::new();
    rig.bring_up();
    let ranges_without_bar = rig.mmio.range_count() - 1;
    let (held, done) = (
        rig.device.clone(),
        rig.change(|device| Arc::downgrade(&device.done)),
    );
    rig.heard();
    rig.slot = None;
    held.detach();
    assert!(done.upgrade().is_none(), "what it held on the host");
    assert!(rig.vm.ioevent_addresses().is_empty());
    let bar = mmio_slot(bdf());
    let window = rig.mmio.claim(bar, 0x8000, Arc::new(Silent));
    drop(window.expect("another may answer there now"));
    // What the vCPU does late: the BAR back on, and the driver ready, by way of the configuration space.
    held.config_write(4, &[6, 0]);
    for status in [0, 1, 3, 11, 15] {
        held.shared.bar_write(0x14, &[status]);
    }
    let mut status = [0xFF];
    held.shared.bar_read(0x14, &mut status);
    assert_eq!((status, rig.mmio.range_count()), ([0], ranges_without_bar));
    assert_eq!(rig.heard(), [""; 0], "nobody hears of it");
    assert!(held.with_device(|_: &mut FakeDevice| ()).is_none());
}

#[test]
fn a_device_that_is_left_to_its_driver_works_on_and_tells_nobody() {
    let mut rig = Rig::new();
    rig.bring_up();
    rig.heard();
    let device = rig.device.clone();
    rig.slot = None;
    device.orphan();
    rig.kick(2);
    rig.wait_for(&Call::Queue(2));
    assert_eq!(
        device.bar_range().map(|range| range.start),
        Some(mmio_slot(bdf()))
    );
    // A pause loses no kick, and the end of one makes none: what it would look at may be another kernel's.
    let (ticket, quiet) = ticket();
    device.pause(ticket);
    quiet.recv().expect("idle");
    rig.settle_loop();
    rig.drop_calls();
    rig.kick(2);
    device.resume();
    let first = rig.calls.recv_timeout(PATIENCE).expect("the call comes");
    assert_eq!(first, Call::Queue(2));
    rig.settle_loop();
    assert_eq!(rig.calls.try_iter().collect::<Vec<_>>(), []);
    device.shared.bar_write(0x14, &[0]);
    let mut status = [0xFF];
    device.shared.bar_read(0x14, &mut status);
    assert_eq!((status, device.driver_ready()), ([0], false));
    rig.bring_up();
    assert_eq!(rig.heard(), [""; 0], "nobody hears of it");
}

#[test]
fn resets_kicks_and_pauses_from_several_threads_never_lock_up() {
    let rig = Rig::new();
    let device = rig.device.clone();
    let supervisor = std::thread::spawn(move || {
        for _ in 0..200 {
            let (ticket, quiet) = ticket();
            device.pause(ticket);
            quiet.recv().expect("nothing is held");
            device.save().expect("any state can be saved");
            device.resume();
        }
    });
    for _ in 0..200 {
        let mut rings = rig.bring_up();
        rings[0].add_chain(1).expect("there is room");
        rig.kick(0);
        rig.config_write(0x10, &(mmio_slot(bdf()) as u32 + 0x8000).to_le_bytes());
        rig.config_write(0x10, &(mmio_slot(bdf()) as u32).to_le_bytes());
    }
    supervisor.join().expect("it found no fault");
    let mut rings = rig.bring_up();
    rig.drop_calls();
    rings[1].add_chain(1).expect("there is room");
    rig.kick(2);
    rig.settle_loop();
    assert_eq!(rings[1].used().idx().load(), 1);
    assert_eq!(rig.status(), 15);
}
