//! Disks: what the guest writes is in the file, what is in the file the guest reads, over a reset too.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use libtest_mimic::Failed;
use vm_lifecycle::config::DiskSpec;

use crate::Body;
use crate::guest::{BOOT_WITHIN, Guest, WITHIN, done, small};
use crate::harness::wait::wait_for;

const MIB: u64 = 1 << 20;

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![
        Body::new(
            "block::bytes_travel_both_ways_and_over_a_reset",
            bytes_travel_both_ways,
        ),
        Body::new("block::a_disk_is_what_it_says", a_disk_is_what_it_says),
    ]
}

/// `length` bytes that look random and are not.
fn pattern(length: u64) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(length as usize);
    while (bytes.len() as u64) < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

fn bytes_travel_both_ways() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let (source, image, raw) = (
        folder.path().join("source"),
        folder.path().join("disk.img"),
        folder.path().join("raw.img"),
    );
    fs::create_dir(&source)?;
    fs::write(source.join("given"), pattern(8 * MIB))?;
    fs::write(&raw, vec![0; MIB as usize])?;
    run(
        "mkfs.ext4",
        &[
            "-q".as_ref(),
            "-E".as_ref(),
            "lazy_itable_init=1".as_ref(),
            "-d".as_ref(),
            source.as_ref(),
            image.as_ref(),
            "64M".as_ref(),
        ],
    )?;
    let builder = small("bytes")?
        .cpus(2)
        .disk(DiskSpec::new("data", &image))
        .disk(DiskSpec::new("raw", &raw));
    let (guest, mut shell) = Guest::boot(builder)?;

    // What the host put into the file, the guest reads; what the guest writes survives a reset.
    shell.succeed("mkdir -p /mnt && mount -t ext4 -o init_itable=0 /dev/vda /mnt")?;
    let given = shell.succeed("md5sum </mnt/given")?;
    assert_eq!(given, sum(&source.join("given"))?);
    let written = shell.succeed("head -c 20000000 /dev/urandom >/mnt/file && sync && md5sum </mnt/file")?;
    // The kernel zeroes the inode tables that mkfs left alone, in the background and without writing zeros itself.
    let unit = guest.vm.config().disks()[0].unit_name();
    wait_for(WITHIN, "the guest to write zeroes", || {
        let told = guest.unit(&unit).ok()?;
        told["device"]["clears"].as_u64().filter(|count| *count > 0)
    })?;
    shell.succeed("umount /mnt")?;
    done(guest.vm.reset())?;
    let again = shell.run_within(
        "mkdir -p /mnt; mount -t ext4 /dev/vda /mnt && md5sum </mnt/file",
        BOOT_WITHIN,
    )?;
    assert_eq!(again.text.trim(), written);

    // Flushed bytes are in the file while the guest runs, and the disk was asked to keep them.
    let raw_unit = guest.vm.config().disks()[1].unit_name();
    let flushes = guest.unit(&raw_unit)?["device"]["flushes"].as_u64();
    shell.succeed(
        "yes vm-lifecycle | dd of=/dev/vdb bs=4096 seek=50 count=100 iflag=fullblock oflag=direct conv=fsync",
    )?;
    let mut bytes = vec![0; 13];
    File::open(&raw)?.read_exact_at(&mut bytes, 50 * 4096)?;
    assert_eq!(bytes, b"vm-lifecycle\n");
    assert!(guest.unit(&raw_unit)?["device"]["flushes"].as_u64() > flushes);

    // And the file system that the guest leaves behind is whole, with the guest's bytes in it.
    shell.succeed("umount /mnt")?;
    done(guest.vm.shut_down(WITHIN))?;
    run("e2fsck", &["-fn".as_ref(), image.as_ref()])?;
    let dumped = folder.path().join("dumped");
    let request = format!("dump /file {}", dumped.display());
    run("debugfs", &["-R".as_ref(), request.as_ref(), image.as_ref()])?;
    assert_eq!(sum(&dumped)?, written);
    Ok(())
}

