//! A paused guest stands still and does not notice.

use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use vm_lifecycle::state::State;

use crate::guest::{TestHost, WITHIN, done};
use crate::harness::guest_shell::GuestShell;
use crate::report::Report;
use crate::tour::Tour;

/// How long the paused guest is watched.
const WATCHED: Duration = Duration::from_secs(2);
/// What the guest's own clock may be off by: it is told in hundredths of a second.
const CLOCK_STEP_S: f64 = 0.02;

/// Pauses the guest while it counts, watches it, and lets it go on.
pub fn run(tour: &mut Tour, report: &mut Report) -> Result<(), Failed> {
    report.say(
        "The guest writes a line on its serial port about a hundred times a second. Then the VM\n\
         is paused, watched for two seconds, and resumed.",
    );
    let (guest, shell) = tour.shell()?;
    shell.succeed("(while :; do echo tick; usleep 10000; done) >/dev/ttyS0 2>&1 & echo $! >/tmp/ticker")?;
    guest.host.wait_for_ticks(10, WITHIN)?;
    let lines: u64 = shell.succeed("dmesg | wc -l")?.parse()?;
    let (began, before_s) = (Instant::now(), uptime_s(shell)?);
    done(guest.vm.pause())?;
    report.equal("state of the VM", State::Paused, guest.vm.state());
    let (paused, count) = (Instant::now(), ticks(&guest.host));
    // In vain, if all is well; a guest that goes on is noticed at once.
    let _ = guest.host.wait_for_ticks(count + 1, WATCHED);
    let stood_s = paused.elapsed().as_secs_f64();
    report.equal("lines while it is paused", 0, ticks(&guest.host) - count);

    done(guest.vm.resume())?;
    guest.host.wait_for_ticks(count + 20, WITHIN)?;
    let more = ticks(&guest.host) - count;
    report.check("lines after it is resumed", "20 or more", more, more >= 20);
    let passed_s = uptime_s(shell)? - before_s;
    let ran_s = began.elapsed().as_secs_f64() - stood_s;
    report.check(
        "time that passed in the guest",
        format!("at most the {ran_s:.2} s that it ran, not the {stood_s:.2} s that it stood still"),
        format!("{passed_s:.2} s"),
        (0.0..=ran_s + CLOCK_STEP_S).contains(&passed_s),
    );
    shell.succeed("kill $(cat /tmp/ticker)")?;
    let complaints = shell.succeed(&format!(
        "dmesg | tail -n +{} | grep -iE 'stall|unstable|lockup' || echo none",
        lines + 1
    ))?;
    report.equal(
        "complaints of its kernel about time since then",
        "none".to_owned(),
        complaints,
    );
    Ok(())
}

fn ticks(host: &TestHost) -> usize {
    host.console().matches("tick").count()
}

fn uptime_s(shell: &mut GuestShell) -> Result<f64, Failed> {
    Ok(shell.succeed("cut -d ' ' -f 1 /proc/uptime")?.parse()?)
}
