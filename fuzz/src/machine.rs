//! The bus, PCI and event loop of a VM, with virtio devices in slots, over a host that only keeps books.
//!
//! The input plays the guest's vCPUs; the devices run on an event loop of their own as they do in a VM.

use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use arbitrary::Arbitrary;
use vm_lifecycle::bus::Bus;
use vm_lifecycle::event_loop::{EventLoop, LoopHandle};
use vm_lifecycle::ids::{Bdf, DiskName, MacAddr, PortName, UnitName};
use vm_lifecycle::machine::fake::FakeVm;
use vm_lifecycle::machine::gsi::GsiTable;
use vm_lifecycle::machine::ioevents::IoEvents;
use vm_lifecycle::memory::layout::{SEGMENT_COUNT, ecam_address, mmio_slot};
use vm_lifecycle::net::fake::FakeNet;
use vm_lifecycle::pci::root::PciRoot;
use vm_lifecycle::pci::slots::OccupiedSlot;
use vm_lifecycle::storage::MemoryDisk;
use vm_lifecycle::unit::{PauseTicket, Unit};
use vm_lifecycle::virtio::block::Block;
use vm_lifecycle::virtio::console::{Console, ConsolePorts, PortConfig};
use vm_lifecycle::virtio::device::VirtioDevice;
use vm_lifecycle::virtio::net::Net;
use vm_lifecycle::virtio::rng::Rng;
use vm_lifecycle::virtio::transport::{TransportResources, VirtioPciDevice};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::Deaf;
use crate::memory::Books;

/// Guest memory, from address 0.
pub const MEMORY_BYTES: u64 = 0x4_0000;
/// Nothing here takes that long; only a finding waits for it.
const PATIENCE: Duration = Duration::from_secs(20);
/// The parts of BAR 0 and a few of the common configuration's registers (virtio 1.2 §4.1.4.3).
pub const DEVICE_CONFIG: u64 = 0x2000;
pub const NOTIFY: u64 = 0x3000;
pub const MSIX_TABLE: u64 = 0x4000;
pub const DEVICE_STATUS: u64 = 0x14;
/// A bit of `device_status` (virtio 1.2 §2.1).
const DEVICE_NEEDS_RESET: u64 = 0x40;

/// The devices there are.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Kind {
    Block,
    Net,
    Rng,
    Console,
    Mem,
    Balloon,
}

/// A VM without vCPUs.
pub struct Machine {
    pub vm: Arc<FakeVm>,
    pub gsi: GsiTable,
    pub mmio: Bus,
    pub memory: Arc<GuestMemoryMmap>,
    pub root: PciRoot,
    resources: TransportResources,
    event_loop: Arc<EventLoop>,
}

/// A device in its slot, and the host's ends of it.
pub struct Slotted {
    slot: Option<OccupiedSlot>,
    pub device: Arc<VirtioPciDevice>,
    _network: Vec<UnixDatagram>,
    _ports: Option<ConsolePorts>,
}

impl Default for Machine {
    fn default() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES as usize)]);
        let event_loop = EventLoop::start("fuzz-devices", Arc::new(Deaf)).expect("the host has epoll");
        Self::new(Arc::new(memory.expect("memory is free")), Arc::new(event_loop))
    }
}

impl Machine {
    fn new(memory: Arc<GuestMemoryMmap>, event_loop: Arc<EventLoop>) -> Self {
        let vm = Arc::new(FakeVm::default());
        let mmio = Bus::new();
        let gsi = GsiTable::new(vm.clone());
        Self {
            root: PciRoot::new(&mmio).expect("the bus is empty"),
            resources: TransportResources {
                mmio: mmio.clone(),
                gsi: gsi.clone(),
                ioevents: IoEvents::new(vm.clone()),
                event_loop: event_loop.handle(),
                memory: memory.clone().into(),
                listener: Arc::new(Deaf),
            },
            vm,
            gsi,
            mmio,
            memory,
            event_loop,
        }
    }

