//! The block device: its rings, what is in flight, and its counters.
//!
//! Called on the device event loop only. One call serves at most as many chains as the ring holds; a driver that
//! offers more meanwhile is served by the next turn of the loop, through an eventfd of the device's own. When the
//! backend is full, the ring waits for a completion.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use serde_json::{Value, json};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::config::{ConfigSpace, QUEUE_SIZE, features};
use super::request::{Disk, ID_BYTES, Plan, Request, Status};
use super::saved::BlockStateV1;
use crate::guest_log::GuestLog;
use crate::ids::DiskName;
use crate::storage::{DiskBackend, DiskCompletion, DiskFull, DiskOperation, DiskRequest};
use crate::unit::{RestoreError, SaveError};
use crate::virtio::device::{Activation, DeviceEvent, DeviceFault, DeviceType, VirtioDevice};
use crate::virtio::queue_set::{DeviceQueue, descriptors};

/// The most queues of a disk.
const QUEUES_MAX: u16 = 16;
/// [`DeviceEvent`] token: requests have completed.
const TOKEN_COMPLETION: u32 = 0;
/// [`DeviceEvent`] token: a ring was left before it was empty.
const TOKEN_AGAIN: u32 = 1;

/// A virtio block device on a disk backend.
pub struct Block {
    backend: Box<dyn DiskBackend>,
    disk: Disk,
    queue_count: u16,
    config: ConfigSpace,
    again: EventFd,
    log: GuestLog,
    counters: Counters,
    queues: Vec<DeviceQueue>,
    /// One for each of `queues`.
    lanes: Vec<Lane>,
    /// What the driver waits for, by request id. Completions of other ids are from before a reset.
    pending: HashMap<u64, Pending>,
    next_id: u64,
    /// Writes that are done and must be flushed before they are answered, by request id, oldest first.
    unflushed: VecDeque<u64>,
    /// The driver does not flush, so every write is made durable before it is answered (§5.2.6.2).
    write_through: bool,
    /// The driver broke the rules; nothing is done before a reset.
    faulted: bool,
    /// Empty; kept for its allocation.
    completions: Vec<DiskCompletion>,
}

/// What the device knows of one of its queues besides the ring.
#[derive(Default)]
struct Lane {
    pending_count: u16,
    /// The ring was left before it was empty.
    waiting: bool,
    /// Chains were returned since the last interrupt.
    used: bool,
}

/// A chain that the driver gets back when its request has completed.
struct Pending {
    position: usize,
    head_index: u16,
    status: GuestAddress,
    data_bytes: u32,
}

#[derive(Default)]
struct Counters {
    read_count: u64,
    read_bytes: u64,
    write_count: u64,
    write_bytes: u64,
    flush_count: u64,
    clear_count: u64,
    error_count: u64,
}

impl Block {
    /// Makes the device of disk `name` with `queue_count` queues (1–16, others are rounded to that).
    ///
    /// # Errors
    /// The host's error when it has no eventfd left.
    pub fn new(name: &DiskName, backend: Box<dyn DiskBackend>, queue_count: u16) -> io::Result<Self> {
        let queue_count = queue_count.clamp(1, QUEUES_MAX);
        let properties = backend.properties();
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(name.as_str().bytes()) {
            *to = from;
        }
        Ok(Self {
            backend,
            disk: Disk { properties, id },
            queue_count,
            config: ConfigSpace::new(&properties, queue_count),
            again: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            log: GuestLog::new(format!("disk {name}")),
            counters: Counters::default(),
            queues: Vec::new(),
            lanes: Vec::new(),
            pending: HashMap::new(),
            next_id: 0,
            unflushed: VecDeque::new(),
            write_through: false,
            faulted: false,
            completions: Vec::new(),
        })
    }

    /// Pops and begins what the ring at `position` holds, then tells the driver what is done already.
    fn serve(&mut self, position: usize) -> Result<(), DeviceFault> {
        self.lanes[position].waiting = false;
        let served = self.serve_ring(position);
        // Also after a fault: requests of other rings were submitted before it.
        self.backend.start();
        served?;
        self.signal(position)
    }

    fn serve_ring(&mut self, position: usize) -> Result<(), DeviceFault> {
        self.queues[position].disable_kicks()?;
        for _ in 0..self.queues[position].queue().size() {
            let Some(chain) = self.queues[position].pop()? else {
                if !self.queues[position].enable_kicks()? {
                    return Ok(());
                }
                self.queues[position].disable_kicks()?;
                continue;
            };
            if !self.begin(position, chain)? {
                self.queues[position].unpop();
                self.lanes[position].waiting = true;
                return Ok(());
            }
        }
        self.lanes[position].waiting = true;
        // A full counter means that the loop comes back already.
        let _ = self.again.write(1);
        Ok(())
    }

