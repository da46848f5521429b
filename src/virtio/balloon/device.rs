//! The balloon: its configuration space, its activation, and what the host asks of it.
//!
//! The transport calls it on the device event loop (see [`VirtioDevice`]); the VM calls [`Balloon::set_target`] and the
//! like through the same lock (`VirtioPciDevice::with_device`), from any thread. Rings are touched on the loop only:
//! what the VM asks for is noted, and the device rings itself.
//!
//! `VIRTIO_BALLOON_F_MUST_TELL_HOST` is offered, so that what counts as ballooned is not in use, and not insisted on:
//! a driver without it may use pages a little before they stop counting, and harms nobody.
//!
//! A reset, by the driver or of the whole VM, empties the balloon, since the next driver knows nothing of it; the
//! target stays, so that it inflates again.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::hinting::Hinting;
use super::host::BalloonHost;
use super::pages::Pages;
use super::queues::{
    QUEUE_SIZE_MAX, ROLES, Role, VIRTIO_BALLOON_F_FREE_PAGE_HINT, VIRTIO_BALLOON_F_PAGE_REPORTING,
    VIRTIO_BALLOON_F_STATS_VQ, assign,
};
use super::saved::BalloonV1;
use super::stats::BalloonStats;
use crate::guest_log::GuestLog;
use crate::unit::{RestoreError, SaveError};
use crate::virtio::device::{
    Activation, DeviceEvent, DeviceFault, DeviceType, VirtioDevice, VirtioInterrupt,
};
use crate::virtio::queue_set::DeviceQueue;

/// The size of a page of the balloon in bytes, whatever the guest's pages are (§5.5.6).
pub const PAGE_BYTES: u64 = 4096;
/// Page numbers have 32 bits.
const ADDRESS_END_MAX: u64 = PAGE_BYTES << 32;

/// The driver tells before it uses ballooned pages (§5.5.3).
const VIRTIO_BALLOON_F_MUST_TELL_HOST: u32 = 0;
/// The driver may take pages back when the guest runs out of memory (§5.5.3).
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
/// The driver tells what it fills free pages with (§5.5.3).
const VIRTIO_BALLOON_F_PAGE_POISON: u32 = 4;

/// Where in `struct virtio_balloon_config` (§5.5.4) the driver writes.
const ACTUAL_OFFSET: usize = 4;
const POISON_OFFSET: usize = 12;
const CONFIG_BYTES: usize = 16;
/// The token of the device's request to itself to go on.
const AGAIN_TOKEN: u32 = 0;

/// What the balloon works on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BalloonConfig {
    /// The start-up RAM as guest-physical addresses, in order and apart, each of whole pages and below 16 TiB. Pages
    /// of it can be ballooned.
    pub ram: Vec<Range<u64>>,
    /// Memory plugged at run time: free pages of it are reported and hinted at as well, but it is never ballooned.
    pub plugged: Option<Range<u64>>,
    /// Whether the guest may take pages back when it runs out of memory, against the target.
    pub deflate_on_oom: bool,
    /// Whether the guest reports free pages, whose memory the host then takes back.
    pub free_page_reporting: bool,
}

/// Why a balloon cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// A range is empty, not of whole pages, too high, or not behind the one before it.
    #[error(
        "memory at {start:#x} to {end:#x} is not whole pages below {ADDRESS_END_MAX:#x} and behind the rest"
    )]
    Memory { start: u64, end: u64 },
    /// The host has no eventfd left.
    #[error("the host refused an eventfd for the balloon")]
    Host(#[source] io::Error),
}

/// Why the balloon cannot have a target.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// The target is not a number of whole pages.
    #[error("target {target_bytes} bytes is not a multiple of the page size, {PAGE_BYTES} bytes")]
    Granule { target_bytes: u64 },
    /// The target is more than there is.
    #[error("target {target_bytes} bytes exceeds the start-up ram of {ram_bytes} bytes")]
    BeyondRam { target_bytes: u64, ram_bytes: u64 },
}

/// The balloon.
pub struct Balloon {
    pub(super) pages: Pages,
    /// All memory that free pages may be in, as guest-physical addresses.
    pub(super) memory: Vec<Range<u64>>,
    deflate_on_oom: bool,
    free_page_reporting: bool,
    pub(super) host: Arc<dyn BalloonHost>,
    pub(super) log: GuestLog,
    target_pages: u32,
    /// What the driver claims to have in the balloon (`actual`).
    pub(super) actual_pages: u32,
    pub(super) poison_val: u32,
    pub(super) hinting: Hinting,
    pub(super) stats: Option<BalloonStats>,
    /// The driver is to write new statistics, and was not told yet.
    pub(super) stats_requested: bool,
    /// What is in the driver's buffer was read.
    pub(super) stats_seen: bool,
    pub(super) queues: Vec<DeviceQueue>,
    /// What each of `queues` is for.
    pub(super) roles: Vec<Option<Role>>,
    pub(super) poison_negotiated: bool,
    /// While a driver is there.
    interrupt: Option<Arc<dyn VirtioInterrupt>>,
    /// Readable while there is something to do for the device of its own.
    again: EventFd,
    /// Queues with work left from a call that had done enough, one bit for each place in `queues`.
    pub(super) unfinished: u8,
}

