//! Builds the machine of a configuration on KVM, in the order that `docs/ARCHITECTURE.md` gives the reasons for.
//!
//! Everything taken from the host is held by a guard inside the machine, so a step that fails undoes all before it.

use std::sync::Arc;

use crate::acpi::device::{ACPI_DEVICE_BYTES, AcpiDevice};
use crate::acpi::pci_hotplug::registers::{PCI_HOTPLUG_BYTES, PciHotplug};
use crate::acpi::pvpanic::{PVPANIC_PORT, Pvpanic};
use crate::acpi::tables::AcpiTables;
use crate::boot::BootSource;
use crate::bus::{Bus, BusClaim, BusDevice};
use crate::config::{BALLOON_BDF, CONSOLE_BDF, DiskConfig, MEM_BDF, NicConfig, RNG_BDF, VmConfig};
use crate::event_loop::EventLoop;
use crate::ids::{Bdf, UnitName};
use crate::legacy::i8042::I8042;
use crate::legacy::reset_control::ResetControl;
use crate::legacy::rtc::{RTC_PORT_COUNT, Rtc};
use crate::legacy::serial::Serial;
use crate::machine::clock::Clock;
use crate::machine::gsi::GsiTable;
use crate::machine::ioevents::IoEvents;
use crate::machine::irqchip::{Irqchip, Pit};
use crate::machine::kvm::{Kvm, KvmVm};
use crate::machine::memslots::Memslots;
use crate::machine::vcpu::{Buses, Vcpu};
use crate::memory::host::HostMemory;
use crate::memory::layout::{
    ACPI_REGISTERS_BASE, GED_GSI, HOTPLUG_OFFSET, I8042_COMMAND_PORT, RESET_CONTROL_PORT, RTC_PORT,
    SERIAL_GSI, SERIAL_PORT, SERIAL_PORT_COUNT,
};
use crate::memory::region::{GuestRam, RamOptions};
use crate::memory::runtime::RuntimeMemory;
use crate::pci::root::PciRoot;
use crate::unit::Unit;
use crate::virtio::block::Block;
use crate::virtio::console::{Console, PortConfig};
use crate::virtio::device::VirtioDevice;
use crate::virtio::rng::Rng;
use crate::virtio::transport::{TransportResources, VirtioPciDevice};
use crate::vm::device_set::DeviceSet;
use crate::vm::host::{HostDevices, HostPort};
use crate::vm::mailbox::Mailbox;
use crate::vm::memory_units::{MemoryUnits, new_runtime};
use crate::vm::platform::{BuildError, Machine, Platform};
use crate::vm::thread_role::ThreadRole;
use crate::vm::units::{KvmMachine, build_nic};

/// Builds machines on this host's KVM, with devices that get their host side from `H`.
pub struct KvmPlatform<H> {
    host: Arc<H>,
    memory: HostMemory,
}

impl<H: HostDevices + 'static> KvmPlatform<H> {
    /// Uses `host` for every machine built. What the host can promise to its VMs is shared by the VMs of this platform.
    pub fn new(host: H) -> Self {
        Self::with_memory(host, HostMemory::default())
    }

    /// The same, with what the host can promise shared by all platforms that have a clone of `memory`.
    pub fn with_memory(host: H, memory: HostMemory) -> Self {
        Self {
            host: Arc::new(host),
            memory,
        }
    }
}

impl<H: HostDevices + 'static> Platform for KvmPlatform<H> {
    fn check(&self, config: &VmConfig) -> Result<(), BuildError> {
        let kvm = Kvm::open()?;
        check_vcpus(&kvm, config)?;
        let ram = new_ram(&kvm, config)?;
        open_boot(config)?.check(&ram)?;
        let memory = config.memory();
        let runtime_bytes = memory.maximum_bytes - memory.startup_bytes;
        RuntimeMemory::check(&ram, runtime_bytes, kvm.physical_address_bits())?;
        // All stay open until the end: the same image twice is in use, not free.
        let _disks = config
            .disks()
            .iter()
            .map(|disk| self.open_disk(disk))
            .collect::<Result<Vec<_>, _>>()?;
        let _nics = config
            .nics()
            .iter()
            .map(|nic| self.open_nic(nic))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(())
    }

    fn build(&self, config: &VmConfig, mailbox: Mailbox) -> Result<Arc<dyn Machine>, BuildError> {
        Ok(Arc::new(self.assemble(config, mailbox)?))
    }

    fn thread_started(&self, role: ThreadRole) {
        self.host.thread_started(role);
    }
}

