//! The memory of a machine on KVM: RAM, runtime memory, the two devices that change them, and what the host promised.
//!
//! The devices call [`Changes`] on the event loop and are locked meanwhile, so it only moves memory, notes what the
//! guest told, and tells the mailbox; the supervisor then looks by [`MachineMemory::observe`].

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use crate::config::VmConfig;
use crate::machine::memslots::Memslots;
use crate::memory::host::{HostMemory, HostMemoryError, MemoryPromise};
use crate::memory::region::{GuestRam, RamOptions};
use crate::memory::runtime::RuntimeMemory;
use crate::virtio::balloon::{Balloon, BalloonConfig, BalloonHost, BalloonStats};
use crate::virtio::mem::{Mem, MemConfig, MemHost, PlugError};
use crate::virtio::transport::VirtioPciDevice;
use crate::vm::mailbox::Mailbox;
use crate::vm::memory::machine::{MachineMemory, Observed};
use crate::vm::memory::plan::Plan;
use crate::vm::platform::BuildError;

/// The memory of one machine.
pub(super) struct MemoryUnits {
    changes: Arc<Changes>,
    mem: Option<Arc<VirtioPciDevice>>,
    balloon: Option<Arc<VirtioPciDevice>>,
    promise: MemoryPromise,
}

/// What devices do to memory, and what the guest told of it.
pub(super) struct Changes {
    ram: Arc<GuestRam>,
    runtime: Option<Arc<RuntimeMemory>>,
    mailbox: Mailbox,
    told: Mutex<Told>,
}

#[derive(Default)]
struct Told {
    total_bytes: Option<u64>,
    count: u64,
}

impl MemoryUnits {
    /// Takes note of a machine's memory; the devices are added when they are in their slots.
    pub fn new(
        config: &VmConfig,
        host: &HostMemory,
        ram: Arc<GuestRam>,
        runtime: Option<Arc<RuntimeMemory>>,
        mailbox: Mailbox,
    ) -> Self {
        let changes = Arc::new(Changes {
            ram,
            runtime,
            mailbox,
            told: Mutex::default(),
        });
        let memory = config.memory();
        let resident = changes.clone();
        let promise = host.promise(memory.startup_bytes, memory.huge_pages, move || {
            resident.resident_bytes()
        });
        Self {
            changes,
            mem: None,
            balloon: None,
            promise,
        }
    }

    /// The memory device, if the machine has runtime memory.
    ///
    /// # Errors
    /// [`BuildError::Mem`].
    pub fn new_mem(&self) -> Result<Option<Mem>, BuildError> {
        let Some(runtime) = &self.changes.runtime else {
            return Ok(None);
        };
        let config = MemConfig {
            address: runtime.base(),
            region_bytes: runtime.size_bytes(),
            ram_bytes: self.changes.ram.size_bytes(),
        };
        Ok(Some(Mem::new(config, self.changes.clone())?))
    }

    /// The balloon, if the configuration lets the memory change at all. It also tells the guest's total and free pages.
    ///
    /// # Errors
    /// [`BuildError::Balloon`].
    pub fn new_balloon(&self, config: &VmConfig) -> Result<Option<Balloon>, BuildError> {
        let memory = config.memory();
        if memory.minimum_bytes == memory.startup_bytes && memory.maximum_bytes == memory.startup_bytes {
            return Ok(None);
        }
        let ranges = self.changes.ram.ranges().iter();
        let ram = ranges.map(|range| range.guest_address..range.guest_address + range.size_bytes);
        let runtime = self.changes.runtime.as_ref();
        let config = BalloonConfig {
            ram: ram.collect(),
            plugged: runtime.map(|runtime| runtime.base()..runtime.base() + runtime.size_bytes()),
            deflate_on_oom: memory.deflate_on_oom,
            // A part of a huge page cannot be given back.
            free_page_reporting: !memory.huge_pages,
        };
        Ok(Some(Balloon::new(config, self.changes.clone())?))
    }

    /// The memory device is in its slot.
    pub fn set_mem(&mut self, device: Arc<VirtioPciDevice>) {
        self.mem = Some(device);
    }

    /// The balloon is in its slot.
    pub fn set_balloon(&mut self, device: Arc<VirtioPciDevice>) {
        self.balloon = Some(device);
    }

    /// What the memory beyond the start-up size is, for people and tools; null where there is none.
    pub fn inspect(&self) -> Value {
        self.changes.runtime.as_ref().map_or(Value::Null, |runtime| {
            json!({
                "base": runtime.base(),
                "size_bytes": runtime.size_bytes(),
                "resident_bytes": runtime.resident_bytes().ok(),
                "live_slot_count": runtime.live_slot_count(),
            })
        })
    }

    /// Everything as after power-on, after the units were reset and while nothing runs.
    ///
    /// # Errors
    /// The host's error when it does not take memory back.
    pub fn reset(&self) -> io::Result<()> {
        if let Some(Err(error)) = self.mem.as_ref().and_then(|mem| mem.with_device(Mem::power_on)) {
            return Err(io::Error::other(error));
        }
        *self.changes.told() = Told::default();
        self.changes.ram.clear()?;
        self.changes
            .runtime
            .as_ref()
            .map_or(Ok(()), |runtime| runtime.clear())
    }
}

