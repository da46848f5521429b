//! Bytes that the guest writes are in the host's file.

use libtest_mimic::Failed;

use crate::host;
use crate::report::Report;
use crate::tour::Tour;

/// Has the guest write a file, and reads it out of the image without the guest and without the library.
pub fn run(tour: &mut Tour, report: &mut Report) -> Result<(), Failed> {
    report.say(
        "The guest makes a file system on its disk and writes 3 MB of random bytes into a file\n\
         called `letter`. The host then reads that file out of the disk's image with a tool of\n\
         its own (debugfs), while the guest goes on running.",
    );
    let (_, shell) = tour.shell()?;
    shell.succeed("mke2fs -q /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt")?;
    let sum = shell.succeed(
        "head -c 3000000 /dev/urandom >/mnt/letter && sync && md5sum </mnt/letter | cut -d ' ' -f 1",
    )?;
    let found = host::shell(
        "debugfs -R 'cat /letter' \"$1\" 2>/dev/null | md5sum | cut -d ' ' -f 1",
        &tour.disk.to_string_lossy(),
    )?;
    report.equal("checksum of the letter, found in the image", sum.clone(), found);
    tour.letter_sum = sum;
    Ok(())
}
