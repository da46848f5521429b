//! A Linux tap as the backend of a network card.
//!
//! A tap is attached by name or handed over as open descriptors, one for each queue pair. It is never created here,
//! so that nothing is left behind and a misspelt name is an error. Packets move between the kernel and guest memory
//! without a copy in between. The kernel checks every header a guest writes. Linux: `Documentation/networking/tuntap`,
//! `include/uapi/linux/if_tun.h`.

use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::{
    IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, TUN_F_CSUM,
    TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUNGETIFF, TUNSETIFF, TUNSETOFFLOAD, TUNSETQUEUE, TUNSETVNETHDRSZ,
    c_int, c_short, c_ulong, ifreq,
};
use serde_json::{Value, json};
use vm_memory::VolatileSlice;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use super::{BUFFER_COUNT_MAX, NetBackend, Offloads, QUEUE_PAIR_COUNT_MAX, VIRTIO_NET_HDR_BYTES};

/// The longest interface name in bytes (Linux IFNAMSIZ less the final NUL).
pub const TAP_NAME_MAX_BYTES: usize = libc::IFNAMSIZ - 1;

/// What every queue of a tap must be: Ethernet frames behind a `virtio_net_hdr` and nothing else.
const TAP_FLAGS: c_int = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;

/// A tap in use by one network card. Dropping it detaches from the tap.
#[derive(Debug)]
pub struct Tap {
    name: String,
    /// One for each queue pair. A file, because that is what can be read, written and closed.
    queues: Vec<File>,
    active_pair_count: u16,
    receive_offloads: Offloads,
}

