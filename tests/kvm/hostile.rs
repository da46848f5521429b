//! A guest that writes nonsense wherever it can: it, its neighbour and this process live on.

use libtest_mimic::Failed;
use vm_lifecycle::config::DiskSpec;
use vm_lifecycle::event::EventKind;
use vm_lifecycle::state::State;
use vm_lifecycle::vm::memory::ResizeOptions;
use vm_lifecycle::vm::operation::Ended;

use crate::Body;
use crate::guest::{CMDLINE, Guest, WITHIN, done, small};
use crate::harness::guest_shell::GuestShell;

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![Body::new(
        "hostile::nonsense_everywhere_harms_nobody_else",
        nonsense_everywhere_harms_nobody_else,
    )]
}

/// The slots of the memory device, the balloon and the disk, which is the first of the user's choice.
const POKED: [&str; 3] = ["0000:00:03.0", "0000:00:04.0", "0000:00:08.0"];

fn nonsense_everywhere_harms_nobody_else() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk.img");
    std::fs::write(&path, vec![7; 1 << 20])?;
    let (neighbour, mut neighbours_shell) = Guest::boot(small("neighbour")?)?;
    // With the last word the kernel lets its user touch what its drivers have claimed.
    let builder = small("hostile")?
        .cmdline(format!(
            "{CMDLINE} memhp_default_state=online_movable iomem=relaxed"
        ))
        .maximum_bytes(512 << 20)
        .disk(DiskSpec::new("data", &path));
    let (guest, mut shell) = Guest::boot(builder)?;
    shell.succeed("mknod /dev/port c 1 4; mknod /dev/mem c 1 1; test -c /dev/mem")?;

    poke_platform(&mut shell)?;
    for bdf in POKED {
        poke_device(&mut shell, bdf)?;
        shell.succeed(&format!(
            "echo 1 >/sys/bus/pci/devices/{bdf}/reset 2>/dev/null; true"
        ))?;
    }
    let memory = guest.vm.memory()?;
    assert_eq!(
        (memory.requested_bytes, memory.assigned_bytes),
        (256 << 20, 256 << 20)
    );
    assert_eq!(shell.succeed("echo alive")?, "alive");
    assert_eq!(neighbours_shell.succeed("echo alive")?, "alive");
    assert_eq!(
        (guest.vm.state(), neighbour.vm.state()),
        (State::Running, State::Running)
    );

    // A reset heals it: the driver finds its disk and its bytes again.
    done(guest.vm.reset())?;
    let found = shell.run_within(
        "head -c 1048576 /dev/vda | tr -d '\\007' | wc -c",
        crate::guest::BOOT_WITHIN,
    )?;
    assert_eq!(found.text.trim(), "0");
    let grown = guest.vm.resize_memory(512 << 20, ResizeOptions::default())?;
    assert!(
        grown.wait(WITHIN).is_some_and(|outcome| outcome.is_done()),
        "{grown:?}"
    );
    done(neighbour.vm.shut_down(WITHIN))?;
    let told = std::iter::from_fn(|| guest.events.next(std::time::Duration::ZERO));
    let complaints = told
        .filter(|event| matches!(event.kind, EventKind::DeviceNeedsReset { .. }))
        .count();
    assert!(
        complaints >= POKED.len(),
        "{complaints} times a device asked for a reset"
    );
    Ok(())
}

/// Nonsense into ports, the ACPI page, empty slots and windows.
fn poke_platform(shell: &mut GuestShell) -> Result<(), Failed> {
    // Every port but those that reset or end the machine: keyboard controller, panic port, reset control.
    shell.succeed(
        "for port in $(seq 0 3 95) $(seq 256 3 1279) $(seq 1408 97 3200) 113 ; do \
         dd if=/dev/urandom of=/dev/port bs=1 seek=$port count=1 conv=notrunc 2>/dev/null; \
         dd if=/dev/port of=/dev/null bs=1 skip=$port count=1 2>/dev/null; done; true",
    )?;

    // The ACPI page but its sleep and reset registers, and all empty slots and windows.
    shell.succeed(
        "for a in 0xfea00000 0xfea00004 0xfea00010 0xfea00800 0xfea01000 0xfea01ffc 0xe0008000 0xe00f8ffc \
         0xe0300000 0xcfffff00 0xc1000000; do for w in 8 16 32 64; do devmem $a $w >/dev/null; \
         devmem $a $w 0xffffffffffffffff; devmem $a $w 0; done; done",
    )?;
    // An empty slot and an empty window read as all ones, in every width.
    for (width, ones) in [(8, "0xFF"), (16, "0xFFFF"), (32, "0xFFFFFFFF")] {
        for address in ["0xe00f8000", "0xc2000000"] {
            let read = shell.succeed(&format!("devmem {address} {width}"))?;
            assert_eq!(read, ones, "{address}");
        }
    }
    Ok(())
}

/// Nonsense into a device's registers and its configuration space.
fn poke_device(shell: &mut GuestShell, bdf: &str) -> Result<(), Failed> {
    // Without its driver.
    shell.succeed(&format!("echo {bdf} >/sys/bus/pci/devices/{bdf}/driver/unbind"))?;
    let bar = shell.succeed(&format!(
        "head -n 1 /sys/bus/pci/devices/{bdf}/resource | cut -d ' ' -f 1"
    ))?;
    shell.succeed(&format!(
        "echo 1 >/sys/bus/pci/devices/{bdf}/enable; \
         for o in $(seq 0 4 60) 4096 8192 8200 12288 12292 12300 $(seq 16384 4 16448) 20480 32764; do \
         v=$(od -An -N4 -tu4 /dev/urandom); for w in 8 16 32; do \
         devmem $(({bar} + o)) $w $((v % (1 << w))); devmem $(({bar} + o)) $w >/dev/null; done; done; \
         for s in 1 3 11 15 4 0; do devmem $(({bar} + 20)) 8 $s; done"
    ))?;
    // Queues in the middle of nowhere: the device asks for a reset, and says so to the host too. The registers are those
    // of virtio 1.2 §4.1.4.3.
    shell.succeed(&format!(
        "w() {{ devmem $(({bar} + $1)) $2 $3; }}; w 20 8 0; w 20 8 3; w 8 32 1; w 12 32 1; w 20 8 11; w 22 16 0; \
         w 32 32 0xfffff000; w 36 32 0xffff; w 40 32 0xffffe000; w 44 32 0xffff; w 48 32 0xffffd000; \
         w 52 32 0xffff; w 28 16 1; w 20 8 15; s=$(devmem $(({bar} + 20)) 8); [ $((s & 64)) = 64 ]"
    ))?;
    shell.succeed(&format!(
        "for round in $(seq 20); do dd if=/dev/urandom of=/sys/bus/pci/devices/{bdf}/config bs=64 count=4 \
         conv=notrunc 2>/dev/null; od /sys/bus/pci/devices/{bdf}/config >/dev/null; done; true"
    ))?;
    Ok(())
}
