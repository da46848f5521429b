//! A machine of one segment with one fake device, and a driver that does what Linux's does.
//!
//! Accesses go over the bus, as a vCPU's do. MSI-X is enabled with the function mask set, so that an interrupt shows
//! as a pending bit; kicks take the slow way, which ends in the same eventfd as the kernel's.

use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use virtio_queue::mock::MockSplitQueue;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::fake_device::{Call, DEVICE_FEATURE, FakeDevice};
use crate::bus::Bus;
use crate::event_loop::{EventHandler, EventLoop, LoopListener, Registration, Source};
use crate::ids::{Bdf, UnitName};
use crate::machine::fake::FakeVm;
use crate::machine::gsi::GsiTable;
use crate::machine::ioevents::IoEvents;
use crate::memory::layout::{ecam_address, mmio_slot};
use crate::pci::root::PciRoot;
use crate::pci::slots::OccupiedSlot;
use crate::unit::{Unit, UnitListener};
use crate::virtio::features::TRANSPORT_FEATURES;
use crate::virtio::transport::{TransportResources, VirtioPciDevice};

pub const MEMORY_BYTES: usize = 0x2_0000;
pub const DRIVER_FEATURES: u64 = TRANSPORT_FEATURES & !(1 << 29) | DEVICE_FEATURE;
/// Longer than any test takes; only a failing test waits for it.
pub const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Default)]
pub struct Listener {
    pub heard: Mutex<Vec<String>>,
}

impl UnitListener for Listener {
    fn driver_ready(&self, unit: &UnitName, ready: bool) {
        let line = format!("{unit} ready {ready}");
        self.heard.lock().expect("no panic while locked").push(line);
    }

    fn needs_reset(&self, unit: &UnitName, reason: &str) {
        let line = format!("{unit} needs reset: {reason}");
        self.heard.lock().expect("no panic while locked").push(line);
    }
}

impl LoopListener for Listener {
    fn loop_started(&self) {}

    fn loop_failed(&self, words: &str) {
        let line = format!("the loop failed: {words}");
        self.heard.lock().expect("no panic while locked").push(line);
    }
}

/// Tells of every round of the event loop that was asked for.
struct Bell {
    fd: Arc<EventFd>,
    rounds: Sender<()>,
}

impl EventHandler for Bell {
    fn readable(&self, _token: u32) {
        let _ = self.fd.read();
        // A test that has seen enough no longer listens.
        let _ = self.rounds.send(());
    }
}

pub struct Rig {
    pub slot: Option<OccupiedSlot>,
    pub device: Arc<VirtioPciDevice>,
    pub calls: Receiver<Call>,
    pub vm: Arc<FakeVm>,
    pub gsi: GsiTable,
    pub mmio: Bus,
    pub listener: Arc<Listener>,
    pub memory: Arc<GuestMemoryMmap>,
    pub root: PciRoot,
    pub resources: TransportResources,
    bell: Arc<EventFd>,
    rounds: Receiver<()>,
    _bell_watch: Registration,
    _event_loop: EventLoop,
}

