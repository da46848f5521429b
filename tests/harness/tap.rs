//! Tap interfaces for guests' network cards, with names of their own, gone when the value is.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::process::{self, Command};
use std::sync::atomic::{AtomicU32, Ordering};

/// linux/if_tun.h: `_IOW('T', 202, int)`.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
/// A `struct ifreq` of linux/if.h: the name, and a union of 24 bytes of which the first two are the flags.
const IFREQ_SIZE: usize = 40;

static TAP_COUNT: AtomicU32 = AtomicU32::new(0);

/// A persistent tap interface, up, with an address on this machine's side.
#[derive(Debug)]
pub struct Tap {
    name: String,
    address: Ipv4Addr,
    flags: i32,
}

impl Tap {
    /// Creates a tap with one queue and `address`/24 on it.
    pub fn create(address: Ipv4Addr) -> io::Result<Self> {
        Tap::create_with_flags(address, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)
    }

    /// Creates a tap that can be opened once per queue.
    pub fn create_multi_queue(address: Ipv4Addr) -> io::Result<Self> {
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
        Tap::create_with_flags(address, flags)
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The address on this machine's side.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Opens a queue of the tap, with the header that virtio-net expects in front of every frame.
    pub fn open(&self) -> io::Result<File> {
        let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
        let mut request = [0u8; IFREQ_SIZE];
        request[..self.name.len()].copy_from_slice(self.name.as_bytes());
        let flags = u16::try_from(self.flags).map_err(io::Error::other)?;
        request[libc::IFNAMSIZ..libc::IFNAMSIZ + 2].copy_from_slice(&flags.to_ne_bytes());
        // SAFETY: the request is a whole `struct ifreq` that lives on this stack through the call; the name in it is
        // shorter than IFNAMSIZ and so ends with a zero.
        let result = unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF as _, request.as_mut_ptr()) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(tun)
        }
    }

    /// Sets the link up or down on this machine's side.
    pub fn set_up(&self, up: bool) -> io::Result<()> {
        ip(&["link", "set", &self.name, if up { "up" } else { "down" }])
    }

    fn create_with_flags(address: Ipv4Addr, flags: i32) -> io::Result<Self> {
        let count = TAP_COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vlt{}n{count}", process::id());
        let mut words = vec!["tuntap", "add", "dev", &name, "mode", "tap", "vnet_hdr"];
        if flags & libc::IFF_MULTI_QUEUE != 0 {
            words.push("multi_queue");
        }
        ip(&words)?;
        // From here on the interface exists, so that a failure below removes it.
        let tap = Tap { name, address, flags };
        ip(&["addr", "add", &format!("{address}/24"), "dev", &tap.name])?;
        tap.set_up(true)?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if let Err(error) = ip(&["link", "del", &self.name]) {
            eprintln!("the tap {} stays behind: {error}", self.name);
        }
    }
}

fn ip(words: &[&str]) -> io::Result<()> {
    let output = Command::new("ip").args(words).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!(
        "`ip {}`: {}",
        words.join(" "),
        said.trim()
    )))
}
