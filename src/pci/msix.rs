//! MSI-X: the vector table, the pending bits and the way of a vector into the guest (PCI 3.0 §6.8.2).
//!
//! A vector that can be delivered is one that is enabled, not masked by the function and not masked itself. Only
//! when a vector first gets there does it take a GSI, and the host's routing table is written only when its message
//! has changed since. A vector that is signalled while it cannot be delivered is pending and fires when it can.
//!
//! The owner serializes all calls; nothing here blocks.

use super::saved::{SavedMsixV1, SavedMsixVectorV1};
use crate::guest_log::GuestLog;
use crate::machine::gsi::{GsiError, GsiTable, MsiMessage, MsiRoute};
use crate::unit::RestoreError;

/// The bytes of one table entry (PCI 3.0 §6.8.2).
pub const MSIX_ENTRY_BYTES: u64 = 16;
/// Message Upper Address in an entry (PCI 3.0 §6.8.2.5).
const ENTRY_UPPER_ADDRESS: u64 = 4;
/// Message Data in an entry (PCI 3.0 §6.8.2.6).
const ENTRY_DATA: u64 = 8;
/// Vector Control in an entry (PCI 3.0 §6.8.2.7).
const ENTRY_CONTROL: u64 = 12;
/// Vector Control: the vector is masked (PCI 3.0 §6.8.2.7).
const CONTROL_MASKED: u32 = 1;

/// The MSI-X vectors of one function.
pub struct Msix {
    gsi: GsiTable,
    log: GuestLog,
    enabled: bool,
    function_masked: bool,
    vectors: Vec<Vector>,
}

/// One vector: what the guest wrote, and what the host was told.
struct Vector {
    message: MsiMessage,
    masked: bool,
    pending: bool,
    route: Option<Route>,
}

struct Route {
    guard: MsiRoute,
    routed: Option<MsiMessage>,
}

impl Vector {
    const fn new() -> Self {
        Self {
            message: MsiMessage { address: 0, data: 0 },
            masked: true,
            pending: false,
            route: None,
        }
    }
}

impl Msix {
    /// Makes `vector_count` masked vectors; what the host refuses goes to `log`.
    pub fn new(vector_count: u16, gsi: GsiTable, log: GuestLog) -> Self {
        Self {
            gsi,
            log,
            enabled: false,
            function_masked: false,
            vectors: (0..vector_count).map(|_| Vector::new()).collect(),
        }
    }

    /// The number of vectors.
    pub fn vector_count(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// Follows the two writable bits of Message Control (PCI 3.0 §6.8.2.3). Disabling forgets what is pending and
    /// gives every GSI back.
    pub fn set_control(&mut self, enabled: bool, function_masked: bool) {
        if (self.enabled, self.function_masked) == (enabled, function_masked) {
            return;
        }
        self.enabled = enabled;
        self.function_masked = function_masked;
        for vector in 0..self.vectors.len() {
            if !enabled {
                self.vectors[vector].pending = false;
                self.vectors[vector].route = None;
            }
            self.update(vector);
        }
    }

    /// The guest reads the table. Only aligned accesses of 4 and 8 bytes are answered (PCI 3.0 §6.8.2).
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        if !is_natural(offset, data) {
            return;
        }
        for (index, half) in data.chunks_exact_mut(4).enumerate() {
            let offset = offset + index as u64 * 4;
            let Some(vector) = self.vectors.get((offset / MSIX_ENTRY_BYTES) as usize) else {
                return;
            };
            let value = match offset % MSIX_ENTRY_BYTES {
                ENTRY_UPPER_ADDRESS => (vector.message.address >> 32) as u32,
                ENTRY_DATA => vector.message.data,
                ENTRY_CONTROL => u32::from(vector.masked),
                _ => vector.message.address as u32,
            };
            half.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// The guest writes the table. Only aligned accesses of 4 and 8 bytes are taken (PCI 3.0 §6.8.2).
    pub fn table_write(&mut self, offset: u64, data: &[u8]) {
        if !is_natural(offset, data) {
            return;
        }
        let index = (offset / MSIX_ENTRY_BYTES) as usize;
        let Some(vector) = self.vectors.get_mut(index) else {
            return;
        };
        for (half, value) in data.as_chunks::<4>().0.iter().enumerate() {
            let value = u32::from_le_bytes(*value);
            let message = &mut vector.message;
            match offset % MSIX_ENTRY_BYTES + half as u64 * 4 {
                ENTRY_UPPER_ADDRESS => {
                    message.address = (message.address & 0xFFFF_FFFF) | (u64::from(value) << 32);
                }
                ENTRY_DATA => message.data = value,
                ENTRY_CONTROL => vector.masked = value & CONTROL_MASKED != 0,
                // The two low bits of the address are always zero (PCI 3.0 §6.8.2.4).
                _ => message.address = (message.address & !0xFFFF_FFFF) | u64::from(value & !3),
            }
        }
        self.update(index);
    }

    /// The guest reads the pending bits: one per vector, the rest zero.
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let first = offset.saturating_add(index as u64).saturating_mul(8);
            *byte = 0;
            for bit in 0..8 {
                let vector = usize::try_from(first.saturating_add(bit)).ok();
                let pending = vector.and_then(|vector| self.vectors.get(vector));
                *byte |= u8::from(pending.is_some_and(|vector| vector.pending)) << bit;
            }
        }
    }

