//! The VM object: decides, owns, orders.
//!
//! [`Vm`] is a cheap handle. Behind all handles of a VM stands one supervisor thread, which owns the state and does one
//! thing after another; handles send it requests and wait for its answers, never for the guest.

pub mod builder;
mod card;
mod cards;
mod device_set;
mod error;
pub mod fake;
mod guest_events;
mod halt;
pub mod host;
mod mailbox;
pub mod memory;
mod memory_units;
pub mod nic;
pub mod operation;
mod ops;
pub mod platform;
mod shared;
mod supervisor;
pub mod thread_role;
pub mod transition;
mod units;
mod work;

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::{Value, json};

pub use error::{NicRequestError, OperationError, RequestError};
pub use mailbox::Mailbox;

use crate::config::{StateDir, StateDirError, VmConfig};
use crate::event::EventStream;
use crate::state::State;
use crate::vm::mailbox::{Message, Request};
use crate::vm::nic::NicInfo;
use crate::vm::operation::{Operation, OperationKind};
use crate::vm::platform::{BuildError, DeviceStatus, Platform};
use crate::vm::shared::Shared;
use crate::vm::supervisor::Supervisor;

/// A virtual machine. Cheap to clone; all clones are the same VM.
///
/// When the last clone is dropped the guest's power is cut and everything the VM holds is given back before `drop`
/// returns. The process never exits or panics on behalf of a guest.
///
/// A handle that the VM's own host devices hold keeps the VM alive until its guest ends or they drop it. When the last
/// handle goes with them, on a thread of the VM, `drop` does not wait.
#[derive(Clone)]
pub struct Vm {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    mailbox: Sender<Message>,
    supervisor: Option<JoinHandle<()>>,
}

/// What a VM is doing, read at one moment.
#[derive(Debug, Clone)]
pub struct VmStatus {
    /// The state.
    pub state: State,
    /// The operation in flight.
    pub operation: Option<OperationKind>,
    /// The devices that a running machine has; empty when there is none.
    pub devices: Vec<DeviceStatus>,
    /// The network cards, with those that are being added.
    pub nics: Vec<NicInfo>,
}

