//! The host's side of the ports: streams are handed over here from any thread and taken up by the device on its event
//! loop, once the guest has been told that the former one is closed.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::ids::PortName;

/// Connects host ends to the ports of one console; cheap to clone, callable from any thread.
#[derive(Clone)]
pub struct ConsolePorts {
    door: Weak<Door>,
}

/// Where streams wait for the device.
pub(super) struct Door {
    names: Vec<PortName>,
    /// By port.
    waiting: Mutex<Vec<Option<UnixStream>>>,
    /// Readable when the device is to be called on its event loop.
    bell: EventFd,
}

/// Why a host end could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The console has no port of this name.
    #[error("the console has no port {name}")]
    NoSuchPort { name: PortName },
    /// The console is gone with its VM.
    #[error("the console of port {name} is gone")]
    Gone { name: PortName },
    /// The host refused.
    #[error("cannot connect port {name}")]
    Host {
        name: PortName,
        #[source]
        source: io::Error,
    },
}

impl ConsolePorts {
    /// Makes `stream` the host end of port `name`; the guest then sees the port open. A host end connected before is
    /// closed, and what it had not delivered is lost. When the peer closes the stream, the guest sees the port closed.
    ///
    /// The stream becomes non-blocking, which concerns every descriptor of the same open socket.
    ///
    /// # Errors
    /// [`ConnectError`] when there is no such port, the VM is gone, or the host refuses.
    pub fn attach(&self, name: &PortName, stream: UnixStream) -> Result<(), ConnectError> {
        let host = |source| ConnectError::Host {
            name: name.clone(),
            source,
        };
        let gone = || ConnectError::Gone { name: name.clone() };
        let door = self.door.upgrade().ok_or_else(gone)?;
        let found = door.names.iter().position(|port| port == name);
        let port_index = found.ok_or_else(|| ConnectError::NoSuchPort { name: name.clone() })?;
        stream.set_nonblocking(true).map_err(host)?;
        door.waiting()[port_index] = Some(stream);
        door.ring().map_err(host)
    }

    /// Makes a pair of streams, attaches one end to port `name` and returns the other, which blocks.
    ///
    /// # Errors
    /// As [`ConsolePorts::attach`].
    pub fn connect(&self, name: &PortName) -> Result<UnixStream, ConnectError> {
        let pair = UnixStream::pair();
        let (ours, theirs) = pair.map_err(|source| ConnectError::Host {
            name: name.clone(),
            source,
        })?;
        self.attach(name, ours)?;
        Ok(theirs)
    }
}

impl Door {
    /// Makes the door of a console with ports of these names.
    pub(super) fn new(names: Vec<PortName>) -> io::Result<Self> {
        Ok(Self {
            waiting: Mutex::new(names.iter().map(|_| None).collect()),
            names,
            bell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// A handle for the embedder.
    pub(super) fn ports(self: &Arc<Self>) -> ConsolePorts {
        ConsolePorts {
            door: Arc::downgrade(self),
        }
    }

    /// Readable while somebody has rung and the device has not answered.
    pub(super) fn bell(&self) -> &EventFd {
        &self.bell
    }

    /// Whether a stream waits for port `port_index`.
    pub(super) fn has_waiting(&self, port_index: usize) -> bool {
        self.waiting()[port_index].is_some()
    }

    /// Takes the stream that waits for port `port_index`.
    pub(super) fn take(&self, port_index: usize) -> Option<UnixStream> {
        self.waiting()[port_index].take()
    }

    /// Has the device called on its event loop.
    pub(super) fn ring(&self) -> io::Result<()> {
        match self.bell.write(1) {
            // The counter is full: it has been rung already.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result,
        }
    }

    /// The device was called.
    pub(super) fn answer(&self) {
        // An empty counter means that nobody rang; the device looks at everything anyway.
        let _ = self.bell.read();
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Option<UnixStream>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