    /// An empty machine with this one's memory, to restore into. It shares the event loop, which is faster.
    pub fn twin(&self) -> Self {
        Self::new(self.memory.clone(), self.event_loop.clone())
    }

    /// Puts a device of `kind` into `slot` of segment 1.
    pub fn put(&self, kind: Kind, slot: u8) -> Slotted {
        let (mut network, mut ports) = (Vec::new(), None);
        let device: Box<dyn VirtioDevice> = match kind {
            Kind::Block => {
                let disk = MemoryDisk::new(64).expect("descriptors are free");
                let name = DiskName::new("disk").expect("a good name");
                Box::new(Block::new(&name, Box::new(disk), 2).expect("descriptors are free"))
            }
            Kind::Net => {
                let (backend, far) = FakeNet::new(2).expect("descriptors are free");
                network = far;
                let mac = MacAddr::new([0x52, 1, 2, 3, 4, 5]).expect("a unicast address");
                Box::new(Net::new(mac, Box::new(backend)).expect("descriptors are free"))
            }
            Kind::Rng => Box::new(Rng::new().expect("the host has entropy")),
            Kind::Console => {
                let port = |name, console| PortConfig {
                    name: PortName::new(name).expect("a good name"),
                    console,
                };
                let made = Console::new(vec![port("tty", true), port("agent", false)]);
                let (console, host) = made.expect("descriptors are free");
                ports = Some(host);
                Box::new(console)
            }
            Kind::Mem => {
                let mut mem = Arc::new(Books::default()).mem();
                mem.set_requested(64 << 20).expect("the region is larger");
                Box::new(mem)
            }
            Kind::Balloon => Box::new(Arc::new(Books::default()).balloon()),
        };
        let bdf = Bdf::new(1, slot).expect("slots go to 31");
        let name = UnitName::new("device").expect("a good name");
        let device = VirtioPciDevice::new(device, name, bdf, self.resources.clone());
        let device = device.expect("the machine has this segment");
        let slot = self
            .root
            .reserve(bdf)
            .expect("the slot is free")
            .occupy(device.clone());
        Slotted {
            slot: Some(slot),
            device,
            _network: network,
            _ports: ports,
        }
    }

    /// Waits until the event loop has looked at every descriptor that was readable. What a watch asks for begins at
    /// the end of a round and is served in the next one.
    pub fn settle(&self) {
        let (sender, done) = channel();
        after_rounds(3, self.event_loop.handle(), sender);
        done.recv_timeout(PATIENCE).expect("the loop hangs");
    }

    /// Pauses `device` and waits until it is quiet.
    pub fn pause(&self, device: &VirtioPciDevice) {
        let (sender, quiet) = channel();
        device.pause(PauseTicket::new(move || {
            // A pause that was given up has nobody waiting.
            let _ = sender.send(());
        }));
        quiet
            .recv_timeout(PATIENCE)
            .expect("a paused device does not become quiet");
    }

    /// Pauses and saves `device`, and restores it as another one of the same kind, which must then save the same.
    pub fn check_save(&self, kind: Kind, device: &VirtioPciDevice) {
        self.pause(device);
        let saved = device.save().expect("it can be saved");
        let machine = self.twin();
        let other = machine.put(kind, device.bdf().slot());
        if let Err(error) = other.device.restore(&saved) {
            panic!("its own save is refused: {error}: {}", saved.body);
        }
        // The rings of a device that waits for a reset are not looked at again, so nobody keeps their positions.
        let broken = saved.body["status"]
            .as_u64()
            .is_some_and(|status| status & DEVICE_NEEDS_RESET != 0);
        let again = other.device.save().expect("it can be saved");
        assert!(broken || again == saved, "{} became {}", saved.body, again.body);
        other.device.resume();
        machine.settle();
        machine.pause(&other.device);
        machine.check_empty(other);
    }