impl Balloon {
    /// Makes an empty balloon with target 0.
    ///
    /// # Errors
    /// [`BalloonError`] when the memory is impossible or the host has no eventfd left.
    pub fn new(config: BalloonConfig, host: Arc<dyn BalloonHost>) -> Result<Self, BalloonError> {
        let BalloonConfig {
            ram,
            plugged,
            deflate_on_oom,
            free_page_reporting,
        } = config;
        let pages = ram
            .iter()
            .map(|range| range.start / PAGE_BYTES..range.end / PAGE_BYTES);
        let pages = Pages::new(pages.collect());
        let memory = check_memory(ram, plugged)?;
        Ok(Self {
            pages,
            memory,
            deflate_on_oom,
            free_page_reporting,
            host,
            log: GuestLog::new("balloon"),
            target_pages: 0,
            actual_pages: 0,
            poison_val: 0,
            hinting: Hinting::default(),
            stats: None,
            stats_requested: false,
            stats_seen: false,
            queues: Vec::new(),
            roles: Vec::new(),
            poison_negotiated: false,
            interrupt: None,
            again: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(BalloonError::Host)?,
            unfinished: 0,
        })
    }

    /// Asks the guest to have `target_bytes` in the balloon (`num_pages`), and tells its driver if that is news. The
    /// same target again does no harm.
    ///
    /// # Errors
    /// [`TargetError`] when the target is not a number of whole pages or more than the start-up RAM.
    pub fn set_target(&mut self, target_bytes: u64) -> Result<(), TargetError> {
        if self.store_target(target_bytes)? {
            self.signal_config();
        }
        Ok(())
    }

    /// Tells the driver again, if what is in the balloon is not the target: one that could not obey tries anew.
    pub fn remind(&self) {
        if self.ballooned_bytes() != self.target_bytes() {
            self.signal_config();
        }
    }

    /// The target in bytes.
    pub fn target_bytes(&self) -> u64 {
        u64::from(self.target_pages) * PAGE_BYTES
    }

    /// What is in the balloon, in bytes: what the guest gave and the host took back.
    pub fn ballooned_bytes(&self) -> u64 {
        self.pages.count() * PAGE_BYTES
    }

    /// Asks the guest for new statistics; [`BalloonHost::stats`] gets them. `false`: its driver has none, or there is
    /// no driver.
    pub fn request_stats(&mut self) -> bool {
        let has_stats = self.roles.contains(&Some(Role::Stats));
        if has_stats {
            self.stats_requested = true;
            self.call_again();
        }
        has_stats
    }

    /// The latest statistics of the guest since its driver started.
    pub fn stats(&self) -> Option<BalloonStats> {
        self.stats
    }

    /// Asks the guest to hint at all its free pages; [`BalloonHost::hinted`] gets them until
    /// [`BalloonHost::hinting_done`]. The guest keeps them free, as far as it can, until [`Balloon::end_hinting`], also
    /// over save and restore. A round that is running gives way to the new one. `false`: its driver has no hints, or
    /// there is no driver.
    pub fn start_hinting(&mut self) -> bool {
        let has_hints = self.roles.contains(&Some(Role::Hinting));
        if has_hints {
            self.hinting.start();
            self.signal_config();
        }
        has_hints
    }

    /// Lets the guest use again what it hinted at. Nothing happens if no round was started.
    pub fn end_hinting(&mut self) {
        if self.hinting.end() {
            self.signal_config();
        }
    }

    /// Stores a target and tells whether it is news.
    ///
    /// # Errors
    /// [`TargetError`].
    pub(super) fn store_target(&mut self, target_bytes: u64) -> Result<bool, TargetError> {
        if !target_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(TargetError::Granule { target_bytes });
        }
        let ram_bytes = self.pages.ram_count() * PAGE_BYTES;
        let target_pages = u32::try_from(target_bytes / PAGE_BYTES).ok();
        let Some(target_pages) = target_pages.filter(|_| target_bytes <= ram_bytes) else {
            return Err(TargetError::BeyondRam {
                target_bytes,
                ram_bytes,
            });
        };
        let changed = self.target_pages != target_pages;
        self.target_pages = target_pages;
        Ok(changed)
    }

    /// Has the device called on the event loop, once its other devices had their turn.
    pub(super) fn call_again(&self) {
        // A full counter is readable too.
        let _ = self.again.write(1);
    }

    fn signal_config(&self) {
        if let Some(interrupt) = &self.interrupt {
            interrupt.signal_config();
        }
    }

    fn config(&self) -> [u8; CONFIG_BYTES] {
        let fields = [
            self.target_pages,
            self.actual_pages,
            self.hinting.command,
            self.poison_val,
        ];
        let mut config = [0; CONFIG_BYTES];
        for (place, field) in config.chunks_exact_mut(4).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        config
    }
}

