//! The memory of a machine on KVM: RAM, runtime memory, the two devices that change them, and what the host promised.
//!
//! The devices call [`Changes`] on the event loop and are locked meanwhile, so it only moves memory, notes what the
//! guest has and told, and tells the mailbox; the supervisor then looks by [`MachineMemory::observe`].
//!
//! A guest can keep its devices at work for long, for to unplug is to take memory out of the host's page tables. So
//! the supervisor takes no lock of a device: what the guest has is in atomics, and what it is asked for is done by the
//! event loop when it gets to it.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use serde_json::{Value, json};

use crate::config::VmConfig;
use crate::event_loop::LoopHandle;
use crate::machine::memslots::Memslots;
use crate::memory::host::{HostMemory, HostMemoryError, MemoryPromise, Promised};
use crate::memory::region::{GuestRam, RamOptions};
use crate::memory::runtime::RuntimeMemory;
use crate::virtio::balloon::{Balloon, BalloonConfig, BalloonHost, BalloonStats, TargetError};
use crate::virtio::mem::{Mem, MemConfig, MemHost, PlugError, RequestedError};
use crate::virtio::transport::{Driver, VirtioPciDevice};
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
    event_loop: LoopHandle,
    /// What the event loop has yet to ask of the guest.
    asked: Arc<Mutex<Asked>>,
}

/// What devices do to memory, and what the guest told of it.
pub(super) struct Changes {
    ram: Arc<GuestRam>,
    runtime: Option<Arc<RuntimeMemory>>,
    huge_pages: bool,
    mailbox: Mailbox,
    plugged_bytes: AtomicU64,
    ballooned_bytes: AtomicU64,
    /// The host refused what the guest tried to plug last.
    plug_refused: AtomicBool,
    told: Mutex<Told>,
    #[cfg(test)]
    hints: Mutex<tests::Hints>,
}

/// What waits for the event loop, the later taking the place of the earlier.
#[derive(Default)]
struct Asked {
    plan: Option<Plan>,
    insists: bool,
    total: bool,
}

#[derive(Default)]
struct Told {
    total_bytes: Option<u64>,
    count: u64,
}

impl MemoryUnits {
    /// Takes note of a machine's memory; the devices are added when they are in their slots.
    ///
    /// # Errors
    /// [`HostMemoryError::Limit`], unless the VM may have more than the host has.
    pub fn new(
        config: &VmConfig,
        host: &HostMemory,
        ram: Arc<GuestRam>,
        runtime: Option<Arc<RuntimeMemory>>,
        mailbox: Mailbox,
        event_loop: LoopHandle,
    ) -> Result<Self, HostMemoryError> {
        let changes = Arc::new(Changes {
            ram,
            runtime,
            huge_pages: config.memory().huge_pages,
            mailbox,
            plugged_bytes: AtomicU64::new(0),
            ballooned_bytes: AtomicU64::new(0),
            plug_refused: AtomicBool::new(false),
            told: Mutex::default(),
            #[cfg(test)]
            hints: Mutex::default(),
        });
        let memory = config.memory();
        let (bytes, huge_pages) = (memory.startup_bytes, memory.huge_pages);
        let promise = if memory.overcommit {
            host.promise(bytes, huge_pages, changes.clone())
        } else {
            host.promise_start(bytes, huge_pages, changes.clone())?
        };
        Ok(Self {
            changes,
            mem: None,
            balloon: None,
            promise,
            event_loop,
            asked: Arc::default(),
        })
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
            slot_bytes: runtime.slot_bytes(),
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
        self.changes.plug_refused.store(false, Ordering::Release);
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
        let driver = |device: &Option<Arc<VirtioPciDevice>>| {
            device.as_ref().map_or(Driver::Absent, |device| device.driver())
        };
        let balloon_driver = driver(&self.balloon) != Driver::Absent;
        let changes = &self.changes;
        let (guest_total_bytes, told_count) = {
            let told = changes.told();
            (told.total_bytes.filter(|_| balloon_driver), told.count)
        };
        Observed {
            plugged_bytes: changes.plugged_bytes.load(Ordering::Acquire),
            ballooned_bytes: changes.ballooned_bytes.load(Ordering::Acquire),
            mem_driver: driver(&self.mem) != Driver::Absent,
            balloon_driver,
            plug_refused: changes.plug_refused.load(Ordering::Acquire),
            guest_total_bytes,
            told_count,
        }
    }

    fn promise(&self, bytes: u64, unchecked: bool) -> Result<(), HostMemoryError> {
        let bytes = self.changes.cost_bytes(bytes);
        if unchecked {
            self.promise.set(bytes);
            return Ok(());
        }
        self.promise.raise(bytes)
    }

    fn request(&self, plan: &Plan, insists: bool) {
        if insists {
            self.changes.plug_refused.store(false, Ordering::Release);
        }
        self.ask(|asked| {
            asked.plan = Some(*plan);
            asked.insists |= insists;
        });
    }

    fn ask_guest_total(&self) -> bool {
        let has_driver = self
            .balloon
            .as_ref()
            .is_some_and(|balloon| balloon.driver_ready());
        if has_driver {
            self.ask(|asked| asked.total = true);
        }
        has_driver
    }

