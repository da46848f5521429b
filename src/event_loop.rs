//! The device event loop: one thread per VM that waits for queue kicks, I/O completions and host input.
//!
//! Devices hand in file descriptors and a handler; the loop calls the handler when one becomes readable. Handlers are
//! added and removed from any thread, vCPU threads included: both are messages to the loop and never wait for it, so
//! a caller may hold the lock that its own handler takes. An idle loop sleeps in `epoll_wait`.
//!
//! Handlers call the embedder's code. A panic in one ends the loop, because what it left half done cannot be trusted,
//! and is told to the [`LoopListener`]: devices that nobody serves must not go unnoticed.

use std::any::Any;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// How many additions may wait for the loop. Guests cause them, and can do so faster than the loop serves them.
const ADDITIONS_WAITING_MAX: usize = 1024;

/// Reacts to readable file descriptors, on the loop's thread.
pub trait EventHandler: Send + Sync {
    /// The descriptor registered under `token` is readable. The handler makes it unreadable again (reads the
    /// eventfd) or is called at once again. A descriptor removed meanwhile may still be reported once.
    fn readable(&self, token: u32);
}

/// Hears from the loop itself. Called on its thread, implemented by the supervisor's mailbox; never blocks.
pub trait LoopListener: Send + Sync {
    /// The loop begins, on the calling thread.
    fn loop_started(&self);

    /// A handler panicked with these words: no handler is called any more.
    fn loop_failed(&self, words: &str);
}

/// A descriptor the loop watches. Whoever registers it keeps it open until the [`Registration`] is dropped; the
/// handler usually owns it, because the loop keeps the handler until the removal took effect.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    /// The descriptor.
    pub fd: RawFd,
    /// What the handler is told.
    pub token: u32,
}

/// The thread of a VM's device event loop.
///
/// Dropping it stops the loop and waits until no handler runs any more. It does not wait for the thread's exit: the
/// kernel may hold a thread that has submitted I/O until a stuck disk answers, and nobody should wait for that.
pub struct EventLoop {
    handle: LoopHandle,
    /// Closed when the loop has ended; in a lock only so that the loop can be shared.
    ended: Mutex<Receiver<()>>,
}

/// Adds handlers to an [`EventLoop`]; cheap to clone.
#[derive(Clone)]
pub struct LoopHandle {
    commands: Commands,
    stop: Arc<AtomicBool>,
    additions_waiting_count: Arc<AtomicUsize>,
}

/// The loop could not be started or has ended.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// The host refused epoll or its eventfd.
    #[error("cannot make the device event loop: {0}")]
    Manager(String),
    /// The host refused the thread.
    #[error("cannot start the device event loop's thread")]
    Thread(#[source] io::Error),
    /// The loop has ended, as it does when its VM is gone.
    #[error("the device event loop has ended")]
    Ended,
    /// The loop is slower than those who add handlers.
    #[error("{ADDITIONS_WAITING_MAX} handlers wait to be added to the device event loop")]
    Busy,
}

impl EventLoop {
    /// Starts a loop on a thread of its own named `name` (the kernel shows 15 bytes of it) that reports to `listener`.
    ///
    /// # Errors
    /// [`LoopError`] when the host refuses.
    pub fn start(name: &str, listener: Arc<dyn LoopListener>) -> Result<Self, LoopError> {
        let mut manager =
            EventManager::<Subscriber>::new().map_err(|error| LoopError::Manager(error.to_string()))?;
        let (commands, waiting) = Commands::new(&mut manager)?;
        let stop = Arc::new(AtomicBool::new(false));
        let handle = LoopHandle {
            commands,
            stop: stop.clone(),
            additions_waiting_count: Arc::default(),
        };
        let (end, ended) = channel();
        let run = move || {
            listener.loop_started();
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| serve(&mut manager, &waiting, &stop))) {
                listener.loop_failed(&panic_words(&*panic));
            }
            // The handlers go before the end is told: they hold devices, and those guest memory.
            drop((manager, waiting));
            drop(end);
        };
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(run)
            .map_err(LoopError::Thread)?;
        Ok(Self {
            handle,
            ended: Mutex::new(ended),
        })
    }

    /// A handle for those who add handlers.
    pub fn handle(&self) -> LoopHandle {
        self.handle.clone()
    }
}

/// What a panic said, in 200 characters at most: it may quote the guest.
pub(crate) fn panic_words(panic: &(dyn Any + Send)) -> String {
    let words = panic.downcast_ref::<&str>().copied();
    let words = words.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    words.unwrap_or("no words").chars().take(200).collect()
}

fn serve(manager: &mut EventManager<Subscriber>, waiting: &Receiver<Command>, stop: &AtomicBool) {
    while !stop.load(Ordering::Acquire) {
        if let Err(error) = manager.run() {
            log::error!("device event loop: {error}");
        }
        // Behind the events, so that none of those that were found together is for a handler that is gone.
        while let Ok(command) = waiting.try_recv() {
            command.obey(manager);
        }
    }
}

