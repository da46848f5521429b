//! The PCI transport (virtio 1.2 §4.1): configuration structures, notification, interrupts, status.
