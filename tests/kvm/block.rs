//! Disks: what the guest writes is in the file, what is in the file the guest reads, over a reset too.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};

use libtest_mimic::Failed;
use vm_lifecycle::config::DiskSpec;

use crate::Body;
use crate::guest::{BOOT_WITHIN, Guest, WITHIN, done, small};

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
    let path = folder.path().join("disk.img");
    let expected = pattern(8 * MIB);
    File::create(&path)?.write_all(&expected)?;
    File::options().write(true).open(&path)?.set_len(64 * MIB)?;
    let disk = DiskSpec::new("data", &path);
    let (guest, mut shell) = Guest::boot(small("bytes")?.cpus(2).disk(disk))?;
    fs::write(folder.path().join("expected"), &expected)?;
    let host_sum = sum(&folder.path().join("expected"))?;
    let read = "dd if=/dev/vda bs=1M count=8 iflag=direct 2>/dev/null | md5sum | cut -d ' ' -f 1";
    assert_eq!(shell.succeed(read)?, host_sum);

    // The guest makes a file system with a file in it, and it survives a reset.
    shell.succeed("mke2fs -q /dev/vda && mkdir /mnt && mount -t ext4 /dev/vda /mnt")?;
    let written = shell.succeed("head -c 20000000 /dev/urandom >/mnt/file && sync && md5sum </mnt/file")?;
    shell.succeed("umount /mnt")?;
    done(guest.vm.reset())?;
    let again = shell.run_within(
        "mkdir /mnt; mount -t ext4 /dev/vda /mnt && md5sum </mnt/file",
        BOOT_WITHIN,
    )?;
    assert_eq!(again.text.trim(), written);

    // Raw bytes, flushed, are in the file while the guest runs.
    shell.succeed("umount /mnt; yes vm-lifecycle | dd of=/dev/vda bs=4096 seek=5000 count=100 iflag=fullblock oflag=direct conv=fsync 2>/dev/null")?;
    let mut bytes = vec![0; 13];
    File::open(&path)?.read_exact_at(&mut bytes, 5000 * 4096)?;
    assert_eq!(bytes, b"vm-lifecycle\n");
    Ok(())
}

fn sum(path: &std::path::Path) -> Result<String, Failed> {
    let output = std::process::Command::new("md5sum").arg(path).output()?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text
        .split_whitespace()
        .next()
        .ok_or("md5sum says nothing")?
        .to_owned())
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
        shell.succeed("cat /sys/block/vda/serial /sys/block/vdb/serial")?,
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