    /// Raises `vector`: now, or when it is unmasked. A vector that does not exist is nobody's.
    pub fn signal(&mut self, vector: u16) {
        let index = usize::from(vector);
        if self.enabled && index < self.vectors.len() {
            self.vectors[index].pending = true;
            self.update(index);
        }
    }

    /// Returns to the state after power-on and gives every GSI back.
    pub fn reset(&mut self) {
        self.enabled = false;
        self.function_masked = false;
        self.vectors.fill_with(Vector::new);
    }

    /// The vectors' state; the control bits belong to the configuration space.
    pub fn save(&self) -> SavedMsixV1 {
        let vectors = self.vectors.iter().map(|vector| SavedMsixVectorV1 {
            address: vector.message.address,
            data: vector.message.data,
            masked: vector.masked,
            pending: vector.pending,
        });
        SavedMsixV1 {
            vectors: vectors.collect(),
        }
    }

    /// Takes over the vectors of a saved state, disabled until [`Msix::set_control`]. The state is untrusted.
    ///
    /// # Errors
    /// [`RestoreError::Value`] when it has another number of vectors.
    pub fn restore(&mut self, saved: &SavedMsixV1) -> Result<(), RestoreError> {
        let SavedMsixV1 { vectors } = saved;
        if vectors.len() != self.vectors.len() {
            return Err(RestoreError::Value {
                field: "msix.vectors",
                value: vectors.len().to_string(),
                reason: "the device has another number of vectors",
            });
        }
        self.reset();
        for (vector, saved) in self.vectors.iter_mut().zip(vectors) {
            let SavedMsixVectorV1 {
                address,
                data,
                masked,
                pending,
            } = *saved;
            vector.message = MsiMessage {
                address: address & !3,
                data,
            };
            vector.masked = masked;
            vector.pending = pending;
        }
        Ok(())
    }

    /// Brings the host up to date with `vector` and delivers what is pending, if it can be delivered.
    fn update(&mut self, index: usize) {
        let deliverable = self.enabled && !self.function_masked && !self.vectors[index].masked;
        if !deliverable {
            return;
        }
        let vector = &mut self.vectors[index];
        if let Err(error) = vector.connect(&self.gsi) {
            self.log.warn(format_args!("msi-x vector {index}: {error}"));
            return;
        }
        if let Some(route) = &vector.route
            && std::mem::take(&mut vector.pending)
        {
            route.guard.trigger();
        }
    }
}

impl Vector {
    /// Takes a GSI if there is none yet and routes it to the message if that has changed.
    fn connect(&mut self, gsi: &GsiTable) -> Result<(), GsiError> {
        let mut route = match self.route.take() {
            Some(route) => route,
            None => Route {
                guard: gsi.msi()?,
                routed: None,
            },
        };
        let connected = if route.routed == Some(self.message) {
            Ok(())
        } else {
            route.guard.set_message(self.message)
        };
        if connected.is_ok() {
            route.routed = Some(self.message);
        }
        self.route = Some(route);
        connected
    }
}

