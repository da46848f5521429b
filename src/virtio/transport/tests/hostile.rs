//! A driver that breaks the rules: it gets `DEVICE_NEEDS_RESET` or nothing, and the machine goes on.
//!
//! The single cases name each rule and what is said about it; the storm looks for the rules that nobody thought of.

use std::sync::mpsc::channel;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::fake_device::{Call, FakeDevice};
use super::rig::{DRIVER_FEATURES, Rig, bdf};
use crate::ids::{Bdf, UnitName};
use crate::memory::layout::{ecam_address, mmio_slot, mmio_window};
use crate::unit::Unit;
use crate::virtio::transport::VirtioPciDevice;

/// Sets queue 0 up as told and becomes ready; returns why the device needs a reset.
fn refusal(size: u16, addresses: [u64; 3]) -> String {
    let rig = Rig::new();
    assert!(rig.negotiate(DRIVER_FEATURES));
    rig.bar_write(0x10, &0u16.to_le_bytes());
    rig.set_up_queue(0, size, addresses);
    rig.set_status(15);
    assert_eq!(rig.status(), 15 | 64);
    assert!(!rig.device.driver_ready());
    assert_eq!(
        (rig.pending(), rig.bar_read(0x1000, 1)),
        (1, 2),
        "the driver is told"
    );
    assert!(rig.vm.ioevent_addresses().is_empty());
    let mut heard = rig.heard();
    let reason = heard.pop().expect("the listener is told");
    assert_eq!(heard, Vec::<String>::new());
    // A reset helps.
    rig.bring_up();
    assert_eq!(rig.heard(), ["fake ready true"]);
    reason
}

#[test]
fn rings_that_cannot_work_need_a_reset_and_say_why() {
    let good = [0x1000, 0x2000, 0x3000];
    let cases = [
        (12, good, "size 12 is not a power of two up to 16"),
        (0, good, "size 0 is not a power of two up to 16"),
        (32, good, "size 32 is not a power of two up to 16"),
        (
            16,
            [0; 3],
            "the descriptor table at 0x0 has no address aligned to 16 bytes",
        ),
        (
            16,
            [0x1000, 0x2001, 0x3000],
            "the available ring at 0x2001 has no address aligned to 2 bytes",
        ),
        (
            16,
            [0x1000, 0x2000, 0x2_0000],
            "the used ring at 0x20000+0x86 is outside guest memory",
        ),
        (
            16,
            [u64::MAX - 15, 0x2000, 0x3000],
            "the descriptor table at 0xfffffffffffffff0+0x100 is outside guest memory",
        ),
    ];
    for (size, addresses, reason) in cases {
        assert_eq!(
            refusal(size, addresses),
            format!("fake needs reset: queue 0: {reason}")
        );
    }
}

#[test]
fn a_device_that_refuses_the_driver_needs_a_reset() {
    let rig = Rig::with(|device| device.refuse_activation = true);
    rig.negotiate(DRIVER_FEATURES);
    rig.set_status(15);
    assert_eq!(rig.status(), 15 | 64);
    assert_eq!(rig.heard(), ["fake needs reset: the device is in a bad mood"]);
    rig.set_status(15 | 64);
    assert_eq!(rig.heard(), Vec::<String>::new(), "it is not activated again");
    rig.change(|device| device.refuse_activation = false);
    rig.bring_up();
}

#[test]
fn an_available_index_that_jumps_needs_a_reset_and_ends_all_work() {
    let rig = Rig::new();
    let rings = rig.bring_up();
    rings[0].avail().idx().store(1000);
    rig.kick(0);
    rig.settle_loop();
    assert_eq!(rig.status(), 15 | 64);
    let heard = rig.heard();
    assert_eq!(heard.len(), 2, "{heard:?}");
    assert!(heard[1].starts_with("fake needs reset: queue 0: "), "{heard:?}");
    rig.drop_calls();
    rig.kick(2);
    rig.settle_loop();
    assert_eq!(rig.calls.try_iter().collect::<Vec<_>>(), []);
    // A broken device can be saved, restored and reset.
    let section = rig.device.save().expect("it encodes");
    rig.device.restore(&section).expect("its own state");
    assert_eq!(rig.status(), 15 | 64);
    rig.device.resume();
    rig.bring_up();
    rig.wait_for(&Call::Reset);
}

#[test]
fn queues_are_fixed_once_they_are_enabled_and_kicks_of_others_are_nobodys() {
    let rig = Rig::new();
    let rings = rig.bring_up();
    rig.bar_write(0x16, &0u16.to_le_bytes());
    rig.bar_write(0x20, &0xDEAD_0000u64.to_le_bytes());
    assert_eq!(rig.bar_read(0x20, 8), rings[0].desc_table_addr().0);
    for queue_index in [1, 3, 255, 1023] {
        rig.kick(queue_index);
    }
    rig.bar_write(0x3002, &[0; 2]);
    rig.bar_write(0x3000, &[0; 8]);
    rig.settle_loop();
    let unexpected = |call: &Call| *call == Call::Queue(1) || matches!(call, Call::Event { .. });
    assert!(!rig.calls.try_iter().any(|call| unexpected(&call)));
    assert_eq!(rig.status(), 15);
}