impl<H: HostDevices + 'static> KvmPlatform<H> {
    /// Builds the machine as [`Platform::build`] does, for those who must know what it is made of.
    pub(super) fn assemble(&self, config: &VmConfig, mailbox: Mailbox) -> Result<KvmMachine, BuildError> {
        let kvm = Kvm::open()?;
        check_vcpus(&kvm, config)?;
        let boot = open_boot(config)?;
        let mut assembly = Assembly::new(&kvm, config, &self.memory, mailbox, self.host.clone())?;
        let serial = assembly.add_platform(self.serial_output(config)?)?;
        let entropy = |source| BuildError::Host {
            what: "its source of entropy",
            source,
        };
        assembly.add_virtio(
            platform_name("rng"),
            RNG_BDF,
            Box::new(Rng::new().map_err(entropy)?),
        )?;
        if let Some(console) = self.console(config)? {
            assembly.add_virtio(platform_name("console"), CONSOLE_BDF, Box::new(console))?;
        }
        assembly.add_memory(config)?;
        for disk in config.disks() {
            let eventfd = |source| BuildError::Host {
                what: "an eventfd for a disk",
                source,
            };
            let backend = self.open_disk(disk)?;
            let block = Block::new(&disk.name, backend, queue_count(config)).map_err(eventfd)?;
            assembly.add_virtio(disk.unit_name(), disk.bdf, Box::new(block))?;
        }
        for nic in config.nics() {
            assembly.add_nic(nic)?;
        }
        assembly.finish(config.cpu_count(), boot, serial)
    }

    fn serial_output(&self, config: &VmConfig) -> Result<Box<dyn std::io::Write + Send>, BuildError> {
        let output = self.host.serial_output(config);
        output.map_err(|source| BuildError::Host {
            what: "the serial port's output",
            source,
        })
    }

    /// The console with its ports connected; `None` when the host gives no ports.
    fn console(&self, config: &VmConfig) -> Result<Option<Console>, BuildError> {
        let refused = |source| BuildError::Host {
            what: "the console's ports",
            source,
        };
        let host_ports = self.host.ports(config).map_err(refused)?;
        if host_ports.is_empty() {
            return Ok(None);
        }
        let describe = |port: &HostPort| PortConfig {
            name: port.name.clone(),
            console: port.console,
        };
        let (console, ports) = Console::new(host_ports.iter().map(describe).collect())?;
        for HostPort {
            name,
            console: _,
            stream,
        } in host_ports
        {
            ports.attach(&name, stream)?;
        }
        Ok(Some(console))
    }

    fn open_disk(&self, disk: &DiskConfig) -> Result<Box<dyn crate::storage::DiskBackend>, BuildError> {
        let opened = self.host.disk(disk);
        opened.map_err(|source| BuildError::Disk {
            name: disk.name.clone(),
            source,
        })
    }

    fn open_nic(&self, nic: &NicConfig) -> Result<Box<dyn crate::net::NetBackend>, BuildError> {
        let opened = self.host.nic(nic);
        opened.map_err(|source| BuildError::Nic {
            name: nic.name.clone(),
            source,
        })
    }
}

fn check_vcpus(kvm: &Kvm, config: &VmConfig) -> Result<(), BuildError> {
    let count = u32::from(config.cpu_count());
    let count_max = kvm.vcpu_count_max();
    if count > count_max {
        Err(BuildError::Vcpus { count, count_max })
    } else {
        Ok(())
    }
}

fn open_boot(config: &VmConfig) -> Result<BootSource, BuildError> {
    let boot = config.boot();
    Ok(BootSource::open(
        &boot.kernel,
        boot.initrd.as_deref(),
        &boot.cmdline,
    )?)
}

