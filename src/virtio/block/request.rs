//! One request of the driver (virtio 1.2 §5.2.6): from descriptors to what is to be done.
//!
//! The driver may cut a request into descriptors as it likes (§2.7.4), so header, data and status are found by
//! counting bytes. Each byte that decides anything is read from guest memory once. Everything here comes from the
//! guest; whatever it says, the outcome is a plan, or a reason why the device cannot go on.

use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::config::{DISCARD_SECTORS_MAX, QUEUE_SIZE, REQUEST_BYTES_MAX, WRITE_ZEROES_SECTORS_MAX};
use crate::storage::{DiskOperation, DiskProperties, GuestBuffers, SECTOR_BYTES};

/// The length of `struct virtio_blk_req` before its data.
const HEADER_BYTES: usize = 16;
/// The length of `struct virtio_blk_discard_write_zeroes`.
const CLEAR_BYTES: usize = 16;
/// The length of the answer to `VIRTIO_BLK_T_GET_ID` (VIRTIO_BLK_ID_BYTES).
pub(super) const ID_BYTES: usize = 20;

/// The last byte of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = VIRTIO_BLK_S_OK as u8,
    IoErr = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// A request taken apart.
#[derive(Debug)]
pub(super) struct Request {
    /// `type`.
    pub(super) kind: u32,
    /// `sector`.
    pub(super) sector: u64,
    /// Where the status byte goes; inside guest memory.
    pub(super) status: GuestAddress,
    /// The readable bytes after the header.
    readable: Vec<(GuestAddress, u32)>,
    /// The writable bytes before the status.
    writable: Vec<(GuestAddress, u32)>,
}

/// Why a chain is not a request. The device cannot answer it and needs a reset.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error("request has {count} descriptors, the limit is {QUEUE_SIZE}")]
    TooLong { count: usize },
    #[error("request has a readable descriptor after a writable one")]
    Order,
    #[error("request header has {length_bytes} readable bytes of {HEADER_BYTES}")]
    Header { length_bytes: usize },
    #[error("request header at {address:#x} is not in guest memory")]
    HeaderOutside { address: u64 },
    #[error("request has no writable byte for its status")]
    NoStatus,
    #[error("request status at {address:#x} is not in guest memory")]
    StatusOutside { address: u64 },
}

/// What is to be done with a request.
#[derive(Debug)]
pub(super) enum Plan {
    /// The disk carries it out; on success, `data_bytes` of the guest's memory were written.
    Submit {
        operation: DiskOperation,
        data_bytes: u32,
    },
    /// It is answered at once.
    Answer { status: Status, data_bytes: u32 },
}

/// What a request is judged by.
pub(super) struct Disk {
    pub(super) properties: DiskProperties,
    /// The serial number, filled up with zeros.
    pub(super) id: [u8; ID_BYTES],
}

impl Request {
    /// Finds header and status.
    ///
    /// # Errors
    /// [`Malformed`] when one of them is missing or cannot be reached.
    pub(super) fn parse(memory: &GuestMemoryMmap, descriptors: &[Descriptor]) -> Result<Self, Malformed> {
        let count = descriptors.len();
        if count > usize::from(QUEUE_SIZE) {
            return Err(Malformed::TooLong { count });
        }
        let first_writable = descriptors
            .iter()
            .position(|descriptor| descriptor.is_write_only());
        let (readable, writable) = descriptors.split_at(first_writable.unwrap_or(count));
        if writable.iter().any(|descriptor| !descriptor.is_write_only()) {
            return Err(Malformed::Order);
        }
        let mut data = Vec::new();
        let header = take_header(memory, readable, &mut data)?;
        let (status, writable) = take_status(memory, writable)?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        Ok(Self {
            kind: u32::from_le_bytes([k0, k1, k2, k3]),
            sector: u64::from_le_bytes(sector),
            status,
            readable: data,
            writable,
        })
    }

    /// Decides what is to be done. Writes to guest memory only to answer `VIRTIO_BLK_T_GET_ID`.
    pub(super) fn plan(&self, memory: &Arc<GuestMemoryMmap>, disk: &Disk) -> Plan {
        let planned = match self.kind {
            VIRTIO_BLK_T_IN => {
                let read = |offset_bytes, buffers| DiskOperation::Read {
                    offset_bytes,
                    buffers,
                };
                self.transfer(memory, &self.writable, read)
            }
            VIRTIO_BLK_T_OUT => {
                let write = |offset_bytes, buffers| DiskOperation::Write {
                    offset_bytes,
                    buffers,
                };
                self.transfer(memory, &self.readable, write)
            }
            VIRTIO_BLK_T_FLUSH => Ok(Some(DiskOperation::Flush)),
            VIRTIO_BLK_T_GET_ID => return self.identify(memory, disk),
            VIRTIO_BLK_T_DISCARD if disk.properties.discard => self.clear(memory),
            VIRTIO_BLK_T_WRITE_ZEROES if disk.properties.write_zeroes => self.clear(memory),
            _ => Err(Status::Unsupported),
        };
        match planned {
            Ok(None) => answer(Status::Ok),
            Err(status) => answer(status),
            Ok(Some(operation)) if operation.check(&disk.properties).is_err() => answer(Status::IoErr),
            Ok(Some(operation)) => {
                let data_bytes = match &operation {
                    DiskOperation::Read { buffers, .. } => buffers.length_bytes() as u32,
                    _ => 0,
                };
                Plan::Submit {
                    operation,
                    data_bytes,
                }
            }
        }
    }