/// The number that the loop gives to a handler, once it has it.
#[derive(Clone, Default)]
struct PlaceOfId(Arc<Mutex<Option<SubscriberId>>>);

/// What the loop does to itself, on its own thread.
enum Command {
    Add {
        subscriber: Subscriber,
        id: PlaceOfId,
        waiting_count: Arc<AtomicUsize>,
    },
    Remove(PlaceOfId),
    Run(Box<dyn FnOnce() + Send>),
}

impl Command {
    fn obey(self, manager: &mut EventManager<Subscriber>) {
        match self {
            Self::Add {
                subscriber,
                id,
                waiting_count,
            } => {
                waiting_count.fetch_sub(1, Ordering::Relaxed);
                let added = manager.add_subscriber(subscriber);
                *id.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(added);
            }
            Self::Remove(id) => {
                if let Some(id) = id.0.lock().unwrap_or_else(PoisonError::into_inner).take()
                    && let Err(error) = manager.remove_subscriber(id)
                {
                    log::warn!("device event loop: cannot remove a handler: {error}");
                }
            }
            Self::Run(job) => job(),
        }
    }
}

/// The way to the loop for other threads. The one of `event-manager` would leave its eventfd open over an `exec`.
#[derive(Clone)]
struct Commands {
    sender: Sender<Command>,
    kick: Arc<EventFd>,
}

impl Commands {
    /// The way to `manager`, and its other end.
    fn new(manager: &mut EventManager<Subscriber>) -> Result<(Self, Receiver<Command>), LoopError> {
        let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let kick = Arc::new(kick.map_err(|error| LoopError::Manager(error.to_string()))?);
        let source = Source {
            fd: kick.as_raw_fd(),
            token: 0,
        };
        manager.add_subscriber(Subscriber {
            sources: vec![source],
            handler: Arc::new(Kicked(kick.clone())),
        });
        let (sender, receiver) = channel();
        Ok((Self { sender, kick }, receiver))
    }

    /// Has the loop do `command` soon, after everything fired before it.
    fn fire(&self, command: Command) -> Result<(), LoopError> {
        let sent = self.sender.send(command);
        sent.map_err(|_| LoopError::Ended)?;
        self.kick();
        Ok(())
    }

    fn kick(&self) {
        // Fails only when the counter is full, and then the loop wakes up all the same.
        let _ = self.kick.write(1);
    }
}

/// Makes the kick's eventfd unreadable again; the loop looks for commands after each round of events anyway.
struct Kicked(Arc<EventFd>);

impl EventHandler for Kicked {
    fn readable(&self, _token: u32) {
        let _ = self.0.read();
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.handle.stop.store(true, Ordering::Release);
        self.handle.commands.kick();
        // Told by the sender's end, also when a handler panicked.
        let _ = self.ended.lock().unwrap_or_else(PoisonError::into_inner).recv();
    }
}

impl LoopHandle {
    /// Watches `sources` for `handler` until the registration is dropped.
    ///
    /// # Errors
    /// [`LoopError::Ended`] or [`LoopError::Busy`].
    pub fn register(
        &self,
        sources: Vec<Source>,
        handler: Arc<dyn EventHandler>,
    ) -> Result<Registration, LoopError> {
        let waiting_count = self.additions_waiting_count.clone();
        if waiting_count.fetch_add(1, Ordering::Relaxed) >= ADDITIONS_WAITING_MAX {
            waiting_count.fetch_sub(1, Ordering::Relaxed);
            return Err(LoopError::Busy);
        }
        let id = PlaceOfId::default();
        self.commands.fire(Command::Add {
            subscriber: Subscriber { sources, handler },
            id: id.clone(),
            waiting_count,
        })?;
        Ok(Registration {
            commands: self.commands.clone(),
            id,
        })
    }

    /// Runs `job` once on the loop's thread, after everything registered before it.
    ///
    /// # Errors
    /// [`LoopError::Ended`].
    pub fn run_once(&self, job: impl FnOnce() + Send + 'static) -> Result<(), LoopError> {
        self.commands.fire(Command::Run(Box::new(job)))
    }
}

/// Watched descriptors; dropping it stops the watch. The loop drops the handler soon after.
#[must_use = "dropping the registration stops the watch"]
pub struct Registration {
    commands: Commands,
    id: PlaceOfId,
}

impl Drop for Registration {
    fn drop(&mut self) {
        // Commands are obeyed in order, so the addition has been done when this is. When the loop has ended, its
        // handlers are gone with it.
        let _ = self.commands.fire(Command::Remove(self.id.clone()));
    }
}

struct Subscriber {
    sources: Vec<Source>,
    handler: Arc<dyn EventHandler>,
}