fn new_ram(kvm: &Kvm, config: &VmConfig) -> Result<GuestRam, BuildError> {
    let memory = config.memory();
    let options = RamOptions {
        huge_pages: memory.huge_pages,
    };
    Ok(GuestRam::new(
        memory.startup_bytes,
        options,
        kvm.physical_address_bits(),
    )?)
}

/// One queue per vCPU spares the guest its locks; more than four brings a single event loop nothing.
fn queue_count(config: &VmConfig) -> u16 {
    config.cpu_count().clamp(1, 4).into()
}

fn platform_name(name: &'static str) -> UnitName {
    UnitName::new(name).expect("a short name")
}

/// A machine that is being built.
struct Assembly {
    vm: Arc<KvmVm>,
    memory: MemoryUnits,
    ram: Arc<GuestRam>,
    memslots: Vec<crate::machine::memslots::Memslot>,
    buses: Buses,
    gsi: GsiTable,
    event_loop: EventLoop,
    resources: TransportResources,
    pci: Arc<PciRoot>,
    mailbox: Mailbox,
    host: Arc<dyn HostDevices>,
    claims: Vec<BusClaim>,
    units: Vec<Arc<dyn Unit>>,
    devices: DeviceSet,
    acpi: Arc<AcpiDevice>,
    hotplug: Arc<PciHotplug>,
}

impl Assembly {
    fn new(
        kvm: &Kvm,
        config: &VmConfig,
        host_memory: &HostMemory,
        mailbox: Mailbox,
        host: Arc<dyn HostDevices>,
    ) -> Result<Self, BuildError> {
        let vm = kvm.create_vm()?;
        let ram = Arc::new(new_ram(kvm, config)?);
        let all_memslots = Memslots::new(vm.clone(), kvm.memslot_count_max());
        let memslots = ram.plug_in(&all_memslots)?;
        let runtime = new_runtime(config, &ram, kvm.physical_address_bits(), all_memslots)?;
        let memory = match &runtime {
            Some(runtime) => runtime.memory().clone(),
            None => ram.memory().clone().into(),
        };
        let gsi = GsiTable::new(vm.clone());
        gsi.install()?;
        let buses = Buses {
            pio: Bus::new(),
            mmio: Bus::new(),
        };
        let event_loop = EventLoop::start("vm-devices", Arc::new(mailbox.clone()))?;
        let resources = TransportResources {
            mmio: buses.mmio.clone(),
            gsi: gsi.clone(),
            ioevents: IoEvents::new(vm.clone()),
            event_loop: event_loop.handle(),
            memory,
            listener: Arc::new(mailbox.clone()),
        };
        let mmio = buses.mmio.clone();
        let pci = Arc::new(PciRoot::new(&mmio)?);
        let acpi = AcpiDevice::new(gsi.line(GED_GSI)?, Arc::new(mailbox.clone()));
        let acpi = Arc::new(acpi);
        let listener = Arc::new(mailbox.clone());
        let hotplug = Arc::new(PciHotplug::new(acpi.clone(), pci.clone(), mmio, listener));
        let units: Vec<Arc<dyn Unit>> = vec![
            Arc::new(Irqchip::new(vm.clone())?),
            Arc::new(Pit::new(vm.clone())?),
            Arc::new(Clock::new(vm.clone())),
            pci.clone(),
        ];
        Ok(Self {
            vm,
            memory: MemoryUnits::new(
                config,
                host_memory,
                ram.clone(),
                runtime,
                mailbox.clone(),
                event_loop.handle(),
            )?,
            ram,
            memslots,
            buses,
            gsi,
            event_loop,
            resources,
            pci,
            mailbox,
            host,
            claims: Vec::new(),
            units,
            devices: DeviceSet::new(hotplug.clone()),
            acpi,
            hotplug,
        })
    }