/// Why a VM could not be made. Nothing has been created or left behind.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The host cannot build the machine.
    #[error("the vm cannot run here")]
    Build(#[from] BuildError),
    /// The VM's directory cannot be used.
    #[error("the state directory cannot be used")]
    StateDir(#[from] StateDirError),
    /// The host refused the supervisor's thread.
    #[error("cannot start the supervisor's thread")]
    Thread(#[source] io::Error),
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vm({} {})", self.config().name(), self.state())
    }
}

impl Vm {
    /// Makes a VM that lives in this process only: nothing of it is written to disk.
    ///
    /// The host is checked first, so that most of what would make `start` fail is told here. The VM is Off.
    ///
    /// # Errors
    /// [`CreateError`].
    pub fn new(config: VmConfig, platform: Arc<dyn Platform>) -> Result<Self, CreateError> {
        platform.check(&config)?;
        Self::spawn(config, platform, |_| Ok(None))
    }

    /// Makes a VM whose configuration is kept in the directory `dir`, which is created if it is missing.
    ///
    /// # Errors
    /// [`CreateError`], also when `dir` holds a VM already or is in use by another process.
    pub fn create(dir: &Path, config: VmConfig, platform: Arc<dyn Platform>) -> Result<Self, CreateError> {
        platform.check(&config)?;
        Self::spawn(config, platform, |config| StateDir::create(dir, config).map(Some))
    }

    /// Opens the VM that is kept in the directory `dir`. The VM is Off; the host is checked when it is started.
    ///
    /// # Errors
    /// [`CreateError::StateDir`] when there is no VM, its document is damaged or it is in use by another process.
    pub fn open(dir: &Path, platform: Arc<dyn Platform>) -> Result<Self, CreateError> {
        let (state_dir, config) = StateDir::open(dir)?;
        Self::spawn(config, platform, |_| Ok(Some(state_dir)))
    }

    /// Starts the supervisor with the directory of `make_dir`, which is called when nothing else can fail.
    fn spawn(
        config: VmConfig,
        platform: Arc<dyn Platform>,
        make_dir: impl FnOnce(&VmConfig) -> Result<Option<StateDir>, StateDirError>,
    ) -> Result<Self, CreateError> {
        let shared = Arc::new(Shared::new(Arc::new(config), platform));
        let (sender, receiver) = channel();
        let (begin, begun) = channel::<Supervisor>();
        let supervise = move || {
            // Without a directory there is no supervisor and nothing to do.
            if let Ok(supervisor) = begun.recv() {
                supervisor.run(&receiver);
            }
        };
        let thread = std::thread::Builder::new()
            .name("vm-supervisor".to_owned())
            .spawn(supervise)
            .map_err(CreateError::Thread)?;
        let state_dir = make_dir(&shared.config())?;
        let supervisor = Supervisor::new(shared.clone(), state_dir, sender.clone());
        begin.send(supervisor).expect("the thread waits for it");
        let inner = Inner {
            shared,
            mailbox: sender,
            supervisor: Some(thread),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Starts the guest from power-on. Allowed in Off.
    ///
    /// # Errors
    /// [`RequestError`] when the state or another operation forbids it. What the host refuses is told by the
    /// operation's outcome.
    pub fn start(&self) -> Result<Operation, RequestError> {
        self.request(OperationKind::Start, None)
    }

    /// Makes the guest stand still. Allowed in Running. Its clock stands still too.
    ///
    /// # Errors
    /// [`RequestError`] when the state or another operation forbids it.
    pub fn pause(&self) -> Result<Operation, RequestError> {
        self.request(OperationKind::Pause, None)
    }

    /// Lets a paused guest go on. Allowed in Paused.
    ///
    /// # Errors
    /// [`RequestError`] when the state or another operation forbids it.
    pub fn resume(&self) -> Result<Operation, RequestError> {
        self.request(OperationKind::Resume, None)
    }

    /// Resets the machine: the guest boots again, from the kernel that it was started with. Allowed in Running, and in
    /// Paused, where it stays paused.
    ///
    /// # Errors
    /// [`RequestError`] when the state or another operation forbids it.
    pub fn reset(&self) -> Result<Operation, RequestError> {
        self.request(OperationKind::Reset, None)
    }

    /// Asks the guest to shut itself down, by the ACPI power button. Allowed in Running. The operation is done when
    /// the guest is off; after `within` it ends with [`operation::Outcome::DeadlinePassed`] and the guest, which may
    /// still obey, is left as it is. The button is pressed once: a guest that does not listen yet, as while it boots,
    /// does not hear of it, and has to be asked again.
    ///
    /// # Errors
    /// [`RequestError`] when the state or another operation forbids it.
    pub fn shut_down(&self, within: Duration) -> Result<Operation, RequestError> {
        self.request(OperationKind::ShutDown, Some(within))
    }

    /// Cuts the power. Allowed in every state but Off and Stopping, and overtakes the operation in flight. The guest runs
    /// no more when it is done; what it wrote last may still be on its way to a disk whose host hangs, for which nobody
    /// waits longer than half a minute, and which stays in use until then.
    ///
    /// # Errors
    /// [`RequestError`] in Off and Stopping.
    pub fn power_off(&self) -> Result<Operation, RequestError> {
        self.request(OperationKind::PowerOff, None)
    }

    /// Types `bytes` into the guest's serial port. Returns how many were taken: a guest that has
    /// [`INPUT_PENDING_BYTES_MAX`](crate::legacy::serial::INPUT_PENDING_BYTES_MAX) bytes still to read takes no more, and
    /// the rest can be offered again. A VM without a machine (Off, Starting) takes none.
    ///
    /// # Errors
    /// [`RequestError::Gone`].
    pub fn serial_input(&self, bytes: &[u8]) -> Result<usize, RequestError> {
        let bytes = bytes.to_vec();
        self.ask(move |supervisor| {
            let machine = supervisor.machine.as_ref();
            machine.map_or(0, |machine| machine.serial_input(&bytes))
        })
    }

    /// The state, as last published. It may have changed when the caller looks at it.
    pub fn state(&self) -> State {
        self.inner.shared.state().0
    }

    /// Waits at most `within` until the VM is `wanted`; tells whether it is.
    pub fn wait_for(&self, wanted: State, within: Duration) -> bool {
        self.inner.shared.wait_for(wanted, within)
    }

    /// Everything that happens to the VM from now on.
    pub fn events(&self) -> EventStream {
        self.inner
            .shared
            .events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .subscribe()
    }

    /// What the VM is, on paper. It changes when an operation changes a setting.
    pub fn config(&self) -> Arc<VmConfig> {
        self.inner.shared.config()
    }

    /// State, operation in flight and devices, read at one moment, after every request made before.
    ///
    /// # Errors
    /// [`RequestError::Gone`].
    pub fn status(&self) -> Result<VmStatus, RequestError> {
        self.ask(|supervisor| VmStatus {
            state: supervisor.state,
            operation: supervisor.in_flight(),
            devices: supervisor
                .machine
                .as_ref()
                .map_or_else(Vec::new, |machine| machine.devices()),
            nics: ops::nic::infos(supervisor),
        })
    }

    /// Everything the VM's components tell of themselves, for people and tools. The form is not stable.
    ///
    /// # Errors
    /// [`RequestError::Gone`].
    pub fn inspect(&self) -> Result<Value, RequestError> {
        self.ask(|supervisor| {
            json!({
                "state": supervisor.state,
                "operation": supervisor.in_flight().map(OperationKind::as_str),
                "nics": supervisor.cards.inspect(),
                "machine": supervisor.machine.as_ref().map(|machine| machine.inspect()),
            })
        })
    }

    fn request(&self, kind: OperationKind, within: Option<Duration>) -> Result<Operation, RequestError> {
        let (reply, answer) = channel();
        let message = Message::Request {
            request: Request { kind, within },
            reply,
        };
        self.inner.mailbox.send(message).map_err(|_| RequestError::Gone)?;
        answer.recv().map_err(|_| RequestError::Gone)?
    }

    /// Does `act` on the supervisor's thread and hands back what it returns.
    fn act<T: Send + 'static>(
        &self,
        act: impl FnOnce(&mut Supervisor) -> T + Send + 'static,
    ) -> Result<T, RequestError> {
        let (reply, answer) = channel();
        let act = move |supervisor: &mut Supervisor| {
            // The caller waits below; it is gone only when its thread is.
            let _ = reply.send(act(supervisor));
        };
        self.inner
            .mailbox
            .send(Message::Act(Box::new(act)))
            .map_err(|_| RequestError::Gone)?;
        answer.recv().map_err(|_| RequestError::Gone)
    }

    fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Supervisor) -> T + Send + 'static,
    ) -> Result<T, RequestError> {
        let (reply, answer) = channel();
        let query = move |supervisor: &Supervisor| {
            // The caller waits below; it is gone only when its thread is.
            let _ = reply.send(question(supervisor));
        };
        self.inner
            .mailbox
            .send(Message::Query(Box::new(query)))
            .map_err(|_| RequestError::Gone)?;
        answer.recv().map_err(|_| RequestError::Gone)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // When the supervisor is gone already there is nothing left to stop.
        let _ = self.mailbox.send(Message::HandlesGone);
        // The embedder's host devices may hold the last handle, which then goes with the machine on a worker, or while
        // the guest calls them on a vCPU's thread or the event loop's.
        if self.shared.is_own_thread() {
            return;
        }
        if self
            .supervisor
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            log::error!("the supervisor of vm {} panicked", self.shared.config().name());
        }
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod nic_release_tests;
#[cfg(test)]
mod nic_tests;

#[cfg(test)]
mod nic_sequences;

#[cfg(test)]
mod whole_guest_tests;