/// Why a tap could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No interface can have this name.
    #[error("{name:?} cannot be the name of a tap: {reason}")]
    Name { name: String, reason: &'static str },
    /// The number of queue pairs or descriptors is out of range.
    #[error("a tap cannot have {count} queue pairs, the range is 1 to {QUEUE_PAIR_COUNT_MAX}")]
    QueuePairCount { count: usize },
    /// The host has no tap driver or does not let this process use it.
    #[error("cannot open /dev/net/tun for tap {name:?}")]
    Driver {
        name: String,
        #[source]
        source: io::Error,
    },
    /// No interface of that name exists in this network namespace.
    #[error("tap {name:?} does not exist")]
    NotFound { name: String },
    /// Another process, or another card, is attached to the tap.
    #[error("tap {name:?} is in use")]
    Busy { name: String },
    /// The tap belongs to another user.
    #[error("this process may not attach to tap {name:?}")]
    NotPermitted { name: String },
    /// The interface is of another kind.
    #[error("interface {name:?} is not a tap")]
    NotATap { name: String },
    /// The tap was made without multi-queue.
    #[error("tap {name:?} has a single queue, {count} queue pairs were asked for")]
    SingleQueue { name: String, count: u16 },
    /// A descriptor is not attached to a tap.
    #[error("descriptor {index} is not attached to a tap")]
    NotATapDescriptor {
        index: usize,
        #[source]
        source: io::Error,
    },
    /// A descriptor is attached in another mode than that of virtio.
    #[error("descriptor {index}, tap {name:?}, was not opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    Mode { index: usize, name: String },
    /// The descriptors belong to different taps.
    #[error("descriptor {index} is attached to tap {other:?}, the first one to {name:?}")]
    Mixed {
        index: usize,
        name: String,
        other: String,
    },
    /// The host refused a step.
    #[error("tap {name:?}: the host refused to {what}")]
    Host {
        name: String,
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

impl Tap {
    /// Attaches `pair_count` (1 to [`QUEUE_PAIR_COUNT_MAX`]) queues to the existing tap `name` of this thread's
    /// network namespace. More than one needs a tap made with `multi_queue`. A tap that somebody is attached to is
    /// refused; of two that come at the same moment both may be.
    ///
    /// # Errors
    /// [`TapError`], always with the name.
    pub fn open(name: &str, pair_count: u16) -> Result<Self, TapError> {
        check_pair_count(pair_count.into())?;
        let name_c = check_name(name)?;
        let index = interface_index(&name_c).ok_or_else(|| TapError::NotFound {
            name: name.to_owned(),
        })?;
        // The kernel lets strangers share a multi-queue tap, and each gets a part of the packets.
        queues::check_users(name, index, 0)?;
        let first = attach_first(name, &name_c, pair_count)?;
        // A tap removed after the look-up was made anew by the attachment; it goes with its only descriptor.
        if interface_index(&name_c) != Some(index) {
            return Err(TapError::NotFound {
                name: name.to_owned(),
            });
        }
        queues::check_users(name, index, 1)?;
        let mut queues = vec![first];
        while queues.len() < usize::from(pair_count) {
            let queue = open_driver(name)?;
            attach(&queue, &name_c, TAP_FLAGS | IFF_MULTI_QUEUE).map_err(|source| refusal(name, source))?;
            queues.push(queue);
        }
        Self::configured(name.to_owned(), queues)
    }

    /// Takes over descriptors that are attached to one tap, one for each queue pair. They are made non-blocking,
    /// which also holds for copies of them that others keep.
    ///
    /// # Errors
    /// [`TapError`], with the position of the descriptor that does not fit.
    pub fn from_fds(fds: Vec<OwnedFd>) -> Result<Self, TapError> {
        check_pair_count(fds.len())?;
        let queues: Vec<File> = fds.into_iter().map(File::from).collect();
        let mut first: Option<String> = None;
        for (index, queue) in queues.iter().enumerate() {
            let (name, flags) =
                attachment(queue).map_err(|source| TapError::NotATapDescriptor { index, source })?;
            if flags & TAP_FLAGS != TAP_FLAGS {
                return Err(TapError::Mode { index, name });
            }
            let first = first.get_or_insert_with(|| name.clone());
            if *first != name {
                return Err(TapError::Mixed {
                    index,
                    name: first.clone(),
                    other: name,
                });
            }
            set_descriptor_flags(queue).map_err(host(&name, "make the descriptor non-blocking"))?;
        }
        Self::configured(first.unwrap_or_default(), queues)
    }

    /// The tap's name when it was taken.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sets the header size and takes all offloads back, whatever a former user left behind.
    fn configured(name: String, queues: Vec<File>) -> Result<Self, TapError> {
        let header_bytes = VIRTIO_NET_HDR_BYTES as c_int;
        // SAFETY: the descriptor is a tap's, and the kernel only reads the c_int during the call.
        let result = unsafe { ioctl_with_ref(&queues[0], TUNSETVNETHDRSZ as c_ulong, &header_bytes) };
        checked(result).map_err(host(&name, "set the header size"))?;
        let mut tap = Self {
            active_pair_count: queues.len() as u16,
            name,
            queues,
            receive_offloads: Offloads::default(),
        };
        tap.set_receive_offloads(Offloads::default())
            .map_err(host(&tap.name, "set the offloads"))?;
        Ok(tap)
    }

    /// Connects queue `pair_index` to the tap (`IFF_ATTACH_QUEUE`) or takes it out (`IFF_DETACH_QUEUE`).
    fn set_queue(&self, pair_index: u16, flag: c_int) -> io::Result<()> {
        let request = request(None, flag);
        let queue = self.queue(pair_index)?;
        // SAFETY: the descriptor is a tap's, and the kernel only reads the ifreq during the call.
        checked(unsafe { ioctl_with_ref(queue, TUNSETQUEUE as c_ulong, &request) })
    }

    fn queue(&self, pair_index: u16) -> io::Result<&File> {
        self.queues
            .get(usize::from(pair_index))
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
    }
}

impl NetBackend for Tap {
    fn queue_pair_count(&self) -> u16 {
        self.queues.len() as u16
    }

    fn readiness(&self, pair_index: u16) -> BorrowedFd<'_> {
        self.queues[usize::from(pair_index)].as_fd()
    }

    fn transmit_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn receive_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn set_receive_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let flags = [
            (offloads.checksum, TUN_F_CSUM),
            (offloads.tso4, TUN_F_TSO4),
            (offloads.tso6, TUN_F_TSO6),
            (offloads.ecn, TUN_F_TSO_ECN),
        ];
        let flags = flags.iter().filter(|(wanted, _)| *wanted);
        let flags = flags.fold(0, |all, (_, flag)| all | flag);
        // SAFETY: the descriptor is a tap's; the argument is a value, not a pointer.
        checked(unsafe { ioctl_with_val(&self.queues[0], TUNSETOFFLOAD as c_ulong, flags.into()) })?;
        self.receive_offloads = offloads;
        Ok(())
    }

    fn set_active_pair_count(&mut self, count: u16) -> io::Result<()> {
        if count == 0 || usize::from(count) > self.queues.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let before = self.active_pair_count;
        let (change, flag, opposite) = if count < before {
            (count..before, IFF_DETACH_QUEUE, IFF_ATTACH_QUEUE)
        } else {
            (before..count, IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE)
        };
        for pair_index in change.clone() {
            if let Err(error) = self.set_queue(pair_index, flag) {
                for changed in change.start..pair_index {
                    if let Err(error) = self.set_queue(changed, opposite) {
                        log::warn!("tap {:?}: cannot change queue {changed} back: {error}", self.name);
                    }
                }
                return Err(error);
            }
        }
        self.active_pair_count = count;
        Ok(())
    }

    fn receive(&mut self, pair_index: u16, buffers: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let vectors = io_vectors(buffers)?;
        let fd = self.queue(pair_index)?.as_raw_fd();
        // SAFETY: each vector is the whole of a VolatileSlice, which stays mapped and writable for as long as
        // `buffers` is borrowed. The memory is the guest's, so no Rust reference to it exists that the kernel's
        // write could contradict. Their number fits a c_int (BUFFER_COUNT_MAX).
        let length = unsafe { libc::readv(fd, vectors.as_ptr(), vectors.len() as c_int) };
        usize::try_from(length).map_err(|_| io::Error::last_os_error())
    }

    fn transmit(&mut self, pair_index: u16, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let vectors = io_vectors(buffers)?;
        let fd = self.queue(pair_index)?.as_raw_fd();
        // SAFETY: as in `receive`; the kernel only reads, and copes with a guest that writes meanwhile.
        let length = unsafe { libc::writev(fd, vectors.as_ptr(), vectors.len() as c_int) };
        usize::try_from(length)
            .map(|_| ())
            .map_err(|_| io::Error::last_os_error())
    }

    fn inspect(&self) -> Value {
        json!({
            "kind": "tap",
            "name": self.name,
            "active_pair_count": self.active_pair_count,
            "receive_offloads": self.receive_offloads,
        })
    }
}