/// Makes the runtime memory of `config`, if it has any.
///
/// # Errors
/// [`BuildError::Ram`].
pub(super) fn new_runtime(
    config: &VmConfig,
    ram: &GuestRam,
    address_bits: u32,
    memslots: Memslots,
) -> Result<Option<Arc<RuntimeMemory>>, BuildError> {
    let memory = config.memory();
    let size_bytes = memory.maximum_bytes - memory.startup_bytes;
    if size_bytes == 0 {
        return Ok(None);
    }
    let options = RamOptions {
        huge_pages: memory.huge_pages,
    };
    let runtime = RuntimeMemory::new(ram, size_bytes, options, address_bits, memslots)?;
    Ok(Some(Arc::new(runtime)))
}

impl MachineMemory for MemoryUnits {
    fn observe(&self) -> Observed {
        let mem = self.mem.as_ref();
        let balloon = self.balloon.as_ref();
        let (guest_total_bytes, told_count) = {
            let told = self.changes.told();
            (told.total_bytes, told.count)
        };
        let plugged_bytes = mem.and_then(|mem| mem.with_device(|mem: &mut Mem| mem.plugged_bytes()));
        let ballooned_bytes = balloon
            .and_then(|balloon| balloon.with_device(|balloon: &mut Balloon| balloon.ballooned_bytes()));
        Observed {
            plugged_bytes: plugged_bytes.unwrap_or(0),
            ballooned_bytes: ballooned_bytes.unwrap_or(0),
            mem_driver: mem.is_some_and(|mem| mem.driver_ready()),
            balloon_driver: balloon.is_some_and(|balloon| balloon.driver_ready()),
            guest_total_bytes,
            told_count,
        }
    }

    fn promise(&self, bytes: u64, unchecked: bool) -> Result<(), HostMemoryError> {
        if unchecked {
            self.promise.set(bytes);
            return Ok(());
        }
        self.promise.raise(bytes)
    }

    fn request(&self, plan: &Plan) {
        let plugged = self.mem.as_ref();
        let plugged =
            plugged.and_then(|mem| mem.with_device(|mem: &mut Mem| mem.set_requested(plan.plugged_bytes)));
        if let Some(Err(error)) = plugged {
            log::error!("the memory device: {error}");
        }
        let ballooned = self.balloon.as_ref();
        let ballooned = ballooned.and_then(|balloon| {
            balloon.with_device(|balloon: &mut Balloon| balloon.set_target(plan.ballooned_bytes))
        });
        if let Some(Err(error)) = ballooned {
            log::error!("the balloon: {error}");
        }
    }

    fn ask_guest_total(&self) -> bool {
        let balloon = self.balloon.as_ref();
        balloon.and_then(|balloon| balloon.with_device(Balloon::request_stats)) == Some(true)
    }

    fn resident_bytes(&self) -> u64 {
        self.changes.resident_bytes()
    }
}

impl Changes {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn resident_bytes(&self) -> u64 {
        let runtime = self.runtime.as_ref().map(|runtime| runtime.resident_bytes());
        let parts = [Some(self.ram.resident_bytes()), runtime];
        // The host tells the size of files of our own.
        parts.into_iter().flatten().flatten().sum()
    }
}

impl MemHost for Changes {
    fn plug(&self, offset: u64, length_bytes: u64) -> Result<(), PlugError> {
        let Some(runtime) = &self.runtime else {
            return Ok(());
        };
        runtime
            .plug(offset, length_bytes)
            .map_err(|error| PlugError::Host {
                what: "to plug blocks",
                source: io::Error::other(error),
            })
    }

    fn unplug(&self, offset: u64, length_bytes: u64) -> Result<(), PlugError> {
        let Some(runtime) = &self.runtime else {
            return Ok(());
        };
        if let Err(error) = runtime.unplug(offset, length_bytes) {
            // The guest has lost the blocks; that the host has not got them back is no reason to give them again.
            log::error!("unplugged memory is not given back: {error}");
        }
        Ok(())
    }

    fn changed(&self, _plugged_bytes: u64) {
        self.mailbox.memory_changed();
    }
}

impl BalloonHost for Changes {
    fn discard(&self, address: u64, length_bytes: u64) -> io::Result<()> {
        self.ram.discard(address, length_bytes)?;
        match &self.runtime {
            Some(runtime) => runtime.discard(address, length_bytes),
            None => Ok(()),
        }
    }

    fn changed(&self, _ballooned_bytes: u64) {
        self.mailbox.memory_changed();
    }

    fn stats(&self, stats: BalloonStats) {
        {
            let mut told = self.told();
            told.total_bytes = stats.total_bytes.or(told.total_bytes);
            told.count += 1;
        }
        self.mailbox.memory_changed();
    }

    // Free page hints are for those who copy memory while it changes; nobody starts a round.
    fn hinted(&self, _address: u64, _length_bytes: u64) {}

    fn hinting_done(&self) {}
}
