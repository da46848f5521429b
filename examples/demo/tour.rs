//! What one step of the tour leaves for the next.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use libtest_mimic::Failed;

use crate::guest::Guest;
use crate::harness::guest_shell::GuestShell;
use crate::harness::tap::Tap;
use crate::host::{self, Holdings};

/// The host's address on the tap.
pub const HOST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 213, 90, 1);
/// The guest's address on the same network.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 213, 90, 2);

/// How long a VM that is going down may take to say why.
const SETTLING: Duration = Duration::from_secs(5);

/// The things on the host, and the VM with the shell in its guest as soon as there are any.
pub struct Tour {
    /// Before there was any VM.
    pub holdings: Holdings,
    /// KVM's folders of VMs that are none of this program's.
    pub foreign: Option<BTreeSet<PathBuf>>,
    /// The file that the guest takes for a disk.
    pub disk: PathBuf,
    /// The network between host and guest.
    pub tap: Tap,
    guest: Option<(Guest, Option<GuestShell>)>,
    /// VMs that only have to live on.
    pub neighbours: Vec<(Guest, GuestShell)>,
    /// Checksum of the file that the guest has on its disk.
    pub letter_sum: String,
    /// Removed with everything in it at the end.
    _folder: tempfile::TempDir,
}

impl Tour {
    /// Prepares the host: a folder for files, a tap.
    pub fn new() -> Result<Self, Failed> {
        let folder = tempfile::tempdir()?;
        let tap = Tap::create(HOST_ADDRESS)
            .map_err(|error| format!("a tap cannot be made, which needs root: {error}"))?;
        Ok(Self {
            holdings: Holdings::now()?,
            foreign: host::kvm_folders(),
            disk: folder.path().join("disk.img"),
            tap,
            guest: None,
            neighbours: Vec::new(),
            letter_sum: String::new(),
            _folder: folder,
        })
    }

    /// Keeps the VM that the tour is about.
    pub fn keep(&mut self, guest: Guest) {
        self.guest = Some((guest, None));
    }

    /// The VM that the tour is about.
    pub fn guest(&self) -> Result<&Guest, Failed> {
        let (guest, _) = self.guest.as_ref().ok_or("no vm has been made")?;
        Ok(guest)
    }

    /// Waits until its guest answers commands.
    pub fn connect(&mut self) -> Result<(), Failed> {
        let (guest, shell) = self.guest.as_mut().ok_or("no vm has been made")?;
        *shell = Some(guest.host.shell()?);
        Ok(())
    }

    /// The shell in its guest, and the VM.
    pub fn shell(&mut self) -> Result<(&Guest, &mut GuestShell), Failed> {
        match self.guest.as_mut() {
            Some((guest, Some(shell))) => Ok((guest, shell)),
            _ => Err("no guest answers commands".into()),
        }
    }

    /// The folders that KVM has for VMs of this program.
    pub fn kvm_folders(&self) -> Option<BTreeSet<PathBuf>> {
        let now = host::kvm_folders()?;
        Some(now.difference(self.foreign.as_ref()?).cloned().collect())
    }

    /// What is known of the VM that the tour is about, for a step that could not go on.
    pub fn describe(&self) -> String {
        let Ok(guest) = self.guest() else {
            return "no vm has been made".to_owned();
        };
        let told = match guest.vm.inspect() {
            Ok(told) => format!("{told:#}"),
            Err(error) => error.to_string(),
        };
        let folders = self.kvm_folders().unwrap_or_default();
        let exits: Vec<String> = folders
            .iter()
            .filter_map(|folder| Some(host::exit_count(folder).ok()?.to_string()))
            .collect();
        let events = std::iter::from_fn(|| guest.events.next(SETTLING));
        let events: Vec<String> = events.map(|event| format!("{event:?}")).collect();
        format!(
            "vm exits so far: {}\nthe vm says: {told}\nevents that nobody has read:\n{}",
            exits.join(", "),
            events.join("\n")
        )
    }

    /// Drops every handle of every VM.
    pub fn let_go(&mut self) {
        self.guest = None;
        self.neighbours.clear();
    }
}