/// Checks the ranges and puts them together. Ranges of RAM must not even touch, so that no run of pages is in two.
fn check_memory(ram: Vec<Range<u64>>, plugged: Option<Range<u64>>) -> Result<Vec<Range<u64>>, BalloonError> {
    let ram_count = ram.len();
    let memory: Vec<_> = ram.into_iter().chain(plugged).collect();
    let mut end_before = 0;
    for (index, &Range { start, end }) in memory.iter().enumerate() {
        let touches = start == end_before && (1..ram_count).contains(&index);
        let whole = (start | end).is_multiple_of(PAGE_BYTES);
        if start < end_before || touches || !whole || start >= end || end > ADDRESS_END_MAX {
            return Err(BalloonError::Memory { start, end });
        }
        end_before = end;
    }
    Ok(memory)
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn device_features(&self) -> u64 {
        1 << VIRTIO_BALLOON_F_MUST_TELL_HOST
            | 1 << VIRTIO_BALLOON_F_STATS_VQ
            | u64::from(self.deflate_on_oom) << VIRTIO_BALLOON_F_DEFLATE_ON_OOM
            | 1 << VIRTIO_BALLOON_F_FREE_PAGE_HINT
            | 1 << VIRTIO_BALLOON_F_PAGE_POISON
            | u64::from(self.free_page_reporting) << VIRTIO_BALLOON_F_PAGE_REPORTING
    }

    fn queue_sizes_max(&self) -> Vec<u16> {
        vec![QUEUE_SIZE_MAX; ROLES.len()]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let start = usize::try_from(offset).map_or(CONFIG_BYTES, |offset| offset.min(CONFIG_BYTES));
        let length = data.len().min(CONFIG_BYTES - start);
        data[..length].copy_from_slice(&config[start..start + length]);
    }

    fn config_write(&mut self, offset: u64, data: &[u8]) {
        let mut config = self.config();
        let start = usize::try_from(offset).map_or(CONFIG_BYTES, |offset| offset.min(CONFIG_BYTES));
        let length = data.len().min(CONFIG_BYTES - start);
        config[start..start + length].copy_from_slice(&data[..length]);
        let field =
            |at: usize| u32::from_le_bytes([config[at], config[at + 1], config[at + 2], config[at + 3]]);
        self.actual_pages = field(ACTUAL_OFFSET);
        self.poison_val = field(POISON_OFFSET);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceFault> {
        let Activation {
            driver_features,
            queues,
            interrupt,
        } = activation;
        let enabled: Vec<_> = queues.iter().map(DeviceQueue::index).collect();
        self.roles = assign(driver_features, &enabled);
        self.queues = queues;
        self.poison_negotiated = driver_features & (1 << VIRTIO_BALLOON_F_PAGE_POISON) != 0;
        self.interrupt = Some(interrupt);
        Ok(())
    }

    fn event_sources(&self) -> Vec<DeviceEvent> {
        vec![DeviceEvent {
            fd: self.again.as_raw_fd(),
            token: AGAIN_TOKEN,
        }]
    }

    fn process_queue(&mut self, queue_index: u16) -> Result<(), DeviceFault> {
        let mut queues = self.queues.iter();
        match queues.position(|queue| queue.index() == queue_index) {
            Some(position) => self.serve(position),
            None => Ok(()),
        }
    }

    fn process_event(&mut self, _token: u32, paused: bool) -> Result<(), DeviceFault> {
        let _ = self.again.read();
        if paused {
            // The device is called for every queue when it is resumed.
            return Ok(());
        }
        let unfinished = std::mem::take(&mut self.unfinished);
        for position in 0..self.queues.len() {
            let is_stats = self.roles.get(position) == Some(&Some(Role::Stats));
            if unfinished & (1 << position) != 0 || is_stats && self.stats_requested {
                self.serve(position)?;
            }
        }
        Ok(())
    }

    fn queues(&self) -> &[DeviceQueue] {
        &self.queues
    }

    fn in_flight_count(&self) -> usize {
        0
    }

    fn reset(&mut self) {
        self.queues.clear();
        self.roles.clear();
        self.interrupt = None;
        self.poison_negotiated = false;
        self.unfinished = 0;
        self.actual_pages = 0;
        self.poison_val = 0;
        self.stats = None;
        self.stats_requested = false;
        self.stats_seen = false;
        if self.pages.count() != 0 {
            self.pages.clear();
            self.host.changed(0);
        }
        if self.hinting.reset() {
            self.host.hinting_done();
        }
    }

    fn save(&self) -> Result<Value, SaveError> {
        Ok(serde_json::to_value(BalloonV1::new(self))?)
    }

    fn restore(&mut self, state: &Value) -> Result<(), RestoreError> {
        let restored = BalloonV1::deserialize(state)?.apply(self);
        self.host.changed(self.ballooned_bytes());
        restored
    }

    fn inspect(&self) -> Value {
        json!({
            "target_bytes": self.target_bytes(),
            "ballooned_bytes": self.ballooned_bytes(),
            "actual_pages": self.actual_pages,
            "stats_requested": self.stats_requested,
            "hint_command": self.hinting.command,
        })
    }
}