    /// The devices that every machine has at fixed ports and addresses; hands back the serial port.
    fn add_platform(&mut self, output: Box<dyn std::io::Write + Send>) -> Result<Arc<Serial>, BuildError> {
        let power = Arc::new(self.mailbox.clone());
        let mailbox = self.mailbox.clone();
        let begin = move || mailbox.own_thread(ThreadRole::Serial);
        let serial = Arc::new(Serial::new(self.gsi.line(SERIAL_GSI)?, output, begin));
        let rtc = Arc::new(Rtc::new());
        let i8042 = Arc::new(I8042::new(power.clone()));
        let reset_control = Arc::new(ResetControl::new(power.clone()));
        let pvpanic = Arc::new(Pvpanic::new(power));
        let pio = self.buses.pio.clone();
        self.add(&pio, SERIAL_PORT.into(), SERIAL_PORT_COUNT.into(), serial.clone())?;
        self.add(&pio, RTC_PORT.into(), RTC_PORT_COUNT.into(), rtc)?;
        self.claims.push(pio.claim(I8042_COMMAND_PORT.into(), 1, i8042)?);
        self.claims
            .push(pio.claim(RESET_CONTROL_PORT.into(), 1, reset_control)?);
        self.add(&pio, PVPANIC_PORT.into(), 1, pvpanic)?;
        let mmio = self.buses.mmio.clone();
        let (acpi, hotplug) = (self.acpi.clone(), self.hotplug.clone());
        self.add(&mmio, ACPI_REGISTERS_BASE, ACPI_DEVICE_BYTES, acpi)?;
        let hotplug_base = ACPI_REGISTERS_BASE + HOTPLUG_OFFSET;
        self.add(&mmio, hotplug_base, PCI_HOTPLUG_BYTES, hotplug)?;
        Ok(serial)
    }

    fn add<D>(&mut self, bus: &Bus, base: u64, len: u64, device: Arc<D>) -> Result<(), BuildError>
    where
        D: BusDevice + Unit + 'static,
    {
        self.claims.push(bus.claim(base, len, device.clone())?);
        self.units.push(device);
        Ok(())
    }

    /// A virtio device in `bdf`; it becomes visible as the last step, when it is whole.
    fn add_virtio(
        &mut self,
        name: UnitName,
        bdf: Bdf,
        device: Box<dyn VirtioDevice>,
    ) -> Result<Arc<VirtioPciDevice>, BuildError> {
        let reserved = self.pci.reserve(bdf)?;
        let device = VirtioPciDevice::new(device, name, bdf, self.resources.clone())?;
        self.devices.add_fixed(reserved, device.clone());
        Ok(device)
    }

    /// The devices that change the guest's memory, where the configuration lets it change.
    fn add_memory(&mut self, config: &VmConfig) -> Result<(), BuildError> {
        if let Some(mem) = self.memory.new_mem()? {
            let device = self.add_virtio(platform_name("mem"), MEM_BDF, Box::new(mem))?;
            self.memory.set_mem(device);
        }
        if let Some(balloon) = self.memory.new_balloon(config)? {
            let device = self.add_virtio(platform_name("balloon"), BALLOON_BDF, Box::new(balloon))?;
            self.memory.set_balloon(device);
        }
        Ok(())
    }

    /// A network card, which the guest can eject.
    fn add_nic(&mut self, nic: &NicConfig) -> Result<(), BuildError> {
        let reserved = self.pci.reserve(nic.bdf)?;
        let device = build_nic(&*self.host, &self.resources, nic)?;
        self.devices.add_nic(reserved, device, nic);
        Ok(())
    }

    fn finish(self, cpu_count: u8, boot: BootSource, serial: Arc<Serial>) -> Result<KvmMachine, BuildError> {
        let listener = Arc::new(self.mailbox.clone());
        let count = u32::from(cpu_count);
        let mut vcpus = Vec::with_capacity(cpu_count.into());
        for index in 0..count {
            vcpus.push(Vcpu::new(
                &self.vm,
                index,
                count,
                self.buses.clone(),
                listener.clone(),
            )?);
        }
        let machine = KvmMachine {
            vcpus,
            event_loop: self.event_loop,
            devices: self.devices,
            resources: self.resources,
            host: self.host,
            serial,
            units: self.units,
            claims: self.claims,
            pci: self.pci,
            acpi: self.acpi,
            tables: AcpiTables::new(cpu_count),
            boot,
            memory: self.memory,
            ram: self.ram,
            memslots: self.memslots,
        };
        machine.load()?;
        Ok(machine)
    }
}