    /// A read or write of whole sectors; `None` when there is nothing to transfer.
    fn transfer(
        &self,
        memory: &Arc<GuestMemoryMmap>,
        data: &[(GuestAddress, u32)],
        make: impl FnOnce(u64, GuestBuffers) -> DiskOperation,
    ) -> Result<Option<DiskOperation>, Status> {
        let length_bytes = total_bytes(data);
        if !length_bytes.is_multiple_of(SECTOR_BYTES) || length_bytes > u64::from(REQUEST_BYTES_MAX) {
            return Err(Status::IoErr);
        }
        if length_bytes == 0 {
            return Ok(None);
        }
        let offset_bytes = self.sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoErr)?;
        let buffers = GuestBuffers::new(memory.clone(), data.iter().copied()).map_err(|_| Status::IoErr)?;
        Ok(Some(make(offset_bytes, buffers)))
    }

    /// A discard or a write of zeros (§5.2.6.2): one range, of which an unknown flag is refused as unsupported.
    fn clear(&self, memory: &Arc<GuestMemoryMmap>) -> Result<Option<DiskOperation>, Status> {
        if total_bytes(&self.readable) != CLEAR_BYTES as u64 {
            return Err(Status::IoErr);
        }
        let mut segment = [0; CLEAR_BYTES];
        GuestBuffers::new(memory.clone(), self.readable.iter().copied())
            .map_err(|_| Status::IoErr)?
            .copy_to(&mut segment);
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = segment;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sector_count = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes(flags);
        let discard = self.kind == VIRTIO_BLK_T_DISCARD;
        let (known_flags, count_max) = if discard {
            (0, DISCARD_SECTORS_MAX)
        } else {
            (VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, WRITE_ZEROES_SECTORS_MAX)
        };
        if flags & !known_flags != 0 {
            return Err(Status::Unsupported);
        }
        if sector_count == 0 || sector_count > count_max {
            return Err(Status::IoErr);
        }
        let offset_bytes = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoErr)?;
        let length_bytes = u64::from(sector_count) * SECTOR_BYTES;
        Ok(Some(if discard {
            DiskOperation::Discard {
                offset_bytes,
                length_bytes,
            }
        } else {
            DiskOperation::WriteZeroes {
                offset_bytes,
                length_bytes,
                unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
            }
        }))
    }

    fn identify(&self, memory: &Arc<GuestMemoryMmap>, disk: &Disk) -> Plan {
        if total_bytes(&self.writable) < ID_BYTES as u64 {
            return answer(Status::IoErr);
        }
        let Ok(buffers) = GuestBuffers::new(memory.clone(), self.writable.iter().copied()) else {
            return answer(Status::IoErr);
        };
        buffers.fill_from(&disk.id);
        Plan::Answer {
            status: Status::Ok,
            data_bytes: ID_BYTES as u32,
        }
    }
}

fn answer(status: Status) -> Plan {
    Plan::Answer {
        status,
        data_bytes: 0,
    }
}

fn total_bytes(ranges: &[(GuestAddress, u32)]) -> u64 {
    ranges.iter().map(|(_, length)| u64::from(*length)).sum()
}

/// The first 16 readable bytes; the ranges behind them go to `rest`.
fn take_header(
    memory: &GuestMemoryMmap,
    readable: &[Descriptor],
    rest: &mut Vec<(GuestAddress, u32)>,
) -> Result<[u8; HEADER_BYTES], Malformed> {
    let mut header = [0; HEADER_BYTES];
    let mut length_bytes = 0;
    for descriptor in readable {
        let address = descriptor.addr();
        let taken = (descriptor.len() as usize).min(HEADER_BYTES - length_bytes);
        memory
            .read_slice(&mut header[length_bytes..length_bytes + taken], address)
            .map_err(|_| Malformed::HeaderOutside { address: address.0 })?;
        length_bytes += taken;
        if descriptor.len() as usize > taken {
            // An address that wraps around is outside memory, and is found out with the data.
            let behind = GuestAddress(address.0.wrapping_add(taken as u64));
            rest.push((behind, descriptor.len() - taken as u32));
        }
    }
    if length_bytes < HEADER_BYTES {
        return Err(Malformed::Header { length_bytes });
    }
    Ok(header)
}

/// The address of the last writable byte, and the ranges before it.
fn take_status(
    memory: &GuestMemoryMmap,
    writable: &[Descriptor],
) -> Result<(GuestAddress, Vec<(GuestAddress, u32)>), Malformed> {
    let mut ranges: Vec<_> = writable
        .iter()
        .filter(|descriptor| descriptor.len() > 0)
        .map(|descriptor| (descriptor.addr(), descriptor.len()))
        .collect();
    let Some((address, length_bytes)) = ranges.pop() else {
        return Err(Malformed::NoStatus);
    };
    let before = length_bytes - 1;
    let status = GuestAddress(address.0.wrapping_add(u64::from(before)));
    if !memory.address_in_range(status) {
        return Err(Malformed::StatusOutside { address: status.0 });
    }
    if before > 0 {
        ranges.push((address, before));
    }
    Ok((status, ranges))
}
