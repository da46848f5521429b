//! What each queue is for, done chain by chain on the device event loop.
//!
//! Everything in a chain comes from the guest: page numbers and ranges outside its memory are ignored, lists that are
//! too long are a fault. A chain comes back when the host has done its part.

use std::ops::Range;

use virtio_queue::desc::split::Descriptor;

use super::device::{Balloon, PAGE_BYTES};
use super::queues::{Role, next, read, take};
use super::stats::{BalloonStats, STATS_BYTES_MAX};
use crate::virtio::device::DeviceFault;
use crate::virtio::queue_set::DeviceQueue;

/// A chain has at most this many page numbers; Linux sends 256.
pub const PAGES_PER_CHAIN_MAX: usize = 16_384;
/// The bytes of a page number.
const NUMBER_BYTES: usize = 4;
/// The bytes of a hinting command.
const COMMAND_BYTES: usize = 4;
/// What a reported or hinted range costs, in page numbers: it is megabytes of memory.
const RANGE_COST: usize = 32;

impl Balloon {
    /// Serves the queue at `position` among those enabled, and reports what changed, also when the driver broke the
    /// rules on the way.
    pub(super) fn serve(&mut self, position: usize) -> Result<(), DeviceFault> {
        let before = self.pages.count();
        let outcome = match self.roles.get(position).copied().flatten() {
            Some(Role::Inflate) => self.inflate(position),
            Some(Role::Deflate) => self.deflate(position),
            Some(Role::Stats) => self.serve_stats(position).map(|()| false),
            Some(Role::Hinting) => self.take_hints(position),
            Some(Role::Reporting) => self.take_reports(position),
            None => Ok(false),
        };
        if self.pages.count() != before {
            self.host.changed(self.ballooned_bytes());
        }
        if outcome? {
            self.unfinished |= 1 << position;
            self.call_again();
        }
        Ok(())
    }

    fn inflate(&mut self, position: usize) -> Result<bool, DeviceFault> {
        let Self {
            queues,
            pages,
            host,
            log,
            ..
        } = self;
        let Some(queue) = queues.get_mut(position) else {
            return Ok(false);
        };
        take(queue, |queue, parts| {
            let list = page_numbers(queue, parts)?;
            let listed_count = list.len();
            let (runs, outside_count) = pages.runs(list);
            if outside_count > 0 {
                log.warn(format_args!(
                    "{outside_count} pages for the balloon are not start-up RAM"
                ));
            }
            for run in runs {
                let address = run.start * PAGE_BYTES;
                let length_bytes = (run.end - run.start) * PAGE_BYTES;
                match host.discard(address, length_bytes) {
                    Ok(()) => pages.insert(run),
                    Err(error) => log.warn(format_args!(
                        "the host does not take {length_bytes} bytes at {address:#x} back: {error}"
                    )),
                }
            }
            Ok(listed_count)
        })
    }

    fn deflate(&mut self, position: usize) -> Result<bool, DeviceFault> {
        let Self { queues, pages, .. } = self;
        let Some(queue) = queues.get_mut(position) else {
            return Ok(false);
        };
        take(queue, |queue, parts| {
            let list = page_numbers(queue, parts)?;
            list.iter().for_each(|page| pages.remove((*page).into()));
            Ok(list.len())
        })
    }

    /// Reads the buffer that the driver left, if it is a new one, and gives it back if statistics were asked for. Until
    /// then it stays in the ring, so that nothing of it needs to be saved.
    fn serve_stats(&mut self, position: usize) -> Result<(), DeviceFault> {
        self.read_stats(position)?;
        let Some(queue) = self.queues.get_mut(position).filter(|_| self.stats_requested) else {
            return Ok(());
        };
        let Some((head_index, _)) = next(queue)? else {
            // The driver is at it.
            return Ok(());
        };
        queue.complete(head_index, 0)?;
        queue.signal()?;
        self.stats_requested = false;
        self.stats_seen = false;
        // Another buffer may be there, and if not, this asks for a kick.
        self.read_stats(position)
    }

