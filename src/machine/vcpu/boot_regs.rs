//! SKELETON
/// How the first vCPU enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootProtocol {
    /// PVH.
    Pvh,
    /// Linux 64-bit.
    Linux64,
}
/// Where the first vCPU begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootEntry {
    /// The protocol.
    pub protocol: BootProtocol,
    /// The address of the first instruction.
    pub address: u64,
}
