//! Feature negotiation (virtio 1.2 §2.2): what is offered, and whether what the driver accepted can work.
//!
//! Pure. The transport asks when the driver sets `FEATURES_OK` and when a saved state claims that a driver did; a
//! device adds its own features and never sees a set that was not offered.

use super::spec::{VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1};

/// The features that the transport and the rings give to every device.
pub const TRANSPORT_FEATURES: u64 = VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX;

/// Why the driver's choice of features is not accepted: `FEATURES_OK` stays clear.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FeatureError {
    /// The driver accepted something that is not on offer.
    #[error("driver features {driver:#x} contain {surplus:#x}, which is not offered")]
    NotOffered {
        /// The driver's choice.
        driver: u64,
        /// The part of it that is not offered.
        surplus: u64,
    },
    /// The driver wants the legacy interface, which there is none of.
    #[error("driver features {driver:#x} lack VIRTIO_F_VERSION_1")]
    Legacy {
        /// The driver's choice.
        driver: u64,
    },
}

/// What a device with `device_features` of its own offers.
pub const fn offered(device_features: u64) -> u64 {
    device_features | TRANSPORT_FEATURES
}

/// Checks the driver's choice against the offer (virtio 1.2 §2.2.1, §6.1).
///
/// # Errors
/// [`FeatureError`].
pub const fn check(offered: u64, driver: u64) -> Result<(), FeatureError> {
    let surplus = driver & !offered;
    if surplus != 0 {
        return Err(FeatureError::NotOffered { driver, surplus });
    }
    if driver & VIRTIO_F_VERSION_1 == 0 {
        return Err(FeatureError::Legacy { driver });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subset_with_version_1_is_accepted_and_nothing_else() {
        let offer = offered(1 << 5);
        assert_eq!(check(offer, offer), Ok(()));
        assert_eq!(check(offer, VIRTIO_F_VERSION_1), Ok(()));
        let legacy = check(offer, 1 << 5).expect_err("no version 1");
        assert_eq!(legacy.to_string(), "driver features 0x20 lack VIRTIO_F_VERSION_1");
        let surplus = check(offer, VIRTIO_F_VERSION_1 | 1 << 6).expect_err("bit 6 is not offered");
        assert_eq!(
            surplus.to_string(),
            "driver features 0x100000040 contain 0x40, which is not offered"
        );
    }
}