    fn read_stats(&mut self, position: usize) -> Result<(), DeviceFault> {
        let Some(queue) = self.queues.get_mut(position).filter(|_| !self.stats_seen) else {
            return Ok(());
        };
        let Some((_, parts)) = next(queue)? else {
            return Ok(());
        };
        let buffer = read(queue, &parts, STATS_BYTES_MAX)?;
        queue.unpop();
        let stats = BalloonStats::parse(&buffer);
        self.stats = Some(stats);
        self.stats_seen = true;
        self.host.stats(stats);
        Ok(())
    }

    fn take_reports(&mut self, position: usize) -> Result<bool, DeviceFault> {
        // Pages must keep what the guest fills free ones with; those that the host takes back read as zeros.
        let keep = self.poison_negotiated && self.poison_val != 0;
        let Self {
            queues,
            memory,
            host,
            log,
            ..
        } = self;
        let Some(queue) = queues.get_mut(position) else {
            return Ok(false);
        };
        take(queue, |queue, parts| {
            if parts.iter().any(|part| !part.is_write_only()) {
                return Err(queue.fault(&"a reported range is not writable"));
            }
            let ranges = parts.iter().flat_map(|part| whole_pages(part, memory));
            for range in ranges.filter(|_| !keep) {
                let length_bytes = range.end - range.start;
                if let Err(error) = host.discard(range.start, length_bytes) {
                    log.warn(format_args!(
                        "the host does not take {length_bytes} bytes at {:#x} back: {error}",
                        range.start
                    ));
                }
            }
            Ok(parts.len() * RANGE_COST)
        })
    }

    fn take_hints(&mut self, position: usize) -> Result<bool, DeviceFault> {
        let Self {
            queues,
            memory,
            host,
            hinting,
            ..
        } = self;
        let Some(queue) = queues.get_mut(position) else {
            return Ok(false);
        };
        take(queue, |queue, parts| {
            let first_range = parts.iter().position(|part| part.is_write_only());
            let (command, ranges) = parts.split_at(first_range.unwrap_or(parts.len()));
            if !command.is_empty() {
                let bytes = read(queue, command, COMMAND_BYTES)?;
                let Ok(bytes) = <[u8; COMMAND_BYTES]>::try_from(&bytes[..]) else {
                    return Err(queue.fault(&format_args!(
                        "a hinting command has {} of {COMMAND_BYTES} bytes",
                        bytes.len()
                    )));
                };
                if hinting.driver_at(u32::from_le_bytes(bytes)) {
                    host.hinting_done();
                }
            }
            if ranges.iter().any(|part| !part.is_write_only()) {
                return Err(queue.fault(&"a command follows hints in one chain"));
            }
            if hinting.counts() {
                for range in ranges.iter().flat_map(|part| whole_pages(part, memory)) {
                    host.hinted(range.start, range.end - range.start);
                }
            }
            Ok(ranges.len() * RANGE_COST)
        })
    }
}

/// The page numbers of a chain to inflate or deflate.
fn page_numbers(queue: &DeviceQueue, parts: &[Descriptor]) -> Result<Vec<u32>, DeviceFault> {
    let bytes = read(queue, parts, PAGES_PER_CHAIN_MAX * NUMBER_BYTES)?;
    let (numbers, rest) = bytes.as_chunks::<NUMBER_BYTES>();
    if !rest.is_empty() {
        return Err(queue.fault(&format_args!("{} bytes are no list of page numbers", bytes.len())));
    }
    Ok(numbers.iter().copied().map(u32::from_le_bytes).collect())
}

/// The whole pages of a range that lie in `memory`, which is ranges of addresses: one piece for each.
fn whole_pages(part: &Descriptor, memory: &[Range<u64>]) -> impl Iterator<Item = Range<u64>> {
    let start = part
        .addr()
        .0
        .checked_next_multiple_of(PAGE_BYTES)
        .unwrap_or(u64::MAX);
    let end = part.addr().0.saturating_add(part.len().into()) / PAGE_BYTES * PAGE_BYTES;
    memory.iter().filter_map(move |range| {
        let piece = start.max(range.start)..end.min(range.end);
        (!piece.is_empty()).then_some(piece)
    })
}
