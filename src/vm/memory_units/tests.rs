//! What the supervisor may do while a device is at work for its guest, and what a machine's memory costs the host.

use std::sync::Weak;
use std::sync::mpsc::{Receiver, channel};

use super::*;
use crate::bus::Bus;
use crate::event_loop::EventLoop;
use crate::ids::{Bdf, UnitName};
use crate::machine::fake::FakeVm;
use crate::machine::gsi::GsiTable;
use crate::machine::ioevents::IoEvents;
use crate::virtio::device::VirtioDevice;
use crate::virtio::transport::TransportResources;
use crate::vm::mailbox::Message;

const MIB: u64 = 1 << 20;

/// What a guest hinted at.
#[derive(Debug, Default, Clone, Copy)]
pub struct Hints {
    pub hinted_bytes: u64,
    pub completed_count: u32,
}

impl Changes {
    pub(super) fn note_hints(&self, note: impl FnOnce(&mut Hints)) {
        note(&mut self.hints.lock().expect("no panic while locked"));
    }
}

impl MemoryUnits {
    /// Begins a round of hints at free pages; `false`: the guest's driver has none.
    pub fn begin_hints(&self) -> bool {
        let balloon = self.balloon.as_ref();
        balloon.and_then(|balloon| balloon.with_device(Balloon::start_hinting)) == Some(true)
    }

    /// The guest may use again what it hinted at.
    pub fn end_hints(&self) {
        if let Some(balloon) = &self.balloon {
            balloon.with_device(Balloon::end_hinting);
        }
    }

    pub fn hints(&self) -> Hints {
        *self.changes.hints.lock().expect("no panic while locked")
    }
}

struct Rig {
    units: MemoryUnits,
    mem: Arc<VirtioPciDevice>,
    event_loop: EventLoop,
    _messages: Receiver<Message>,
}

/// The memory of a machine without a guest: 256 MiB that can become 768 MiB.
fn rig() -> Rig {
    let config = VmConfig::builder("units", "/boot/vmlinuz")
        .startup_bytes(256 * MIB)
        .maximum_bytes(768 * MIB)
        .build()
        .expect("the configuration is valid");
    let (sender, messages) = channel();
    let mailbox = Mailbox::new(sender, 1, Arc::default(), Weak::new());
    let vm = Arc::new(FakeVm::default());
    let ram = GuestRam::new(256 * MIB, RamOptions::default(), 40).expect("nothing is touched");
    let memslots = Memslots::new(vm.clone(), 32);
    let runtime = new_runtime(&config, &ram, 40, memslots).expect("an empty region costs nothing");
    let event_loop = EventLoop::start("memory-test", Arc::new(mailbox.clone())).expect("the host has epoll");
    let resources = TransportResources {
        mmio: Bus::new(),
        gsi: GsiTable::new(vm.clone()),
        ioevents: IoEvents::new(vm),
        event_loop: event_loop.handle(),
        memory: ram.memory().clone().into(),
        listener: Arc::new(mailbox.clone()),
    };
    let host = HostMemory::default();
    let handle = event_loop.handle();
    let mut units =
        MemoryUnits::new(&config, &host, Arc::new(ram), runtime, mailbox, handle).expect("there is no limit");
    let device: Box<dyn VirtioDevice> = Box::new(
        units
            .new_mem()
            .expect("the region is good")
            .expect("the vm can grow"),
    );
    let bdf = Bdf::new(0, 3).expect("the machine has this slot");
    let name = UnitName::new("mem").expect("a short name");
    let mem = VirtioPciDevice::new(device, name, bdf, resources).expect("the host refuses nothing");
    units.set_mem(mem.clone());
    Rig {
        units,
        mem,
        event_loop,
        _messages: messages,
    }
}

fn plan(plugged_bytes: u64) -> Plan {
    Plan {
        requested_bytes: 256 * MIB + plugged_bytes,
        plugged_bytes,
        ballooned_bytes: 0,
    }
}

#[test]
fn nobody_waits_for_a_device_that_is_at_work() {
    let rig = rig();
    let (busy, is_busy) = channel();
    let (go_on, may_go_on) = channel::<()>();
    let mem = rig.mem.clone();
    let at_work = std::thread::spawn(move || {
        mem.ask_device(|_: &mut Mem| {
            busy.send(()).expect("the test waits");
            may_go_on.recv().expect("the test lets it go on");
        });
    });
    is_busy.recv().expect("the device gets to work");
    assert_eq!(rig.units.observe(), Observed::default());
    rig.units.promise(512 * MIB, true).expect("it is not checked");
    rig.units.request(&plan(256 * MIB), true);
    rig.units.request(&plan(128 * MIB), false);
    assert!(!rig.units.ask_guest_total(), "there is no balloon");
    assert!(!rig.mem.driver_ready() && rig.units.resident_bytes() == 0);
    go_on.send(()).expect("the device waits");
    at_work.join().expect("it does not panic");
    let (served, is_served) = channel();
    let tell = move || served.send(()).expect("the test waits");
    rig.event_loop.handle().run_once(tell).expect("the loop runs");
    is_served.recv().expect("the loop serves requests in order");
    let requested = rig.mem.ask_device(|mem: &mut Mem| mem.requested_bytes());
    assert_eq!(requested, Some(128 * MIB), "the last word counts");
}

#[test]
fn huge_pages_are_promised_by_the_slot() {
    let rig = rig();
    let runtime = rig.units.changes.runtime.clone().expect("the vm can grow");
    let changes = |huge_pages| Changes {
        ram: rig.units.changes.ram.clone(),
        runtime: Some(runtime.clone()),
        huge_pages,
        mailbox: rig.units.changes.mailbox.clone(),
        plugged_bytes: AtomicU64::new(0),
        ballooned_bytes: AtomicU64::new(0),
        plug_refused: AtomicBool::new(false),
        told: Mutex::default(),
        hints: Mutex::default(),
    };
    let (small, huge) = (changes(false), changes(true));
    let cost = |bytes| (small.cost_bytes(bytes) / MIB, huge.cost_bytes(bytes) / MIB);
    assert_eq!(cost(128 * MIB), (128, 256), "a balloon gives no huge page back");
    assert_eq!(cost(258 * MIB), (258, 384));
    assert_eq!(huge.taken_bytes(), 256 * MIB);
    runtime.plug(0, 2 * MIB).expect("it is in the region");
    runtime.plug(256 * MIB, 2 * MIB).expect("it is in the region");
    assert_eq!(huge.taken_bytes(), 512 * MIB, "two slots are mapped");
    assert_eq!(cost(260 * MIB), (260, 512));
}

#[test]
fn a_plug_that_the_host_refuses_is_told_until_the_guest_is_reminded() {
    let rig = rig();
    let changes = &rig.units.changes;
    let refused = MemHost::plug(&**changes, 1 << 40, 2 * MIB);
    assert!(refused.is_err() && rig.units.observe().plug_refused);
    rig.units.request(&plan(2 * MIB), false);
    assert!(rig.units.observe().plug_refused);
    rig.units.request(&plan(2 * MIB), true);
    assert!(!rig.units.observe().plug_refused);
}