    /// Begins or answers one chain; `false` when the backend is full.
    fn begin(
        &mut self,
        position: usize,
        chain: DescriptorChain<Arc<GuestMemoryMmap>>,
    ) -> Result<bool, DeviceFault> {
        let queue = &self.queues[position];
        if self.lanes[position].pending_count >= queue.queue().size() {
            return Err(queue.fault(&"the driver offers more chains than the ring holds"));
        }
        let head_index = chain.head_index();
        let memory = queue.memory();
        let descriptors = descriptors(chain, queue.index())?;
        let request = Request::parse(&memory, &descriptors).map_err(|malformed| queue.fault(&malformed))?;
        let pending = |data_bytes| Pending {
            position,
            head_index,
            status: request.status,
            data_bytes,
        };
        match request.plan(&memory, &self.disk) {
            Plan::Answer { status, data_bytes } => {
                if status != Status::Ok {
                    let (kind, sector) = (request.kind, request.sector);
                    self.log.warn(format_args!(
                        "request type {kind} at sector {sector} refused: {status:?}"
                    ));
                }
                self.answer(&pending(data_bytes), status)?;
            }
            Plan::Submit {
                operation,
                data_bytes,
            } => {
                let id = self.next_id;
                if let Err(DiskFull(_)) = self.backend.submit(DiskRequest { id, operation }) {
                    return Ok(false);
                }
                self.next_id += 1;
                self.pending.insert(id, pending(data_bytes));
                self.lanes[position].pending_count += 1;
            }
        }
        Ok(true)
    }

    /// Writes the status byte and returns the chain.
    fn answer(&mut self, pending: &Pending, status: Status) -> Result<(), DeviceFault> {
        let queue = &mut self.queues[pending.position];
        queue
            .memory()
            .write_obj(status as u8, pending.status)
            .map_err(|error| queue.fault(&error))?;
        let data_bytes = if status == Status::Ok {
            pending.data_bytes
        } else {
            0
        };
        self.counters.error_count += u64::from(status == Status::IoErr);
        self.lanes[pending.position].used = true;
        queue.complete(pending.head_index, data_bytes + 1)
    }

    /// Takes completions from the backend and answers them.
    fn finish_completed(&mut self) -> Result<(), DeviceFault> {
        let mut completions = std::mem::take(&mut self.completions);
        self.backend.drain(&mut completions);
        let mut outcome = Ok(());
        for completion in completions.drain(..) {
            // After a fault, the rest of the requests are dropped like those from before a reset.
            if outcome.is_ok() {
                outcome = self.finish(completion);
            }
        }
        self.completions = completions;
        outcome?;
        self.flush_written();
        for position in 0..self.queues.len() {
            self.signal(position)?;
        }
        Ok(())
    }

    fn finish(&mut self, completion: DiskCompletion) -> Result<(), DeviceFault> {
        let DiskCompletion { request, result } = completion;
        let Some(pending) = self.pending.remove(&request.id) else {
            return Ok(());
        };
        let status = match result {
            Ok(()) => {
                self.counters.count(&request.operation);
                if self.write_through && request.operation.changes_data() {
                    self.unflushed.push_back(request.id);
                    self.pending.insert(request.id, pending);
                    return Ok(());
                }
                Status::Ok
            }
            Err(error) => {
                let operation = &request.operation;
                self.log.warn(format_args!("{operation:?} failed: {error}"));
                Status::IoErr
            }
        };
        self.lanes[pending.position].pending_count -= 1;
        self.answer(&pending, status)
    }

    /// Begins the flushes that writes wait for, as far as the backend has room; a full one makes room with its next
    /// completion.
    fn flush_written(&mut self) {
        let mut submitted = false;
        while let Some(&id) = self.unflushed.front() {
            let operation = DiskOperation::Flush;
            if let Err(DiskFull(_)) = self.backend.submit(DiskRequest { id, operation }) {
                break;
            }
            self.unflushed.pop_front();
            submitted = true;
        }
        if submitted {
            self.backend.start();
        }
    }

    fn signal(&mut self, position: usize) -> Result<(), DeviceFault> {
        if std::mem::take(&mut self.lanes[position].used) {
            self.queues[position].signal()?;
        }
        Ok(())
    }