impl MutEventSubscriber for Subscriber {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.event_set().intersects(EventSet::ERROR | EventSet::HANG_UP)
            && !events.event_set().contains(EventSet::IN)
        {
            // A dead peer would wake the loop for ever; the handler learns of it from its own reads and writes.
            let _ = ops.remove(Events::with_data_raw(events.fd(), events.data(), EventSet::IN));
        }
        self.handler.readable(events.data());
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        for source in &self.sources {
            let events = Events::with_data_raw(source.fd, source.token, EventSet::IN);
            if let Err(error) = ops.add(events) {
                log::error!(
                    "device event loop: cannot watch descriptor {}: {error}",
                    source.fd
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    struct Deaf;

    impl LoopListener for Deaf {
        fn loop_started(&self) {}

        fn loop_failed(&self, words: &str) {
            log::error!("a handler panicked: {words}");
        }
    }

    struct Tell {
        fd: EventFd,
        sender: Mutex<Sender<u32>>,
    }

    impl EventHandler for Tell {
        fn readable(&self, token: u32) {
            let _ = self.fd.read();
            self.sender
                .lock()
                .expect("no panic while locked")
                .send(token)
                .expect("the test listens");
        }
    }

    #[test]
    fn a_handler_hears_its_descriptor_until_it_is_removed() {
        let event_loop = EventLoop::start("test-loop", Arc::new(Deaf)).expect("the host has epoll");
        let (sender, receiver) = channel();
        let fd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("the host has eventfds");
        let kick = fd.try_clone().expect("descriptors are free");
        let source = Source {
            fd: fd.as_raw_fd(),
            token: 7,
        };
        let handler = Arc::new(Tell {
            fd,
            sender: Mutex::new(sender),
        });
        let registration = event_loop
            .handle()
            .register(vec![source], handler)
            .expect("the loop runs");
        kick.write(1).expect("the counter is not full");
        assert_eq!(receiver.recv(), Ok(7));
        drop(registration);
        // The handler held the only sender: its end shows that the loop let go of it.
        assert!(receiver.recv().is_err());
    }

    #[test]
    fn a_busy_loop_refuses_more_handlers_until_it_gets_to_them() {
        let event_loop = EventLoop::start("test-loop", Arc::new(Deaf)).expect("the host has epoll");
        let handle = event_loop.handle();
        let (go_on, wait) = channel::<()>();
        let stuck = move || wait.recv().expect("the test lets it go on");
        handle.run_once(stuck).expect("the loop runs");
        let (sender, _receiver) = channel();
        let handler = Arc::new(Tell {
            fd: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("the host has eventfds"),
            sender: Mutex::new(sender),
        });
        let register = || handle.register(Vec::new(), handler.clone());
        for _ in 0..ADDITIONS_WAITING_MAX {
            drop(register().expect("there is room"));
        }
        let error = register().err().expect("there is no room");
        assert_eq!(
            error.to_string(),
            "1024 handlers wait to be added to the device event loop"
        );
        go_on.send(()).expect("the loop waits");
        let (served, wait) = channel();
        let tell = move || served.send(()).expect("the test listens");
        handle.run_once(tell).expect("the loop runs");
        wait.recv().expect("the loop serves requests in order");
        assert!(register().is_ok(), "there is room again");
    }

    /// Hands on what the loop tells.
    struct Hears(Mutex<Sender<String>>);

    impl LoopListener for Hears {
        fn loop_started(&self) {}

        fn loop_failed(&self, words: &str) {
            let sender = self.0.lock().expect("no panic while locked");
            sender.send(words.to_owned()).expect("the test listens");
        }
    }

    struct Panics;

    impl EventHandler for Panics {
        fn readable(&self, token: u32) {
            panic!("the handler of {token} panics, as the test wants");
        }
    }

    #[test]
    fn a_panic_in_a_handler_is_told_and_ends_the_loop() {
        let (sender, receiver) = channel();
        let listener = Arc::new(Hears(Mutex::new(sender)));
        let event_loop = EventLoop::start("test-loop", listener).expect("the host has epoll");
        let handle = event_loop.handle();
        let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("the host has eventfds");
        let source = Source {
            fd: kick.as_raw_fd(),
            token: 7,
        };
        let registration = handle.register(vec![source], Arc::new(Panics));
        kick.write(1).expect("the counter is not full");
        let words = receiver.recv().expect("the panic is told");
        assert_eq!(words, "the handler of 7 panics, as the test wants");
        assert!(receiver.recv().is_err(), "the loop lets go of its listener");
        assert!(handle.run_once(|| ()).is_err(), "nobody serves requests");
        drop(registration.expect("the loop ran"));
        drop(event_loop);
    }

    #[test]
    fn an_ended_loop_refuses_by_name() {
        let event_loop = EventLoop::start("test-loop", Arc::new(Deaf)).expect("the host has epoll");
        let handle = event_loop.handle();
        drop(event_loop);
        let error = handle.run_once(|| ()).expect_err("the loop has ended");
        assert_eq!(error.to_string(), "the device event loop has ended");
    }
}