#[test]
fn devices_and_places_that_cannot_be_are_refused_by_name() {
    let rig = Rig::new();
    let refusal = |sizes: Vec<u16>, segment: u16| {
        let (sender, _calls) = channel();
        let mut device = FakeDevice::new(sender);
        device.queue_sizes_max = sizes;
        let name = UnitName::new("odd").expect("a good name");
        let bdf = Bdf::new(segment, 1).expect("slot 1");
        let made = VirtioPciDevice::new(Box::new(device), name, bdf, rig.resources.clone());
        made.expect_err("it cannot be").to_string()
    };
    assert_eq!(refusal(vec![16; 256], 0), "odd has 256 queues, the limit is 255");
    assert_eq!(
        refusal(vec![16, 24], 0),
        "queue 1 of odd has size 24, which is not a power of two up to 32768"
    );
    assert_eq!(
        refusal(vec![16], 4),
        "odd is to be at 0004:00:01.0, the machine has 4 segments"
    );
}

/// One thing a guest can do.
#[derive(Debug, Clone)]
enum Step {
    Config(u64, Vec<u8>),
    ConfigRead(u64, usize),
    Bar(u64, Vec<u8>),
    BarRead(u64, usize),
    Address(u32),
    Memory(u64, u16),
}

fn step() -> impl Strategy<Value = Step> {
    let data = || {
        let width = prop::sample::select(vec![1usize, 2, 4, 8]);
        width.prop_flat_map(|width| prop::collection::vec(interesting(), width))
    };
    let bar_offset = || {
        prop_oneof![
            0u64..0x38,
            0x1000u64..0x1004,
            0x2000u64..0x2010,
            0x3000u64..0x3010,
            0x4000u64..0x4048,
            0u64..0x8000
        ]
    };
    let width = || prop::sample::select(vec![1usize, 2, 4, 8]);
    prop_oneof![
        2 => (0u64..0x100, data()).prop_map(|(offset, data)| Step::Config(offset, data)),
        1 => (0u64..0x1000, width()).prop_map(|(offset, width)| Step::ConfigRead(offset, width)),
        6 => (bar_offset(), data()).prop_map(|(offset, data)| Step::Bar(offset, data)),
        2 => (bar_offset(), width()).prop_map(|(offset, width)| Step::BarRead(offset, width)),
        2 => prop::sample::select(vec![0u8, 1, 3, 11, 15]).prop_map(|status| Step::Bar(0x14, vec![status])),
        1 => (0u32..64).prop_map(|page| Step::Address(mmio_window(1) as u32 + (page << 15))),
        1 => (0u64..0x4000, any::<u16>()).prop_map(|(address, value)| Step::Memory(address & !1, value)),
    ]
}

fn interesting() -> impl Strategy<Value = u8> {
    prop_oneof![
        Just(0u8),
        Just(1),
        Just(0x10),
        Just(0x80),
        Just(0xFF),
        any::<u8>()
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn after_any_storm_a_good_driver_brings_the_device_up(
        negotiated in any::<bool>(),
        steps in prop::collection::vec(step(), 0..80),
    ) {
        let rig = Rig::new();
        if negotiated {
            rig.bring_up();
        }
        rig.config_write(4, &[2, 0]);
        let mut base = mmio_slot(bdf());
        for step in steps {
            match step {
                Step::Config(offset, data) => {
                    rig.mmio.write(ecam_address(bdf()) + offset, &data);
                }
                Step::ConfigRead(offset, width) => {
                    rig.mmio.read(ecam_address(bdf()) + offset, &mut vec![0; width]);
                }
                Step::Bar(offset, data) => {
                    rig.mmio.write(base + offset, &data);
                }
                Step::BarRead(offset, width) => {
                    rig.mmio.read(base + offset, &mut vec![0; width]);
                }
                Step::Address(address) => {
                    rig.config_write(0x10, &address.to_le_bytes());
                    rig.config_write(4, &[2, 0]);
                    base = u64::from(address);
                }
                Step::Memory(address, value) => {
                    rig.memory.write_obj(value, GuestAddress(address)).expect("in memory");
                }
            }
        }
        rig.device.save().expect("any state can be saved");
        rig.config_write(0x10, &(mmio_slot(bdf()) as u32).to_le_bytes());
        rig.config_write(4, &[2, 0]);
        let mut rings = rig.bring_up();
        rig.drop_calls();
        rings[0].add_chain(1).expect("there is room");
        rig.kick(0);
        rig.wait_for(&Call::Queue(0));
        rig.settle_loop();
        prop_assert_eq!(rings[0].used().idx().load(), 1);
        rig.device.reset();
        prop_assert_eq!((rig.vm.irqfd_count(), rig.gsi.msi_count()), (0, 0));
        prop_assert!(rig.vm.ioevent_addresses().is_empty());
    }
}

#[test]
fn a_driver_that_outruns_the_event_loop_is_told_to_reset() {
    let rig = Rig::new();
    let (go_on, wait) = channel::<()>();
    let stuck = move || wait.recv().expect("the test lets it go on");
    rig.resources.event_loop.run_once(stuck).expect("the loop runs");
    let refused = (0..10_000).any(|_| {
        assert!(rig.negotiate(DRIVER_FEATURES));
        rig.set_status(15);
        rig.status() & 64 != 0
    });
    assert!(refused, "the loop has room without end");
    assert!(!rig.device.driver_ready());
    let last = rig.heard().pop().expect("the listener is told");
    assert!(last.starts_with("fake needs reset: 1024 handlers wait"), "{last}");
    go_on.send(()).expect("the loop waits");
    rig.settle_loop();
    rig.bring_up();
    rig.drop_calls();
    rig.kick(0);
    rig.wait_for(&Call::Queue(0));
}
