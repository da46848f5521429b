//! Raw disks on a block device: a loop device, where the machine gives one.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;

use vm_memory::{Bytes, GuestAddress};

use super::tests::{ENGINES, MIB, image, open, run};
use super::{OpenError, RawEngine};
use crate::storage::testing::guest_memory;
use crate::storage::{DiskBackend, DiskOperation, GuestBuffers};

#[test]
fn a_block_device_is_measured_and_discards() {
    let file = image(&vec![0xAB; MIB as usize]);
    let Some(device) = LoopDevice::attach(file.path()) else {
        eprintln!("skipped: this machine gives no loop device");
        return;
    };
    for engine in ENGINES {
        fs::write(&device.0, vec![0xAB; MIB as usize]).expect("the device is writable");
        let mut disk = open(Path::new(&device.0), false, engine).expect("a good device");
        assert_eq!(disk.properties().capacity_bytes, MIB);
        let busy = open(Path::new(&device.0), false, engine)
            .err()
            .expect("it is open");
        assert!(matches!(busy, OpenError::InUse { .. }), "{busy}");
        let operations = vec![
            DiskOperation::Discard {
                offset_bytes: 4096,
                length_bytes: 8192,
            },
            DiskOperation::Discard {
                offset_bytes: 100,
                length_bytes: 99,
            },
            DiskOperation::WriteZeroes {
                offset_bytes: MIB / 2,
                length_bytes: 4096,
                unmap: true,
            },
            DiskOperation::WriteZeroes {
                offset_bytes: MIB / 4,
                length_bytes: 600,
                unmap: false,
            },
            DiskOperation::Flush,
        ];
        assert!(run(&mut disk, operations).iter().all(Result::is_ok), "{engine:?}");
        let memory = guest_memory(MIB as usize);
        let buffers = GuestBuffers::new(memory.clone(), [(GuestAddress(0), MIB as u32)]).expect("in memory");
        let read = DiskOperation::Read {
            offset_bytes: 0,
            buffers,
        };
        run(&mut disk, vec![read]).remove(0).expect("the read succeeds");
        let mut content = vec![0; MIB as usize];
        memory
            .read_slice(&mut content, GuestAddress(0))
            .expect("in memory");
        let half = (MIB / 2) as usize;
        assert!(
            content[4096..12_288].iter().all(|byte| *byte == 0),
            "{engine:?}: discarded"
        );
        assert!(
            content[half..half + 4096].iter().all(|byte| *byte == 0),
            "{engine:?}: zeroed"
        );
        assert!(
            content[half / 2..half / 2 + 600].iter().all(|byte| *byte == 0),
            "{engine:?}: zeroed"
        );
        assert_eq!(
            (content[4095], content[half / 2 + 600]),
            (0xAB, 0xAB),
            "{engine:?}: the rest stays"
        );
    }
}

#[test]
fn a_block_device_that_the_host_uses_is_not_written_to() {
    let file = image(&vec![0xAB; MIB as usize]);
    let Some(device) = LoopDevice::attach(file.path()) else {
        eprintln!("skipped: this machine gives no loop device");
        return;
    };
    let open = |read_only| open(Path::new(&device.0), read_only, RawEngine::ThreadPool);
    // What a mount, a volume group and a device mapper do.
    let claim = fs::File::options()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(&device.0)
        .expect("nobody has it");
    let error = open(false).err().expect("the host has it").to_string();
    let expected = format!("disk image {} is in use by another vm or process", device.0);
    assert_eq!(error, expected);
    open(true).expect("reading does no harm");
    drop(claim);
    let disk = open(false).expect("nobody has it");
    let claim = fs::File::options()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(&device.0);
    let error = claim.expect_err("the disk has it");
    assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
    drop(disk);
}

/// A loop device over a file, detached at the end.
struct LoopDevice(String);

impl LoopDevice {
    fn attach(path: &Path) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(path)
            .output()
            .ok()?;
        let device = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| Self(device.trim().to_owned()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}
