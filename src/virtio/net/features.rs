//! What a network card offers and what the driver's choice means (virtio 1.2 §5.1.3).
//!
//! Checksums and segmentation are offered as far as the backend takes part in them. Pure functions, asked by
//! `device`.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
};

use crate::net::{NetBackend, Offloads};
use crate::virtio::device::DeviceFault;

/// The features that depend on others: the driver must not accept the first without one of the second
/// (virtio 1.2 §5.1.3.1).
const REQUIREMENTS: [(u32, &[u32], &str); 7] = [
    (
        VIRTIO_NET_F_GUEST_TSO4,
        &[VIRTIO_NET_F_GUEST_CSUM],
        "GUEST_TSO4 without GUEST_CSUM",
    ),
    (
        VIRTIO_NET_F_GUEST_TSO6,
        &[VIRTIO_NET_F_GUEST_CSUM],
        "GUEST_TSO6 without GUEST_CSUM",
    ),
    (
        VIRTIO_NET_F_GUEST_ECN,
        &[VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6],
        "GUEST_ECN without GUEST_TSO4 or GUEST_TSO6",
    ),
    (
        VIRTIO_NET_F_HOST_TSO4,
        &[VIRTIO_NET_F_CSUM],
        "HOST_TSO4 without CSUM",
    ),
    (
        VIRTIO_NET_F_HOST_TSO6,
        &[VIRTIO_NET_F_CSUM],
        "HOST_TSO6 without CSUM",
    ),
    (
        VIRTIO_NET_F_HOST_ECN,
        &[VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6],
        "HOST_ECN without HOST_TSO4 or HOST_TSO6",
    ),
    (VIRTIO_NET_F_MQ, &[VIRTIO_NET_F_CTRL_VQ], "MQ without CTRL_VQ"),
];

/// Whether `features` contain feature `bit`.
pub(super) fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

/// The features of a card over `backend`. The control queue exists for the number of queue pairs only, so that a
/// card with one pair costs the guest no third queue.
pub(super) fn offered(backend: &dyn NetBackend) -> u64 {
    let transmit = backend.transmit_offloads();
    let receive = backend.receive_offloads();
    let multi_queue = backend.queue_pair_count() > 1;
    let bits = [
        (true, VIRTIO_NET_F_MAC),
        (true, VIRTIO_NET_F_STATUS),
        (true, VIRTIO_NET_F_MRG_RXBUF),
        (transmit.checksum, VIRTIO_NET_F_CSUM),
        (transmit.tso4, VIRTIO_NET_F_HOST_TSO4),
        (transmit.tso6, VIRTIO_NET_F_HOST_TSO6),
        (transmit.ecn, VIRTIO_NET_F_HOST_ECN),
        (receive.checksum, VIRTIO_NET_F_GUEST_CSUM),
        (receive.tso4, VIRTIO_NET_F_GUEST_TSO4),
        (receive.tso6, VIRTIO_NET_F_GUEST_TSO6),
        (receive.ecn, VIRTIO_NET_F_GUEST_ECN),
        (multi_queue, VIRTIO_NET_F_CTRL_VQ),
        (multi_queue, VIRTIO_NET_F_MQ),
    ];
    let bits = bits.iter().filter(|(offered, _)| *offered);
    bits.fold(0, |features, (_, bit)| features | 1 << bit)
}

/// Refuses a choice that contradicts itself.
///
/// # Errors
/// [`DeviceFault::Driver`] with the features' names.
pub(super) fn check(driver_features: u64) -> Result<(), DeviceFault> {
    for (bit, requires, reason) in REQUIREMENTS {
        if has(driver_features, bit) && !requires.iter().any(|bit| has(driver_features, *bit)) {
            return Err(DeviceFault::Driver(format!("the driver accepted {reason}")));
        }
    }
    Ok(())
}

/// The work on received packets that the driver takes over.
pub(super) fn receive_offloads(driver_features: u64) -> Offloads {
    Offloads {
        checksum: has(driver_features, VIRTIO_NET_F_GUEST_CSUM),
        tso4: has(driver_features, VIRTIO_NET_F_GUEST_TSO4),
        tso6: has(driver_features, VIRTIO_NET_F_GUEST_TSO6),
        ecn: has(driver_features, VIRTIO_NET_F_GUEST_ECN),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::fake::FakeNet;

    #[test]
    fn a_control_queue_comes_with_several_pairs_only() {
        let (one, _far) = FakeNet::new(1).expect("descriptors are free");
        let (two, _far) = FakeNet::new(2).expect("descriptors are free");
        // CSUM GUEST_CSUM MAC GUEST_TSO4/6 GUEST_ECN HOST_TSO4/6 HOST_ECN MRG_RXBUF STATUS
        assert_eq!(offered(&one), 0x1_bba3);
        assert_eq!(offered(&two), 0x1_bba3 | 1 << 17 | 1 << 22);
    }

    #[test]
    fn every_requirement_is_enforced_and_nothing_else() {
        let (backend, _far) = FakeNet::new(2).expect("descriptors are free");
        check(offered(&backend)).expect("the whole offer is consistent");
        check(0).expect("nothing at all is consistent");
        for (bit, requires, reason) in REQUIREMENTS {
            let features = requires
                .iter()
                .fold(offered(&backend), |left, bit| left & !(1 << bit));
            // Only this requirement may be violated: drop what hangs on the removed features otherwise.
            let features = (features & !dependents(features)) | 1 << bit;
            let error = check(features).expect_err("a required feature is missing");
            assert_eq!(error.to_string(), format!("the driver accepted {reason}"));
        }
    }

    /// The features in `features` whose requirement is not met.
    fn dependents(features: u64) -> u64 {
        let unmet = REQUIREMENTS.iter().filter(|(bit, requires, _)| {
            has(features, *bit) && !requires.iter().any(|bit| has(features, *bit))
        });
        unmet.fold(0, |all, (bit, ..)| all | 1 << bit)
    }
}
