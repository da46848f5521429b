//! Numbers of the virtio 1.2 specification that every device shares, under the names the specification uses.
//!
//! What belongs to one device type (its features, request types, configuration layout) is in that device's folder.

/// The driver may use descriptors that point to tables of descriptors (virtio 1.2 §6).
pub const VIRTIO_F_INDIRECT_DESC: u64 = 1 << 28;
/// Both sides tell the ring index at which they want to be notified (virtio 1.2 §6).
pub const VIRTIO_F_EVENT_IDX: u64 = 1 << 29;
/// The device complies with virtio 1.0 and later; a driver must accept it (virtio 1.2 §6).
pub const VIRTIO_F_VERSION_1: u64 = 1 << 32;

/// The vendor of every virtio PCI device (virtio 1.2 §4.1.2).
pub const VIRTIO_PCI_VENDOR_ID: u16 = 0x1AF4;
/// What is added to the device type to make a PCI device id (virtio 1.2 §4.1.2).
pub const VIRTIO_PCI_DEVICE_ID_BASE: u16 = 0x1040;
/// The revision of a device without a legacy interface is 1 or higher (virtio 1.2 §4.1.2.1).
pub const VIRTIO_PCI_REVISION_ID: u8 = 1;

/// Configuration structure: common configuration (virtio 1.2 §4.1.4).
pub const VIRTIO_PCI_CAP_COMMON_CFG: u8 = 1;
/// Configuration structure: notifications (virtio 1.2 §4.1.4).
pub const VIRTIO_PCI_CAP_NOTIFY_CFG: u8 = 2;
/// Configuration structure: ISR status (virtio 1.2 §4.1.4).
pub const VIRTIO_PCI_CAP_ISR_CFG: u8 = 3;
/// Configuration structure: device-specific configuration (virtio 1.2 §4.1.4).
pub const VIRTIO_PCI_CAP_DEVICE_CFG: u8 = 4;
/// Configuration structure: access to BARs through configuration space (virtio 1.2 §4.1.4).
pub const VIRTIO_PCI_CAP_PCI_CFG: u8 = 5;

/// No MSI-X vector is mapped to an event (virtio 1.2 §4.1.5.1.2).
pub const VIRTIO_MSI_NO_VECTOR: u16 = 0xFFFF;

/// ISR status: a queue was used (virtio 1.2 §4.1.4.5).
pub const VIRTIO_PCI_ISR_QUEUE: u8 = 1 << 0;
/// ISR status: the configuration changed (virtio 1.2 §4.1.4.5).
pub const VIRTIO_PCI_ISR_CONFIG: u8 = 1 << 1;