    fn resident_bytes(&self) -> u64 {
        self.changes.resident_bytes()
    }
}

impl MemoryUnits {
    /// Has the event loop ask the guest for something more. It asks for all at once when it gets to it.
    fn ask(&self, more: impl FnOnce(&mut Asked)) {
        {
            let mut asked = lock(&self.asked);
            let waits = asked.plan.is_some() || asked.total;
            more(&mut asked);
            if waits {
                return;
            }
        }
        // Whoever is asked on the loop is not kept by it: what waits there goes with the machine.
        let (asked, mem, balloon) = (self.asked.clone(), weak(&self.mem), weak(&self.balloon));
        let job = move || {
            let now = std::mem::take(&mut *lock(&asked));
            now.put(mem.upgrade().as_deref(), balloon.upgrade().as_deref());
        };
        // A loop that has ended has a guest that is about to.
        let _ = self.event_loop.run_once(job);
    }
}

impl Asked {
    /// Asks the devices, on their event loop.
    fn put(self, mem: Option<&VirtioPciDevice>, balloon: Option<&VirtioPciDevice>) {
        let Self { plan, insists, total } = self;
        if let Some((plan, mem)) = plan.zip(mem) {
            let plugged = mem.with_device(|mem: &mut Mem| {
                mem.set_requested(plan.plugged_bytes)?;
                if insists {
                    mem.remind();
                }
                Ok::<_, RequestedError>(())
            });
            if let Some(Err(error)) = plugged {
                log::error!("the memory device: {error}");
            }
        }
        let Some(balloon) = balloon else { return };
        let ballooned = plan.and_then(|plan| {
            balloon.with_device(|balloon: &mut Balloon| {
                balloon.set_target(plan.ballooned_bytes)?;
                if insists {
                    balloon.remind();
                }
                Ok::<_, TargetError>(())
            })
        });
        if let Some(Err(error)) = ballooned {
            log::error!("the balloon: {error}");
        }
        if total {
            balloon.ask_device(Balloon::request_stats);
        }
    }
}

fn lock(asked: &Mutex<Asked>) -> MutexGuard<'_, Asked> {
    asked.lock().unwrap_or_else(PoisonError::into_inner)
}

fn weak(device: &Option<Arc<VirtioPciDevice>>) -> Weak<VirtioPciDevice> {
    device.as_ref().map(Arc::downgrade).unwrap_or_default()
}

impl Changes {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it takes of the host to give the guest `bytes`. Huge pages are reserved for all of a slot when it is mapped,
    /// and the balloon gives none of them back.
    fn cost_bytes(&self, bytes: u64) -> u64 {
        let Some(runtime) = self.runtime.as_ref().filter(|_| self.huge_pages) else {
            return if self.huge_pages {
                bytes.max(self.ram.size_bytes())
            } else {
                bytes
            };
        };
        let above_bytes = bytes.saturating_sub(self.ram.size_bytes());
        let slots_bytes = above_bytes.next_multiple_of(runtime.slot_bytes());
        self.ram.size_bytes() + slots_bytes.min(runtime.size_bytes()).max(runtime.live_bytes())
    }

    fn resident_bytes(&self) -> u64 {
        let runtime = self.runtime.as_ref().map(|runtime| runtime.resident_bytes());
        let parts = [Some(self.ram.resident_bytes()), runtime];
        // The host tells the size of files of our own.
        parts.into_iter().flatten().flatten().sum()
    }
}

impl Promised for Changes {
    fn taken_bytes(&self) -> u64 {
        if !self.huge_pages {
            return self.resident_bytes();
        }
        let runtime = self.runtime.as_ref();
        self.ram.size_bytes() + runtime.map_or(0, |runtime| runtime.live_bytes())
    }

    fn may_ask_again(&self) {
        self.mailbox.host_memory_freed();
    }
}

impl MemHost for Changes {
    fn plug(&self, offset: u64, length_bytes: u64) -> Result<(), PlugError> {
        let Some(runtime) = &self.runtime else {
            return Ok(());
        };
        let plugged = runtime.plug(offset, length_bytes);
        self.plug_refused.store(plugged.is_err(), Ordering::Release);
        plugged.map_err(|error| PlugError::Host {
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

    fn changed(&self, plugged_bytes: u64) {
        self.plugged_bytes.store(plugged_bytes, Ordering::Release);
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

    fn changed(&self, ballooned_bytes: u64) {
        self.ballooned_bytes.store(ballooned_bytes, Ordering::Release);
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

    // Free page hints are for those who copy memory while it changes; only a test starts a round.
    #[cfg(not(test))]
    fn hinted(&self, _address: u64, _length_bytes: u64) {}

    #[cfg(not(test))]
    fn hinting_done(&self) {}

    #[cfg(test)]
    fn hinted(&self, _address: u64, length_bytes: u64) {
        self.note_hints(|hints| hints.hinted_bytes += length_bytes);
    }

    #[cfg(test)]
    fn hinting_done(&self) {
        self.note_hints(|hints| hints.completed_count += 1);
    }
}

#[cfg(test)]
mod tests;
