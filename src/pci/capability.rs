//! PCI capabilities as they are put into a configuration space (PCI 3.0 §6.7).
//!
//! A [`Capability`] is a recipe: its id, its bytes after the two of the list header, and which of their bits the
//! guest may write. `ConfigSpace::add_capability` lays it out and links it.

/// The capability id of MSI-X (PCI 3.0 appendix H).
pub const PCI_CAP_ID_MSIX: u8 = 0x11;
/// The capability id of vendor-specific capabilities (PCI 3.0 appendix H).
pub const PCI_CAP_ID_VNDR: u8 = 0x09;

/// MSI-X Message Control: MSI-X Enable (PCI 3.0 §6.8.2.3).
pub const MSIX_CONTROL_ENABLE: u16 = 1 << 15;
/// MSI-X Message Control: Function Mask (PCI 3.0 §6.8.2.3).
pub const MSIX_CONTROL_FUNCTION_MASK: u16 = 1 << 14;
/// The offset of Message Control in the MSI-X capability.
pub const MSIX_CONTROL_OFFSET: u8 = 2;

/// One capability, ready to be added to a configuration space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capability {
    pub(super) id: u8,
    pub(super) body: Vec<u8>,
    pub(super) writable: Vec<u8>,
}

impl Capability {
    /// The MSI-X capability (PCI 3.0 §6.8.2) of a function with `vector_count` vectors (1–2048), whose table and
    /// pending bits lie in BAR 0 at the given offsets, multiples of 8.
    pub fn msix(vector_count: u16, table_offset: u32, pba_offset: u32) -> Self {
        let mut body = Vec::with_capacity(10);
        body.extend_from_slice(&vector_count.wrapping_sub(1).to_le_bytes());
        body.extend_from_slice(&table_offset.to_le_bytes());
        body.extend_from_slice(&pba_offset.to_le_bytes());
        let mut writable = vec![0; body.len()];
        let control = (MSIX_CONTROL_ENABLE | MSIX_CONTROL_FUNCTION_MASK).to_le_bytes();
        writable[..2].copy_from_slice(&control);
        Self {
            id: PCI_CAP_ID_MSIX,
            body,
            writable,
        }
    }

    /// A vendor-specific capability: its length byte, then `body`. A bit set in `writable` (shorter than `body` is
    /// filled with zeros) can be written by the guest.
    pub fn vendor_specific(body: &[u8], writable: &[u8]) -> Self {
        let length_bytes = u8::try_from(body.len() + 3).unwrap_or(u8::MAX);
        let mut bytes = vec![length_bytes];
        bytes.extend_from_slice(body);
        let mut bits = vec![0];
        bits.extend_from_slice(writable);
        bits.resize(bytes.len(), 0);
        Self {
            id: PCI_CAP_ID_VNDR,
            body: bytes,
            writable: bits,
        }
    }
}

/// The capability does not fit into what is left of the first 256 bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("capability {id:#04x} needs {length_bytes} bytes, {free_bytes} are free in the configuration space")]
pub struct CapabilityError {
    /// The capability's id.
    pub id: u8,
    /// What it needs.
    pub length_bytes: usize,
    /// What is left.
    pub free_bytes: usize,
}
