//! A VM on paper: making it checks everything and runs nothing.

use std::fs::File;

use libtest_mimic::Failed;
use vm_lifecycle::config::{DiskSpec, NicSpec};
use vm_lifecycle::state::State;

use crate::guest::{CMDLINE, Guest, small};
use crate::report::Report;
use crate::tour::Tour;

/// Processors of the VM.
pub const CPUS: u32 = 2;
/// Memory that it begins with, in MiB.
pub const MEMORY_MIB: u64 = 256;
/// Memory that it can be given, in MiB.
pub const MEMORY_MAX_MIB: u64 = 1024;
/// The disk's name, which the guest reads as its serial number.
pub const DISK: &str = "letters";
/// The disk's size.
pub const DISK_BYTES: u64 = 64 << 20;
/// The network card's address.
pub const MAC: &str = "52:54:00:12:34:56";

/// Describes the VM and makes it.
pub fn run(tour: &mut Tour, report: &mut Report) -> Result<(), Failed> {
    report.say(format!(
        "A VM with {CPUS} processors, {MEMORY_MIB} MiB of memory that can become {MEMORY_MAX_MIB}, a disk that is really the file\n{},\n\
         a network card that is plugged into the host's virtual network `{}` (a \"tap\"),\n\
         and a port to talk to it. Making it checks what it needs; nothing runs yet.",
        tour.disk.display(),
        tour.tap.name()
    ));
    File::create(&tour.disk)?.set_len(DISK_BYTES)?;
    let disk = DiskSpec::new(DISK, &tour.disk);
    let nic = NicSpec::new("lan", tour.tap.name()).mac(MAC.parse()?);
    let config = small("demo")?
        .cmdline(format!("{CMDLINE} memhp_default_state=online_movable"))
        .startup_bytes(MEMORY_MIB << 20)
        .maximum_bytes(MEMORY_MAX_MIB << 20);
    let guest = Guest::make(config.cpus(CPUS).disk(disk).nic(nic))?;
    report.equal("state of the VM", State::Off, guest.vm.state());
    let early = guest.vm.pause().map(drop);
    let told = early.map_or_else(|error| error.to_string(), |()| "it is accepted".to_owned());
    report.equal("pausing it now", "cannot pause: the vm is off".to_owned(), told);
    tour.keep(guest);
    Ok(())
}
