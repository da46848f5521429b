//! The guest gets more memory while it runs, and gives it back.

use libtest_mimic::Failed;
use vm_lifecycle::vm::memory::ResizeOptions;

use crate::guest::WITHIN;
use crate::harness::guest_shell::GuestShell;
use crate::harness::wait::wait_for;
use crate::report::Report;
use crate::steps::make::{MEMORY_MAX_MIB, MEMORY_MIB};
use crate::tour::Tour;

const MIB: u64 = 1 << 20;
/// Less than this nobody can leave the guest; `MemoryConfig::floor_bytes` tells where the number comes from.
const BELOW_FLOOR_MIB: u64 = 96;

/// Grows the guest, has it use what it got, and shrinks it below what it began with.
pub fn run(tour: &mut Tour, report: &mut Report) -> Result<(), Failed> {
    report.say(format!(
        "The running guest is given {MEMORY_MAX_MIB} MiB instead of {MEMORY_MIB}, and uses them. Then it is brought\n\
         down to 192 MiB, which is less than it began with, and back. It is not restarted in between.",
    ));
    let (guest, shell) = tour.shell()?;
    let begun_mib = total_mib(shell)?;
    for target_mib in [MEMORY_MAX_MIB, 192, MEMORY_MIB] {
        let options = ResizeOptions {
            within: WITHIN,
            ..ResizeOptions::default()
        };
        let resize = guest.vm.resize_memory(target_mib * MIB, options)?;
        let outcome = resize.wait(WITHIN * 2).ok_or("the resize has not ended")?;
        let told = format!("complete: {target_mib} MiB of {target_mib} MiB reached");
        report.equal(
            "the operation's outcome",
            told.replace("1024 MiB", "1 GiB"),
            outcome.to_string(),
        );
        let moved_mib = i128::from(target_mib) - i128::from(MEMORY_MIB);
        let expected_mib = i128::from(begun_mib) + moved_mib;
        // A kernel keeps books of 16 MiB for each GiB that it is given.
        let seen = wait_for(WITHIN, "the guest's kernel", || {
            let seen_mib = total_mib(shell).ok()?;
            (expected_mib - 16..=expected_mib)
                .contains(&i128::from(seen_mib))
                .then_some(seen_mib)
        });
        let seen_mib = seen.or_else(|_| total_mib(shell))?;
        report.check(
            "memory, says the guest's kernel",
            format!("about {expected_mib} MiB"),
            format!("{seen_mib} MiB"),
            (expected_mib - 16..=expected_mib).contains(&i128::from(seen_mib)),
        );
        if target_mib == MEMORY_MAX_MIB {
            shell.succeed(
                "yes | head -c 8388608 >/tmp/piece && mkdir -p /large && mount -t tmpfs -o size=600m large /large && \
                 for i in $(seq 64); do cat /tmp/piece; done >/large/file",
            )?;
            let spent_mib = guest.vm.memory()?.resident_bytes / MIB;
            report.check(
                "memory that it costs the host, with a file of 512 MiB in it",
                "512 MiB or more",
                spent_mib,
                spent_mib >= 512,
            );
            shell.succeed("umount /large")?;
        }
    }
    let spent_mib = guest.vm.memory()?.resident_bytes / MIB;
    report.check(
        "memory that it costs the host now",
        format!("at most {MEMORY_MIB} MiB"),
        format!("{spent_mib} MiB"),
        spent_mib <= MEMORY_MIB,
    );
    let refused = guest
        .vm
        .resize_memory(BELOW_FLOOR_MIB * MIB, ResizeOptions::default());
    let told = refused.map_or_else(|error| error.to_string(), |_| "it is accepted".to_owned());
    report.equal(
        "leaving it 96 MiB",
        "target 96 MiB is below the floor 104 MiB".to_owned(),
        told,
    );
    Ok(())
}

fn total_mib(shell: &mut GuestShell) -> Result<u64, Failed> {
    let kib: u64 = shell
        .succeed("awk '/^MemTotal:/ { print $2 }' /proc/meminfo")?
        .parse()?;
    Ok(kib / 1024)
}
