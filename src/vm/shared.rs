//! What the supervisor publishes for its handles: state, operation in flight, events.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::config::VmConfig;
use crate::event::EventLog;
use crate::state::State;
use crate::vm::operation::OperationKind;
use crate::vm::platform::Platform;
use crate::vm::thread_role::ThreadRole;

thread_local! {
    /// The VM that this thread belongs to; null for every other thread. Only compared.
    static OWNER: Cell<*const Shared> = const { Cell::new(ptr::null()) };
}

/// Written by the supervisor, read by handles. No two of the locks are ever held together.
pub(super) struct Shared {
    published: Mutex<Published>,
    changed: Condvar,
    pub events: Mutex<EventLog>,
    config: Mutex<Arc<VmConfig>>,
    pub platform: Arc<dyn Platform>,
}

#[derive(Clone, Copy)]
struct Published {
    state: State,
    operation: Option<OperationKind>,
}

impl Shared {
    pub fn new(config: Arc<VmConfig>, platform: Arc<dyn Platform>) -> Self {
        let published = Published {
            state: State::Off,
            operation: None,
        };
        Self {
            published: Mutex::new(published),
            changed: Condvar::new(),
            events: Mutex::default(),
            config: Mutex::new(config),
            platform,
        }
    }

    /// Makes the calling thread, which begins, one of this VM's own.
    pub fn own_thread(&self, role: ThreadRole) {
        OWNER.set(self);
        let told = catch_unwind(AssertUnwindSafe(|| self.platform.thread_started(role)));
        if told.is_err() {
            log::error!("the embedder panicked when a thread began that is {role:?}");
        }
    }

    /// Whether the calling thread is this VM's supervisor, or one for which the supervisor waits: a worker, a vCPU's, the
    /// device event loop's.
    pub fn is_own_thread(&self) -> bool {
        ptr::eq(OWNER.get(), self)
    }

    /// What the VM is, on paper, now.
    pub fn config(&self) -> Arc<VmConfig> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set_config(&self, config: Arc<VmConfig>) {
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = config;
    }

    pub fn set_state(&self, state: State) {
        self.published
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .state = state;
        self.changed.notify_all();
    }

    pub fn set_operation(&self, operation: Option<OperationKind>) {
        self.published
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .operation = operation;
    }

    /// The state and the operation in flight, read at one moment.
    pub fn state(&self) -> (State, Option<OperationKind>) {
        let published = *self.published.lock().unwrap_or_else(PoisonError::into_inner);
        (published.state, published.operation)
    }

    /// Waits at most `within` until the state is `wanted`; tells whether it is.
    pub fn wait_for(&self, wanted: State, within: Duration) -> bool {
        let deadline = Instant::now().checked_add(within);
        let mut published = self.published.lock().unwrap_or_else(PoisonError::into_inner);
        while published.state != wanted {
            published = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => return false,
                Some(left) => {
                    self.changed
                        .wait_timeout(published, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
                None => self
                    .changed
                    .wait(published)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
        true
    }
}