    /// Goes on with the rings that were left before they were empty.
    fn serve_waiting(&mut self) -> Result<(), DeviceFault> {
        for position in 0..self.lanes.len() {
            if self.lanes[position].waiting {
                self.serve(position)?;
            }
        }
        Ok(())
    }

    /// Remembers a fault: the rings are not touched again before a reset.
    fn note_fault(&mut self, outcome: Result<(), DeviceFault>) -> Result<(), DeviceFault> {
        if outcome.is_err() {
            self.faulted = true;
            self.pending.clear();
            self.unflushed.clear();
            self.lanes.fill_with(Lane::default);
        }
        outcome
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn device_features(&self) -> u64 {
        features(&self.disk.properties, self.queue_count)
    }

    fn queue_sizes_max(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.queue_count)]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn config_write(&mut self, _offset: u64, _data: &[u8]) {
        // Every field is read-only.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceFault> {
        self.write_through = activation.driver_features & (1 << VIRTIO_BLK_F_FLUSH) == 0;
        self.lanes = activation.queues.iter().map(|_| Lane::default()).collect();
        self.queues = activation.queues;
        self.faulted = false;
        Ok(())
    }

    fn event_sources(&self) -> Vec<DeviceEvent> {
        vec![
            DeviceEvent {
                fd: self.backend.completion_fd(),
                token: TOKEN_COMPLETION,
            },
            DeviceEvent {
                fd: self.again.as_raw_fd(),
                token: TOKEN_AGAIN,
            },
        ]
    }

    fn process_queue(&mut self, queue_index: u16) -> Result<(), DeviceFault> {
        if self.faulted {
            return Ok(());
        }
        let position = self.queues.iter().position(|queue| queue.index() == queue_index);
        let Some(position) = position else {
            return Ok(());
        };
        let outcome = self.serve(position);
        self.note_fault(outcome)
    }

    fn process_event(&mut self, token: u32, paused: bool) -> Result<(), DeviceFault> {
        let mut outcome = Ok(());
        if token == TOKEN_COMPLETION {
            outcome = self.finish_completed();
        } else {
            // An empty counter is a spurious call.
            let _ = self.again.read();
        }
        if outcome.is_ok() && !paused && !self.faulted {
            outcome = self.serve_waiting();
        }
        self.note_fault(outcome)
    }

    fn queues(&self) -> &[DeviceQueue] {
        &self.queues
    }

    fn in_flight_count(&self) -> usize {
        self.backend.in_flight_count() + self.unflushed.len()
    }

    fn reset(&mut self) {
        self.queues.clear();
        self.lanes.clear();
        self.pending.clear();
        self.unflushed.clear();
        self.faulted = false;
        // What has ended meanwhile need not be waited for.
        self.backend.drain(&mut self.completions);
        self.completions.clear();
    }

    fn save(&self) -> Result<Value, SaveError> {
        let state = BlockStateV1::new(&self.disk.properties, self.queue_count);
        Ok(serde_json::to_value(state)?)
    }

    fn restore(&mut self, state: &Value) -> Result<(), RestoreError> {
        let saved = <BlockStateV1 as serde::Deserialize>::deserialize(state)?;
        saved.check(&BlockStateV1::new(&self.disk.properties, self.queue_count))
    }

    fn inspect(&self) -> Value {
        let Counters {
            read_count,
            read_bytes,
            write_count,
            write_bytes,
            flush_count,
            clear_count,
            error_count,
        } = self.counters;
        json!({
            "capacity_bytes": self.disk.properties.capacity_bytes,
            "read_only": self.disk.properties.read_only,
            "queues": self.queues.len(),
            "pending": self.pending.len(),
            "in_flight": self.backend.in_flight_count(),
            "faulted": self.faulted,
            "write_through": self.write_through,
            "reads": read_count,
            "read_bytes": read_bytes,
            "writes": write_count,
            "written_bytes": write_bytes,
            "flushes": flush_count,
            "clears": clear_count,
            "errors": error_count,
            "backend": self.backend.inspect(),
        })
    }
}

impl Counters {
    fn count(&mut self, operation: &DiskOperation) {
        match operation {
            DiskOperation::Read { buffers, .. } => {
                self.read_count += 1;
                self.read_bytes += buffers.length_bytes();
            }
            DiskOperation::Write { buffers, .. } => {
                self.write_count += 1;
                self.write_bytes += buffers.length_bytes();
            }
            DiskOperation::Flush => self.flush_count += 1,
            DiskOperation::Discard { .. } | DiskOperation::WriteZeroes { .. } => self.clear_count += 1,
        }
    }
}