impl Rig {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    /// A rig whose device is prepared by `prepare`.
    pub fn with(prepare: impl FnOnce(&mut FakeDevice)) -> Self {
        let vm = Arc::new(FakeVm::default());
        let mmio = Bus::new();
        let root = PciRoot::new(&mmio).expect("the bus is empty");
        let listener = Arc::new(Listener::default());
        let event_loop = EventLoop::start("transport-test", listener.clone()).expect("the host has epoll");
        let bell = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("the host has eventfds"));
        let (sender, rounds) = channel();
        let source = Source {
            fd: bell.as_raw_fd(),
            token: 0,
        };
        let handler = Bell {
            fd: bell.clone(),
            rounds: sender,
        };
        let bell_watch = event_loop
            .handle()
            .register(vec![source], Arc::new(handler))
            .expect("it runs");
        let ranges = [(GuestAddress(0), MEMORY_BYTES)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("memory is free"));
        let gsi = GsiTable::new(vm.clone());
        let resources = TransportResources {
            mmio: mmio.clone(),
            gsi: gsi.clone(),
            ioevents: IoEvents::new(vm.clone()),
            event_loop: event_loop.handle(),
            memory: memory.clone().into(),
            listener: listener.clone(),
        };
        let (sender, calls) = channel();
        let device = Self::device(sender, resources.clone(), prepare);
        let slot = root.reserve(bdf()).expect("free").occupy(device.clone());
        Self {
            slot: Some(slot),
            device,
            calls,
            vm,
            gsi,
            mmio,
            listener,
            memory,
            root,
            resources,
            bell,
            rounds,
            _bell_watch: bell_watch,
            _event_loop: event_loop,
        }
    }

    /// Makes another device in the place of the present one, as after a power cycle, and a fresh list of calls.
    pub fn replace_device(&mut self) {
        self.slot = None;
        let (sender, calls) = channel();
        self.calls = calls;
        self.device = Self::device(sender, self.resources.clone(), |_| {});
        self.slot = Some(
            self.root
                .reserve(bdf())
                .expect("free")
                .occupy(self.device.clone()),
        );
    }

    fn device(
        sender: Sender<Call>,
        resources: TransportResources,
        prepare: impl FnOnce(&mut FakeDevice),
    ) -> Arc<VirtioPciDevice> {
        let mut device = FakeDevice::new(sender);
        prepare(&mut device);
        let name = UnitName::new("fake").expect("a good name");
        VirtioPciDevice::new(Box::new(device), name, bdf(), resources).expect("a good device")
    }

    pub fn config_read(&self, offset: u64, length: usize) -> u32 {
        let mut data = [0; 4];
        assert!(self.mmio.read(ecam_address(bdf()) + offset, &mut data[..length]));
        u32::from_le_bytes(data)
    }

    pub fn config_write(&self, offset: u64, data: &[u8]) {
        assert!(self.mmio.write(ecam_address(bdf()) + offset, data));
    }

    /// Reads BAR 0 where it lies at power-on.
    pub fn bar_read(&self, offset: u64, length: usize) -> u64 {
        let mut data = [0; 8];
        assert!(self.mmio.read(mmio_slot(bdf()) + offset, &mut data[..length]));
        u64::from_le_bytes(data)
    }

    pub fn bar_write(&self, offset: u64, data: &[u8]) {
        assert!(self.mmio.write(mmio_slot(bdf()) + offset, data));
    }

    /// Enables BAR 0 and MSI-X with the function mask set, so that interrupts show as pending bits.
    pub fn enable(&self) {
        self.config_write(4, &[6, 0]);
        let msix = self.config_read(0x34, 1) + 2;
        self.config_write(u64::from(msix), &0xC000u16.to_le_bytes());
    }

    pub fn status(&self) -> u8 {
        self.bar_read(0x14, 1) as u8
    }

    pub fn set_status(&self, status: u8) {
        self.bar_write(0x14, &[status]);
    }

    /// Everything up to `FEATURES_OK`, which is read back.
    pub fn negotiate(&self, features: u64) -> bool {
        self.enable();
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.set_status(1);
        self.set_status(3);
        for (select, word) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            self.bar_write(0x08, &select.to_le_bytes());
            self.bar_write(0x0C, &word.to_le_bytes());
        }
        self.set_status(11);
        self.status() & 8 != 0
    }

    /// Sets up queue `index` with its vector `index + 1`.
    pub fn set_up_queue(&self, index: u16, size: u16, addresses: [u64; 3]) {
        self.bar_write(0x16, &index.to_le_bytes());
        self.bar_write(0x18, &size.to_le_bytes());
        self.bar_write(0x1A, &(index + 1).to_le_bytes());
        for (offset, address) in [0x20, 0x28, 0x30].into_iter().zip(addresses) {
            self.bar_write(offset, &(address as u32).to_le_bytes());
            self.bar_write(offset + 4, &((address >> 32) as u32).to_le_bytes());
        }
        self.bar_write(0x1C, &1u16.to_le_bytes());
    }

    /// The driver's side of queue `index`.
    pub fn ring(&self, index: u16) -> MockSplitQueue<'_, GuestMemoryMmap> {
        let start = 0x1000 + u64::from(index) * 0x1000;
        MockSplitQueue::create(&*self.memory, GuestAddress(start), 16)
    }

    /// Brings the device up with queues 0 and 2, as Linux would, and returns the rings.
    pub fn bring_up(&self) -> [MockSplitQueue<'_, GuestMemoryMmap>; 2] {
        assert!(self.negotiate(DRIVER_FEATURES));
        self.bar_write(0x10, &0u16.to_le_bytes());
        let rings = [self.ring(0), self.ring(2)];
        for (index, ring) in [0, 2].into_iter().zip(&rings) {
            let addresses = [ring.desc_table_addr(), ring.avail_addr(), ring.used_addr()];
            self.set_up_queue(index, 16, addresses.map(|address| address.0));
        }
        self.set_status(15);
        assert_eq!(self.status(), 15);
        rings
    }

    pub fn kick(&self, queue_index: u16) {
        let offset = 0x3000 + u64::from(queue_index) * 4;
        self.bar_write(offset, &queue_index.to_le_bytes());
    }

    /// The MSI-X vectors that fired: bit 0 is the configuration's, then one per queue.
    pub fn pending(&self) -> u8 {
        self.bar_read(0x5000, 1) as u8
    }

    /// Waits until the device is called for `expected`; other calls before it are dropped.
    pub fn wait_for(&self, expected: &Call) {
        while self.calls.recv_timeout(PATIENCE).expect("the call comes") != *expected {}
    }

    /// Waits until the event loop has done all that was there to do.
    ///
    /// A round ends when the loop serves a descriptor of ours. Watches begin at the end of the round in which they
    /// were asked for and are served in the next, before or after ours: the third round has seen everything.
    pub fn settle_loop(&self) {
        for _ in 0..3 {
            self.bell.write(1).expect("the counter is not full");
            self.rounds.recv_timeout(PATIENCE).expect("the loop answers");
        }
    }

    pub fn drop_calls(&self) {
        while self.calls.try_recv().is_ok() {}
    }

    pub fn change<R>(&self, change: impl FnOnce(&mut FakeDevice) -> R) -> R {
        self.device.with_device(change).expect("it is the fake device")
    }

    pub fn heard(&self) -> Vec<String> {
        std::mem::take(&mut self.listener.heard.lock().expect("no panic while locked"))
    }

    pub fn inspect(&self, field: &str) -> serde_json::Value {
        self.device.inspect()[field].clone()
    }
}

pub fn bdf() -> Bdf {
    Bdf::new(1, 3).expect("slots go to 31")
}