/// The kernel's view of `buffers`.
fn io_vectors(buffers: &[VolatileSlice<'_>]) -> io::Result<Vec<libc::iovec>> {
    if buffers.len() > BUFFER_COUNT_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let vector = |buffer: &VolatileSlice<'_>| libc::iovec {
        iov_base: buffer.ptr_guard_mut().as_ptr().cast(),
        iov_len: buffer.len(),
    };
    Ok(buffers.iter().map(vector).collect())
}

fn check_pair_count(count: usize) -> Result<(), TapError> {
    if (1..=usize::from(QUEUE_PAIR_COUNT_MAX)).contains(&count) {
        return Ok(());
    }
    Err(TapError::QueuePairCount { count })
}

/// Checks `name` by the kernel's rules for interfaces; `%` is refused too, because it makes a pattern of a name.
fn check_name(name: &str) -> Result<CString, TapError> {
    let error = |reason| TapError::Name {
        name: name.chars().take(64).collect(),
        reason,
    };
    if name.is_empty() || name == "." || name == ".." {
        return Err(error("it is empty or a directory"));
    }
    if name.len() > TAP_NAME_MAX_BYTES {
        return Err(error("it is longer than 15 bytes"));
    }
    if !name.chars().all(|c| c.is_ascii_graphic() && !"/:%".contains(c)) {
        return Err(error("only visible ascii characters except / : % are allowed"));
    }
    CString::new(name).map_err(|_| error("it contains a nul"))
}