fn run(program: &str, arguments: &[&OsStr]) -> Result<String, Failed> {
    // The tools of a file system are in places that only root's path has.
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr)).into())
}

/// The checksum as `md5sum <FILE` prints it.
fn sum(path: &Path) -> Result<String, Failed> {
    let text = run("md5sum", &[path.as_ref()])?;
    Ok(format!(
        "{}  -",
        text.split_whitespace().next().ok_or("md5sum says nothing")?
    ))
}

fn a_disk_is_what_it_says() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let (data, fixed) = (folder.path().join("data.img"), folder.path().join("fixed.img"));
    fs::write(&data, pattern(16 * MIB))?;
    fs::write(&fixed, pattern(MIB))?;
    let builder = small("disks")?
        .cpus(4)
        .disk(DiskSpec::new("data-1", &data))
        .disk(DiskSpec::new("fixed", &fixed).read_only(true));
    let (guest, mut shell) = Guest::boot(builder)?;
    assert_eq!(
        shell.succeed("for d in vda vdb; do echo $(cat /sys/block/$d/serial); done")?,
        "data-1\nfixed"
    );
    assert_eq!(shell.succeed("cat /sys/block/vda/ro /sys/block/vdb/ro")?, "0\n1");
    assert_eq!(
        shell.succeed("cat /sys/block/vda/size")?,
        (16 * MIB / 512).to_string()
    );
    assert_eq!(shell.succeed("ls /sys/block/vda/mq | wc -l")?, "4");
    let refused = shell.run("dd if=/dev/zero of=/dev/vdb bs=512 count=1 oflag=direct")?;
    assert_ne!(refused.status, 0, "{refused:?}");

    // Discarded space goes back to the host; zeroed space reads as zeros.
    let before = fs::metadata(&data)?.blocks();
    shell.succeed("blkdiscard -o 0 -l 8388608 /dev/vda && sync")?;
    assert!(fs::metadata(&data)?.blocks() * 512 <= before * 512 - 8 * MIB + 65536);
    let zeros = "dd if=/dev/vda bs=1M count=8 iflag=direct 2>/dev/null | tr -d '\\0' | wc -c";
    assert_eq!(shell.succeed(zeros)?, "0");

    // All queues at once, with data that is checked afterwards.
    shell.succeed(
        "for i in 0 1 2 3; do (yes $i | taskset -c $i dd of=/dev/vda bs=64k seek=$((i*32)) count=32 iflag=fullblock \
         oflag=direct 2>/dev/null) & done; wait; sync",
    )?;
    let mut file = File::open(&data)?;
    for index in 0..4u64 {
        file.seek(SeekFrom::Start(index * 2 * MIB))?;
        let mut bytes = vec![0; 2 * MIB as usize];
        file.read_exact(&mut bytes)?;
        let expected = format!("{index}\n").into_bytes();
        assert!(
            bytes.chunks(2).all(|pair| pair == expected),
            "queue {index} wrote something else"
        );
    }
    // Each queue has a vector of its own, and each has interrupted; the configuration's never did.
    let counts = shell.succeed(
        "disk=$(basename $(readlink -f /sys/block/vda/device)); grep -E \" $disk-(config|req\\.[0-3])\" \
         /proc/interrupts | awk '{ n = 0; for (i = 2; i <= 5; i++) n += $i; print $NF, (n > 0) }' | sed 's/.*-//'",
    )?;
    assert_eq!(counts, "config 0\nreq.0 1\nreq.1 1\nreq.2 1\nreq.3 1");
    let ready: Vec<_> = guest
        .vm
        .status()?
        .devices
        .iter()
        .map(|device| device.driver_ready)
        .collect();
    assert_eq!(
        ready,
        [true, true, true, true],
        "rng, console and two disks have their drivers"
    );
    done(guest.vm.shut_down(WITHIN))
}
