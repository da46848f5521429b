//! Work that waits for the host or a disk, done beside the supervisor: opening a backend, storing the configuration.
//!
//! Each work has a thread for as long as it lasts. What follows from its result is done on the supervisor's thread. A
//! machine that ends is not torn down before the works are done, or given up because the host does not answer them:
//! then what follows is done without their result, and the thread is left to itself.

use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::config::{StateDirError, VmConfig};
use crate::vm::mailbox::Message;
use crate::vm::ops::power;
use crate::vm::supervisor::Supervisor;
use crate::vm::thread_role::ThreadRole;

/// The works that go on.
pub(super) struct Works {
    sender: Sender<Message>,
    going_on: BTreeMap<u64, Work>,
    last_number: u64,
    /// The number of the last work that stored a configuration.
    stored: Arc<Mutex<u64>>,
}

struct Work {
    thread: JoinHandle<()>,
    /// Does what follows, without a result.
    give_up: Box<dyn FnOnce(&mut Supervisor) + Send>,
}

impl Works {
    pub fn new(sender: Sender<Message>) -> Self {
        Self {
            sender,
            going_on: BTreeMap::new(),
            last_number: 0,
            stored: Arc::default(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.going_on.is_empty()
    }
}

impl Supervisor {
    /// Does `work` on a thread of its own and then `then` on the supervisor's. `then` gets an error when the host
    /// refuses the thread, or when the work, which may run code of the embedder's, panics.
    pub(super) fn work<T: Send + 'static>(
        &mut self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
        then: impl FnOnce(&mut Self, io::Result<T>) + Send + 'static,
    ) {
        self.works.last_number += 1;
        let number = self.works.last_number;
        let (sender, shared) = (self.works.sender.clone(), self.shared.clone());
        // Handed over by way of a place of its own, because without a thread it is needed here.
        let then = Arc::new(Mutex::new(Some(then)));
        let then_there = then.clone();
        let body = move || {
            shared.own_thread(ThreadRole::Worker);
            // What a panic left half done is dropped with the closure.
            let result = catch_unwind(AssertUnwindSafe(work))
                .map_err(|_| io::Error::other("the thread that did the work panicked"));
            let act = move |vm: &mut Self| {
                vm.work_done(number);
                // Not there any more when the work was given up.
                if let Some(then) = take(&then_there) {
                    then(vm, result);
                    power::tear_down_unless_held(vm);
                }
            };
            // The supervisor outlives its works.
            let _ = sender.send(Message::Act(Box::new(act)));
        };
        match std::thread::Builder::new().name(name.to_owned()).spawn(body) {
            Ok(thread) => {
                let give_up = Box::new(move |vm: &mut Self| {
                    if let Some(then) = take(&then) {
                        then(vm, Err(io::Error::from(io::ErrorKind::TimedOut)));
                    }
                });
                self.works.going_on.insert(number, Work { thread, give_up });
            }
            Err(error) => {
                if let Some(then) = take(&then) {
                    then(self, Err(error));
                }
            }
        }
    }

    fn work_done(&mut self, number: u64) {
        let work = self.works.going_on.remove(&number);
        if work.is_some_and(|work| work.thread.join().is_err()) {
            log::error!("a worker of the vm panicked after its report");
        }
    }

    /// Waits no longer for the works that go on.
    pub(super) fn give_up_works(&mut self) {
        for (number, work) in std::mem::take(&mut self.works.going_on) {
            log::error!(
                "work {number} of the vm hangs: the host does not answer, nobody waits for it any more"
            );
            (work.give_up)(self);
        }
    }

    /// Makes `config` the VM's and stores it, if the VM is kept in a directory; `then` learns whether it is safe on disk.
    /// Where it is not, the VM goes on with it all the same, and the next change stores it again.
    pub(super) fn change_config(
        &mut self,
        config: VmConfig,
        then: impl FnOnce(&mut Self, Result<(), StateDirError>) + Send + 'static,
    ) {
        let config = Arc::new(config);
        self.config = config.clone();
        self.shared.set_config(config.clone());
        let Some(state_dir) = self.state_dir.clone() else {
            return then(self, Ok(()));
        };
        let (number, stored) = (self.works.last_number + 1, self.works.stored.clone());
        let dir = state_dir.path().to_owned();
        let store = move || {
            let mut stored = stored.lock().unwrap_or_else(PoisonError::into_inner);
            // A later change was faster, and holds this one too.
            if *stored > number {
                return Ok(());
            }
            state_dir.store(&config)?;
            *stored = number;
            Ok(())
        };
        let no_thread = move |source| {
            Err(StateDirError::Io {
                action: "store the configuration in",
                path: dir,
                source,
            })
        };
        self.work("vm-store", store, |vm, result| {
            then(vm, result.unwrap_or_else(no_thread))
        });
    }
}

fn take<T>(place: &Mutex<Option<T>>) -> Option<T> {
    place.lock().unwrap_or_else(PoisonError::into_inner).take()
}
