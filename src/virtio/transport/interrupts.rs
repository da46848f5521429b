//! The interrupts of one virtio device: which MSI-X vector belongs to which event, the ISR status and the
//! configuration's generation (virtio 1.2 §4.1.4.5, §4.1.5.1).
//!
//! Shared with the device, which signals from any thread. Its lock is the innermost of the transport: nothing else is
//! locked while it is held.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::saved::SavedInterruptsV1;
use crate::guest_log::GuestLog;
use crate::machine::gsi::GsiTable;
use crate::pci::msix::Msix;
use crate::unit::RestoreError;
use crate::virtio::device::VirtioInterrupt;
use crate::virtio::spec::{VIRTIO_MSI_NO_VECTOR, VIRTIO_PCI_ISR_CONFIG, VIRTIO_PCI_ISR_QUEUE};

/// The interrupts of one device.
pub struct Interrupts {
    state: Mutex<State>,
}

struct State {
    msix: Msix,
    isr: u8,
    config_generation: u8,
    config_vector: u16,
    queue_vectors: Vec<u16>,
}

impl Interrupts {
    /// Makes the interrupts of a device with `queue_count` queues: a vector for each and one for the configuration.
    pub fn new(queue_count: u16, gsi: GsiTable, log: GuestLog) -> Self {
        Self {
            state: Mutex::new(State {
                msix: Msix::new(queue_count + 1, gsi, log),
                isr: 0,
                config_generation: 0,
                config_vector: VIRTIO_MSI_NO_VECTOR,
                queue_vectors: vec![VIRTIO_MSI_NO_VECTOR; usize::from(queue_count)],
            }),
        }
    }

    /// `config_msix_vector`.
    pub fn config_vector(&self) -> u16 {
        self.lock().config_vector
    }

    /// Maps the configuration to `vector`; one that does not exist becomes "none" (virtio 1.2 §4.1.5.1.2.1).
    pub fn set_config_vector(&self, vector: u16) {
        let mut state = self.lock();
        state.config_vector = state.existing(vector);
    }

    /// `queue_msix_vector` of a queue, "none" for one that does not exist.
    pub fn queue_vector(&self, queue_index: u16) -> u16 {
        let vectors = &self.lock().queue_vectors;
        let vector = vectors.get(usize::from(queue_index));
        vector.copied().unwrap_or(VIRTIO_MSI_NO_VECTOR)
    }

    /// Maps a queue to `vector`; one that does not exist becomes "none" (virtio 1.2 §4.1.5.1.2.1).
    pub fn set_queue_vector(&self, queue_index: u16, vector: u16) {
        let mut state = self.lock();
        let vector = state.existing(vector);
        if let Some(mapped) = state.queue_vectors.get_mut(usize::from(queue_index)) {
            *mapped = vector;
        }
    }

    /// `config_generation`.
    pub fn config_generation(&self) -> u8 {
        self.lock().config_generation
    }

    /// The configuration may have changed, but the driver is not told.
    pub fn raise_config_generation(&self) {
        let mut state = self.lock();
        state.config_generation = state.config_generation.wrapping_add(1);
    }

    /// Reads the ISR status and clears it (virtio 1.2 §4.1.4.5).
    pub fn take_isr(&self) -> u8 {
        std::mem::take(&mut self.lock().isr)
    }

    /// Follows MSI-X Message Control; `function_masked` also while the device may not send messages.
    pub fn set_msix_control(&self, enabled: bool, function_masked: bool) {
        self.lock().msix.set_control(enabled, function_masked);
    }