fn is_natural(offset: u64, data: &[u8]) -> bool {
    matches!(data.len(), 4 | 8) && offset.is_multiple_of(data.len() as u64)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::machine::fake::FakeVm;

    fn msix(vector_count: u16) -> (Arc<FakeVm>, GsiTable, Msix) {
        let vm = Arc::new(FakeVm::default());
        let table = GsiTable::new(vm.clone());
        let msix = Msix::new(vector_count, table.clone(), GuestLog::new("test"));
        (vm, table, msix)
    }

    fn program(msix: &mut Msix, vector: u64, data: u32) {
        let entry = vector * MSIX_ENTRY_BYTES;
        msix.table_write(entry, &0xFEE0_1000u32.to_le_bytes());
        msix.table_write(entry + 4, &[0; 4]);
        msix.table_write(entry + 8, &data.to_le_bytes());
    }

    fn mask(msix: &mut Msix, vector: u64, masked: bool) {
        let control = u32::from(masked).to_le_bytes();
        msix.table_write(vector * MSIX_ENTRY_BYTES + ENTRY_CONTROL, &control);
    }

    /// What the guest got: the eventfd's counter stands for the interrupts raised.
    fn raised(msix: &Msix, vector: usize) -> u64 {
        let route = msix.vectors[vector].route.as_ref();
        route.map_or(0, |route| route.guard.irqfd().read().unwrap_or(0))
    }

    fn pending(msix: &Msix) -> u8 {
        let mut byte = [0xFF];
        msix.pba_read(0, &mut byte);
        byte[0]
    }

    #[test]
    fn a_vector_costs_a_gsi_only_once_it_is_unmasked() {
        let (vm, table, mut msix) = msix(3);
        msix.set_control(true, true);
        program(&mut msix, 1, 0x41);
        mask(&mut msix, 1, false);
        assert_eq!((table.msi_count(), vm.routing_count()), (0, 0));
        msix.set_control(true, false);
        assert_eq!(
            (table.msi_count(), vm.routing_count(), vm.irqfd_count()),
            (1, 1, 1)
        );
        msix.signal(1);
        assert_eq!((raised(&msix, 1), pending(&msix)), (1, 0));
        msix.set_control(false, false);
        assert_eq!((table.msi_count(), vm.irqfd_count()), (0, 0));
    }

    #[test]
    fn masking_and_unmasking_writes_the_routes_only_for_a_new_message() {
        let (vm, _, mut msix) = msix(1);
        msix.set_control(true, false);
        program(&mut msix, 0, 0x41);
        for _ in 0..5 {
            mask(&mut msix, 0, false);
            mask(&mut msix, 0, true);
        }
        assert_eq!(vm.routing_count(), 1);
        program(&mut msix, 0, 0x42);
        assert_eq!(vm.routing_count(), 1, "still masked");
        mask(&mut msix, 0, false);
        assert_eq!((vm.routing_count(), vm.irqfd_count()), (2, 1));
    }

    #[test]
    fn a_masked_vector_is_pending_and_fires_once_when_it_is_unmasked() {
        let (_, _, mut msix) = msix(2);
        msix.signal(0);
        assert_eq!(pending(&msix), 0, "disabled vectors are never pending");
        msix.set_control(true, false);
        program(&mut msix, 1, 0x41);
        msix.signal(1);
        msix.signal(1);
        assert_eq!(pending(&msix), 0b10);
        mask(&mut msix, 1, false);
        assert_eq!((raised(&msix, 1), pending(&msix)), (1, 0));
        msix.set_control(true, true);
        msix.signal(1);
        assert_eq!((raised(&msix, 1), pending(&msix)), (0, 0b10));
        msix.set_control(true, false);
        assert_eq!((raised(&msix, 1), pending(&msix)), (1, 0));
        msix.signal(2);
        msix.signal(u16::MAX);
        assert_eq!(pending(&msix), 0);
    }

    #[test]
    fn the_table_takes_aligned_words_and_double_words_only() {
        let (_, _, mut msix) = msix(1);
        let entry = [0x07, 0, 0xE0, 0xFE, 1, 0, 0, 0];
        msix.table_write(0, &entry);
        msix.table_write(8, &[0x41, 0, 0, 0, 0xFE, 0xFF, 0xFF, 0xFF]);
        let mut back = [0; 8];
        msix.table_read(0, &mut back);
        assert_eq!(back, [0x04, 0, 0xE0, 0xFE, 1, 0, 0, 0]);
        msix.table_read(8, &mut back);
        assert_eq!(back, [0x41, 0, 0, 0, 0, 0, 0, 0], "only the mask bit exists");
        for (offset, length) in [(0, 1), (0, 2), (2, 4), (4, 8), (16, 4), (u64::MAX - 7, 8)] {
            msix.table_write(offset, &vec![0xAA; length]);
            let mut untouched = vec![0xFF; length];
            msix.table_read(offset, &mut untouched);
            assert_eq!(untouched, vec![0xFF; length], "{length} bytes at {offset:#x}");
        }
        msix.table_read(0, &mut back);
        assert_eq!(back[0], 0x04);
    }

    #[test]
    fn a_saved_state_brings_mask_message_and_pending_bit_back() {
        let (_, _, mut first) = msix(2);
        first.set_control(true, false);
        program(&mut first, 0, 0x41);
        mask(&mut first, 0, false);
        first.signal(1);
        let saved = first.save();
        let (vm, _, mut second) = msix(2);
        second.restore(&saved).expect("same number of vectors");
        assert_eq!(vm.routing_count(), 0);
        second.set_control(true, false);
        assert_eq!((vm.routing_count(), pending(&second)), (1, 0b10));
        assert_eq!(second.save(), saved);
        let (_, _, mut other) = msix(3);
        assert_eq!(
            other.restore(&saved).expect_err("three vectors").to_string(),
            "saved msix.vectors is 2: the device has another number of vectors"
        );
    }
}