/// The number of the interface `name` in this thread's network namespace.
fn interface_index(name: &CStr) -> Option<u32> {
    // SAFETY: the name is a NUL-terminated string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (index != 0).then_some(index)
}

fn open_driver(name: &str) -> Result<File, TapError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(|source| TapError::Driver {
            name: name.to_owned(),
            source,
        })
}

/// Attaches the first queue. The kernel wants to be told whether the tap is multi-queue and answers a wrong guess in
/// the same way as an interface that is no tap (EINVAL), so the other guess is tried before giving up.
fn attach_first(name: &str, name_c: &CStr, pair_count: u16) -> Result<File, TapError> {
    let multi_queue = pair_count > 1;
    for guess in [multi_queue, !multi_queue] {
        let queue = open_driver(name)?;
        let flags = TAP_FLAGS | if guess { IFF_MULTI_QUEUE } else { 0 };
        match attach(&queue, name_c, flags) {
            Ok(()) if guess || !multi_queue => return Ok(queue),
            Ok(()) => {
                return Err(TapError::SingleQueue {
                    name: name.to_owned(),
                    count: pair_count,
                });
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(refusal(name, error)),
        }
    }
    Err(TapError::NotATap {
        name: name.to_owned(),
    })
}

fn attach(queue: &File, name: &CStr, flags: c_int) -> io::Result<()> {
    let mut request = request(Some(name), flags);
    // SAFETY: the descriptor is the tap driver's, and the ifreq is valid for reading and writing during the call.
    checked(unsafe { ioctl_with_mut_ref(queue, TUNSETIFF as c_ulong, &mut request) })
}

/// The name and the flags of the tap that `queue` is attached to.
fn attachment(queue: &File) -> io::Result<(String, c_int)> {
    let mut request = request(None, 0);
    // SAFETY: the ifreq is valid for writing during the call; another driver refuses the number with ENOTTY.
    checked(unsafe { ioctl_with_mut_ref(queue, TUNGETIFF as c_ulong, &mut request) })?;
    let name = request.ifr_name.iter().take_while(|byte| **byte != 0);
    let name: Vec<u8> = name.map(|byte| *byte as u8).collect();
    // SAFETY: the union is plain old data, zeroed at first; TUNGETIFF stores the flags as a c_short.
    let flags = unsafe { request.ifr_ifru.ifru_flags } as u16;
    Ok((String::from_utf8_lossy(&name).into_owned(), flags.into()))
}

/// An interface request with `flags`; `name` has been checked and fits.
fn request(name: Option<&CStr>, flags: c_int) -> ifreq {
    // SAFETY: ifreq is plain old data for which zero is a value.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    let name = name.map(CStr::to_bytes).unwrap_or_default();
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as c_short;
    request
}

fn set_descriptor_flags(queue: &File) -> io::Result<()> {
    let fd = queue.as_raw_fd();
    // SAFETY: fcntl with these commands takes and returns integers only.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    checked(flags)?;
    // SAFETY: as above.
    checked(unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) })?;
    // SAFETY: as above.
    checked(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })
}

fn checked(result: c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What the kernel's refusal to attach means.
fn refusal(name: &str, source: io::Error) -> TapError {
    let name = name.to_owned();
    match source.raw_os_error() {
        Some(libc::EBUSY) => TapError::Busy { name },
        Some(libc::EPERM | libc::EACCES) => TapError::NotPermitted { name },
        _ => TapError::Host {
            name,
            what: "attach",
            source,
        },
    }
}

fn host(name: &str, what: &'static str) -> impl FnOnce(io::Error) -> TapError {
    let name = name.to_owned();
    move |source| TapError::Host { name, what, source }
}

mod queues;
#[cfg(test)]
pub(crate) mod tests;