    /// The guest reads the MSI-X table.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        self.lock().msix.table_read(offset, data);
    }

    /// The guest writes the MSI-X table.
    pub fn table_write(&self, offset: u64, data: &[u8]) {
        self.lock().msix.table_write(offset, data);
    }

    /// The guest reads the MSI-X pending bits.
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) {
        self.lock().msix.pba_read(offset, data);
    }

    /// The driver reset the device: no event has a vector. The MSI-X table is PCI's and stays.
    pub fn reset_device(&self) {
        let mut state = self.lock();
        state.isr = 0;
        state.config_vector = VIRTIO_MSI_NO_VECTOR;
        state.queue_vectors.fill(VIRTIO_MSI_NO_VECTOR);
    }

    /// Returns to the state after power-on.
    pub fn reset(&self) {
        self.reset_device();
        let mut state = self.lock();
        state.config_generation = 0;
        state.msix.reset();
    }

    /// The whole state but for MSI-X Message Control.
    pub fn save(&self) -> SavedInterruptsV1 {
        let state = self.lock();
        SavedInterruptsV1 {
            isr: state.isr,
            config_generation: state.config_generation,
            config_vector: state.config_vector,
            queue_vectors: state.queue_vectors.clone(),
            msix: state.msix.save(),
        }
    }

    /// Takes over a saved state, which is untrusted; MSI-X stays disabled until [`Interrupts::set_msix_control`].
    ///
    /// # Errors
    /// [`RestoreError::Value`] when it is another device's.
    pub fn restore(&self, saved: &SavedInterruptsV1) -> Result<(), RestoreError> {
        let SavedInterruptsV1 {
            isr,
            config_generation,
            config_vector,
            queue_vectors,
            msix,
        } = saved;
        let mut state = self.lock();
        if queue_vectors.len() != state.queue_vectors.len() {
            return Err(RestoreError::Value {
                field: "interrupts.queue_vectors",
                value: queue_vectors.len().to_string(),
                reason: "the device has another number of queues",
            });
        }
        state.msix.restore(msix)?;
        state.isr = isr & (VIRTIO_PCI_ISR_QUEUE | VIRTIO_PCI_ISR_CONFIG);
        state.config_generation = *config_generation;
        state.config_vector = state.existing(*config_vector);
        state.queue_vectors = queue_vectors
            .iter()
            .map(|vector| state.existing(*vector))
            .collect();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn existing(&self, vector: u16) -> u16 {
        if vector < self.msix.vector_count() {
            vector
        } else {
            VIRTIO_MSI_NO_VECTOR
        }
    }
}

impl VirtioInterrupt for Interrupts {
    fn signal_queue(&self, queue_index: u16) {
        let mut state = self.lock();
        state.isr |= VIRTIO_PCI_ISR_QUEUE;
        let vector = state.queue_vectors.get(usize::from(queue_index)).copied();
        state.msix.signal(vector.unwrap_or(VIRTIO_MSI_NO_VECTOR));
    }

    fn signal_config(&self) {
        let mut state = self.lock();
        state.isr |= VIRTIO_PCI_ISR_CONFIG;
        state.config_generation = state.config_generation.wrapping_add(1);
        let vector = state.config_vector;
        state.msix.signal(vector);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::machine::fake::FakeVm;

    fn interrupts() -> Interrupts {
        let gsi = GsiTable::new(Arc::new(FakeVm::default()));
        Interrupts::new(2, gsi, GuestLog::new("test"))
    }

    fn pending(interrupts: &Interrupts) -> u8 {
        let mut byte = [0];
        interrupts.pba_read(0, &mut byte);
        byte[0]
    }

    #[test]
    fn a_vector_that_does_not_exist_is_none() {
        let interrupts = interrupts();
        for (written, read) in [(0, 0), (2, 2), (3, 0xFFFF), (0xFFFF, 0xFFFF), (0x8000, 0xFFFF)] {
            interrupts.set_config_vector(written);
            interrupts.set_queue_vector(1, written);
            assert_eq!(
                (interrupts.config_vector(), interrupts.queue_vector(1)),
                (read, read)
            );
        }
        interrupts.set_queue_vector(2, 0);
        assert_eq!(interrupts.queue_vector(2), 0xFFFF, "there is no such queue");
    }

    #[test]
    fn events_reach_their_vector_and_the_isr_until_it_is_read() {
        let interrupts = interrupts();
        interrupts.set_msix_control(true, true);
        interrupts.signal_queue(0);
        assert_eq!(pending(&interrupts), 0, "no vector is mapped");
        assert_eq!((interrupts.take_isr(), interrupts.take_isr()), (1, 0));
        interrupts.set_queue_vector(1, 2);
        interrupts.set_config_vector(0);
        interrupts.signal_queue(1);
        interrupts.signal_config();
        interrupts.signal_queue(u16::MAX);
        assert_eq!((pending(&interrupts), interrupts.take_isr()), (0b101, 3));
        assert_eq!(interrupts.config_generation(), 1);
        interrupts.reset_device();
        assert_eq!(
            (interrupts.queue_vector(1), pending(&interrupts)),
            (0xFFFF, 0b101)
        );
        interrupts.reset();
        assert_eq!(pending(&interrupts), 0);
    }
}
