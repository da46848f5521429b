//! The pieces of guest memory that a disk request reads or fills.
//!
//! Made from addresses that a driver gave, checked once, and alive as long as the request: the buffers hold guest
//! memory itself, so no host address derived from them can go away while a request is in flight. The guest may change
//! their content at any time; nobody may take a reference into them.

use std::fmt;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// Checked pieces of guest memory, in the order in which the disk's bytes go through them.
pub struct GuestBuffers {
    memory: Arc<GuestMemoryMmap>,
    pieces: Vec<Piece>,
    length_bytes: u64,
}

/// A run of bytes inside one region of guest memory.
#[derive(Clone, Copy)]
struct Piece {
    address: GuestAddress,
    length_bytes: usize,
}

/// Why addresses cannot be buffers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BufferError {
    /// A piece is not wholly in guest memory.
    #[error("buffer {address:#x}+{length_bytes:#x} is not in guest memory")]
    Outside { address: u64, length_bytes: u32 },
    /// There are more pieces than one call of the host takes.
    #[error("the request has more than {max_count} buffers")]
    TooMany { max_count: usize },
}

impl GuestBuffers {
    /// The most pieces of one request (Linux UIO_MAXIOV).
    pub const PIECES_MAX: usize = 1024;

    /// Checks that every range, an address and a length in bytes, lies in `memory`. Empty ranges are left out.
    ///
    /// # Errors
    /// [`BufferError`] for the first range that does not.
    pub fn new(
        memory: Arc<GuestMemoryMmap>,
        ranges: impl IntoIterator<Item = (GuestAddress, u32)>,
    ) -> Result<Self, BufferError> {
        let mut pieces = Vec::new();
        let mut total_bytes = 0;
        for (address, length_bytes) in ranges {
            let outside = BufferError::Outside {
                address: address.0,
                length_bytes,
            };
            // A range may cross from one region into the next; each piece stays in one.
            let mut next = address;
            for slice in memory.get_slices(address, length_bytes as usize) {
                let slice = slice.map_err(|_| outside.clone())?;
                if pieces.len() == Self::PIECES_MAX {
                    let max_count = Self::PIECES_MAX;
                    return Err(BufferError::TooMany { max_count });
                }
                pieces.push(Piece {
                    address: next,
                    length_bytes: slice.len(),
                });
                next = GuestAddress(next.0.checked_add(slice.len() as u64).ok_or(outside.clone())?);
            }
            total_bytes += u64::from(length_bytes);
        }
        Ok(Self {
            memory,
            pieces,
            length_bytes: total_bytes,
        })
    }

    /// The length of all pieces together.
    pub fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    /// The pieces as host memory, in order.
    pub fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        self.pieces.iter().map(|piece| {
            self.memory
                .get_slice(piece.address, piece.length_bytes)
                .expect("checked when the buffers were made, and this view of guest memory never changes")
        })
    }

    /// Copies `bytes` into the buffers, up to the shorter length.
    pub fn fill_from(&self, bytes: &[u8]) {
        let mut rest = bytes;
        for slice in self.slices() {
            let (head, tail) = rest.split_at(rest.len().min(slice.len()));
            slice.copy_from(head);
            rest = tail;
        }
    }

    /// Copies the buffers into `bytes`, up to the shorter length.
    pub fn copy_to(&self, bytes: &mut [u8]) {
        let mut rest = bytes;
        for slice in self.slices() {
            let (head, tail) = rest.split_at_mut(rest.len().min(slice.len()));
            slice.copy_to(head);
            rest = tail;
        }
    }
}

impl fmt::Debug for GuestBuffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "GuestBuffers({} pieces, {} bytes)",
            self.pieces.len(),
            self.length_bytes
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> Arc<GuestMemoryMmap> {
        let ranges = [
            (GuestAddress(0), 0x1000),
            (GuestAddress(0x1000), 0x1000),
            (GuestAddress(0x4000), 0x1000),
        ];
        Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("the host has 12 KiB"))
    }

    #[test]
    fn bytes_pass_through_pieces_and_across_regions_in_order() {
        let ranges = [
            (GuestAddress(0x4000), 3),
            (GuestAddress(0x10), 0),
            (GuestAddress(0xFFE), 4),
        ];
        let buffers = GuestBuffers::new(memory(), ranges).expect("all ranges are in memory");
        assert_eq!(buffers.length_bytes(), 7);
        let lengths: Vec<_> = buffers.slices().map(|slice| slice.len()).collect();
        assert_eq!(
            lengths,
            [3, 2, 2],
            "the last range crosses from one region to the next"
        );
        buffers.fill_from(b"abcdefg");
        let mut copy = [0; 7];
        buffers.copy_to(&mut copy);
        assert_eq!(&copy, b"abcdefg");
    }

    #[test]
    fn ranges_outside_memory_are_refused_with_their_address() {
        for (address, length_bytes) in [(0x1FFF, 2), (0x3000, 1), (u64::MAX, 1), (u64::MAX - 1, 8)] {
            let error = GuestBuffers::new(memory(), [(GuestAddress(address), length_bytes)])
                .expect_err("the range is outside");
            let expected = format!("buffer {address:#x}+{length_bytes:#x} is not in guest memory");
            assert_eq!(error.to_string(), expected);
        }
    }

    #[test]
    fn the_number_of_pieces_is_limited() {
        let ranges = |count| std::iter::repeat_n((GuestAddress(0), 1), count);
        let max_count = GuestBuffers::PIECES_MAX;
        assert!(GuestBuffers::new(memory(), ranges(max_count)).is_ok());
        let error = GuestBuffers::new(memory(), ranges(max_count + 1)).err();
        assert_eq!(error, Some(BufferError::TooMany { max_count }));
    }
}
