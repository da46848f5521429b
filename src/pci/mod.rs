//! PCI as the guest sees it: configuration space, BARs, capabilities, MSI-X, host bridges and slots.

pub mod device;
