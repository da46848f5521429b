//! Which queue is which, and how chains are taken from them.
//!
//! The specification numbers the queues 0 to 4 whatever was negotiated (virtio 1.2 §5.5.2). Linux leaves no gaps: a
//! queue whose feature is missing has no number, and the next one takes it. Both enable exactly the queues that their
//! features call for, in this order, so the n-th enabled queue is the n-th of those. Only of a driver that enables
//! others the numbers decide.

use virtio_queue::QueueT;
use virtio_queue::desc::split::Descriptor;
use vm_memory::Bytes;

use crate::virtio::device::DeviceFault;
use crate::virtio::queue_set::{DeviceQueue, descriptors};

/// The largest size of each queue.
pub(super) const QUEUE_SIZE_MAX: u16 = 128;
/// One call does about this much work: page numbers looked at, and for other things what [`take`] is told.
pub(super) const CALL_COST_MAX: usize = 4096;
/// What a chain costs at least.
const CHAIN_COST: usize = 16;

/// Guest memory statistics are told (§5.5.3).
pub(super) const VIRTIO_BALLOON_F_STATS_VQ: u32 = 1;
/// Free pages are hinted at (§5.5.3).
pub(super) const VIRTIO_BALLOON_F_FREE_PAGE_HINT: u32 = 3;
/// Free pages are reported (§5.5.3).
pub(super) const VIRTIO_BALLOON_F_PAGE_REPORTING: u32 = 5;

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Inflate,
    Deflate,
    Stats,
    Hinting,
    Reporting,
}

/// The roles in the order of their numbers, with the feature that each depends on.
pub(super) const ROLES: [(Role, Option<u32>); 5] = [
    (Role::Inflate, None),
    (Role::Deflate, None),
    (Role::Stats, Some(VIRTIO_BALLOON_F_STATS_VQ)),
    (Role::Hinting, Some(VIRTIO_BALLOON_F_FREE_PAGE_HINT)),
    (Role::Reporting, Some(VIRTIO_BALLOON_F_PAGE_REPORTING)),
];

/// The roles of the queues that a driver enabled, given by their indices in order. `None`: nothing is to be done with
/// that queue.
pub(super) fn assign(driver_features: u64, enabled: &[u16]) -> Vec<Option<Role>> {
    let negotiated = |feature: Option<u32>| feature.is_none_or(|bit| driver_features & (1 << bit) != 0);
    let roles = ROLES.map(|(role, feature)| negotiated(feature).then_some(role));
    let called_for: Vec<_> = roles.into_iter().filter(Option::is_some).collect();
    if enabled.len() == called_for.len() {
        return called_for;
    }
    let by_number = |index: &u16| roles.get(usize::from(*index)).copied().flatten();
    enabled.iter().map(by_number).collect()
}

/// Takes chains from `queue` and returns them to the driver when `work` is done with each; `work` tells what that cost.
/// `true` means that the call did enough and there may be more.
///
/// # Errors
/// [`DeviceFault`] of the ring or of `work`; the chain is not returned then.
pub(super) fn take(
    queue: &mut DeviceQueue,
    mut work: impl FnMut(&DeviceQueue, &[Descriptor]) -> Result<usize, DeviceFault>,
) -> Result<bool, DeviceFault> {
    let (mut cost, mut more) = (0, true);
    while cost < CALL_COST_MAX {
        let Some((head_index, parts)) = next(queue)? else {
            more = false;
            break;
        };
        cost += work(queue, &parts)?.max(CHAIN_COST);
        queue.complete(head_index, 0)?;
    }
    if cost > 0 {
        queue.signal()?;
    }
    Ok(more)
}

/// The next chain of `queue`: its head and its descriptors, no more than the queue is long.
///
/// # Errors
/// [`DeviceFault::Queue`] when the ring or the chain is malformed.
pub(super) fn next(queue: &mut DeviceQueue) -> Result<Option<(u16, Vec<Descriptor>)>, DeviceFault> {
    let chain = match queue.pop()? {
        None if queue.enable_kicks()? => queue.pop()?,
        chain => chain,
    };
    let Some(chain) = chain else { return Ok(None) };
    let head_index = chain.head_index();
    let parts = descriptors(chain, queue.index())?;
    let limit = usize::from(queue.queue().max_size());
    if parts.len() > limit {
        let count = parts.len();
        return Err(queue.fault(&format_args!(
            "a chain of {count} descriptors is longer than the queue, {limit}"
        )));
    }
    Ok(Some((head_index, parts)))
}

/// The bytes of a chain that the device only reads, at most `bytes_max` of them.
///
/// # Errors
/// [`DeviceFault::Queue`] when there are more, or they are writable or outside memory.
pub(super) fn read(
    queue: &DeviceQueue,
    parts: &[Descriptor],
    bytes_max: usize,
) -> Result<Vec<u8>, DeviceFault> {
    let length_bytes: u64 = parts.iter().map(|part| u64::from(part.len())).sum();
    if length_bytes > bytes_max as u64 {
        return Err(queue.fault(&format_args!(
            "{length_bytes} bytes in one chain, the limit is {bytes_max}"
        )));
    }
    let mut bytes = vec![0; length_bytes as usize];
    let mut rest = &mut bytes[..];
    for part in parts {
        if part.is_write_only() {
            return Err(queue.fault(&"a buffer for the device to read is writable"));
        }
        let (here, later) = rest.split_at_mut(part.len() as usize);
        let outcome = queue.memory().read_slice(here, part.addr());
        outcome.map_err(|error| queue.fault(&error))?;
        rest = later;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::Role::{Deflate, Hinting, Inflate, Reporting, Stats};
    use super::*;

    #[test]
    fn both_ways_of_numbering_give_each_queue_its_role() {
        for bits in 0u64..8 {
            let features = (bits & 1) << VIRTIO_BALLOON_F_STATS_VQ
                | (bits >> 1 & 1) << VIRTIO_BALLOON_F_FREE_PAGE_HINT
                | (bits >> 2 & 1) << VIRTIO_BALLOON_F_PAGE_REPORTING;
            let present = [true, true, bits & 1 != 0, bits & 2 != 0, bits & 4 != 0];
            let by_the_standard: Vec<u16> = (0..5).filter(|index| present[usize::from(*index)]).collect();
            let without_gaps: Vec<u16> = (0..by_the_standard.len() as u16).collect();
            let all = [Inflate, Deflate, Stats, Hinting, Reporting];
            let expected: Vec<_> = by_the_standard
                .iter()
                .map(|index| Some(all[usize::from(*index)]))
                .collect();
            assert_eq!(
                assign(features, &by_the_standard),
                expected,
                "features {features:#x}"
            );
            assert_eq!(
                assign(features, &without_gaps),
                expected,
                "features {features:#x}"
            );
        }
    }

    #[test]
    fn a_driver_that_enables_other_queues_is_taken_at_its_numbers() {
        let stats = 1 << VIRTIO_BALLOON_F_STATS_VQ;
        assert_eq!(assign(stats, &[1]), [Some(Deflate)]);
        assert_eq!(assign(stats, &[0, 2]), [Some(Inflate), Some(Stats)]);
        let all = [Some(Inflate), Some(Deflate), Some(Stats), None, None];
        assert_eq!(assign(stats, &[0, 1, 2, 3, 4]), all);
        assert_eq!(assign(u64::MAX, &[]), []);
    }
}