    /// Takes the device out; nothing of it may be left.
    pub fn check_empty(self, slotted: Slotted) {
        drop(slotted);
        assert_eq!(self.mmio.range_count(), usize::from(SEGMENT_COUNT));
        assert_eq!(self.gsi.msi_count(), 0, "routes are left");
        assert_eq!(self.vm.irqfd_count(), 0, "irqfds are left");
        assert!(self.vm.ioevent_addresses().is_empty(), "ioeventfds are left");
    }

    /// The guest writes `bytes`, as far as there is memory.
    pub fn scribble(&self, address: u64, bytes: &[u8]) {
        let address = address % MEMORY_BYTES;
        let bytes = &bytes[..bytes.len().min((MEMORY_BYTES - address) as usize)];
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .expect("in memory");
    }
}

impl Drop for Slotted {
    fn drop(&mut self) {
        // The slot shows the device to the guest and goes first.
        self.slot = None;
    }
}

/// Tells `sender` after `count` more rounds of the loop.
fn after_rounds(count: u8, event_loop: LoopHandle, sender: Sender<()>) {
    let next = event_loop.clone();
    let job = move || match count {
        // Whoever gave up waiting has told why.
        0 => drop(sender.send(())),
        _ => after_rounds(count - 1, next, sender),
    };
    event_loop.run_once(job).expect("the loop runs");
}

/// A guest's view of one device: its configuration space and BAR 0 at the power-on address.
pub struct View<'m> {
    pub mmio: &'m Bus,
    pub bdf: Bdf,
}

impl View<'_> {
    pub fn config_read(&self, offset: u64, length: usize) -> u64 {
        self.read(ecam_address(self.bdf) + offset, length)
    }

    pub fn config_write(&self, offset: u64, value: u64, length: usize) {
        self.mmio
            .write(ecam_address(self.bdf) + offset, &value.to_le_bytes()[..length]);
    }

    pub fn bar_read(&self, offset: u64, length: usize) -> u64 {
        self.read(mmio_slot(self.bdf) + offset, length)
    }

    pub fn bar_write(&self, offset: u64, value: u64, length: usize) {
        self.mmio
            .write(mmio_slot(self.bdf) + offset, &value.to_le_bytes()[..length]);
    }

    fn read(&self, address: u64, length: usize) -> u64 {
        let mut data = [0; 8];
        self.mmio.read(address, &mut data[..length]);
        u64::from_le_bytes(data)
    }

    /// Does what a driver does: BAR, features among `features`, MSI-X, rings of 2^`size_log2` entries, `DRIVER_OK`.
    pub fn start_driver(&self, features: u64, size_log2: u8) {
        self.config_write(4, 6, 2);
        self.bar_write(DEVICE_STATUS, 0, 1);
        self.bar_write(DEVICE_STATUS, 3, 1);
        for select in 0..2 {
            self.bar_write(0x00, select, 4);
            self.bar_write(0x08, select, 4);
            let offered = self.bar_read(0x04, 4);
            self.bar_write(0x0C, offered & (features >> (32 * select) | select), 4);
        }
        self.bar_write(DEVICE_STATUS, 11, 1);
        let queue_count = self.bar_read(0x12, 2).min(16);
        for queue in 0..queue_count {
            let base = (queue + 1) * 0x3000;
            self.bar_write(MSIX_TABLE + queue * 16, 0xFEE0_0000, 8);
            self.bar_write(MSIX_TABLE + queue * 16 + 8, 0x41 + queue, 8);
            self.bar_write(0x16, queue, 2);
            let size = self.bar_read(0x18, 2).min(256) >> (size_log2 % 8);
            self.bar_write(0x18, size, 2);
            self.bar_write(0x1A, queue, 2);
            self.bar_write(0x20, base, 8);
            self.bar_write(0x28, base + 0x1000, 8);
            self.bar_write(0x30, base + 0x2000, 8);
            self.bar_write(0x1C, 1, 2);
        }
        self.bar_write(DEVICE_STATUS, 15, 1);
    }
}
