//! The lifecycle on real guests: pause, resume, reset, shut down, and every way a guest ends.

use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use vm_lifecycle::event::{EndCause, EventKind, ResetCause};
use vm_lifecycle::state::State;
use vm_lifecycle::vm::Vm;

use crate::Body;
use crate::guest::{BOOT_WITHIN, Guest, WITHIN, done, small};
use crate::harness::artefacts::INIT_REACHED;
use crate::harness::guest_shell::GuestShell;

/// How long a paused guest is watched for a sign of life.
const WATCHED: Duration = Duration::from_millis(1500);

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![
        Body::new(
            "lifecycle::a_paused_guest_stands_still_and_its_clock_too",
            a_paused_guest_stands_still,
        ),
        Body::new(
            "lifecycle::the_power_button_shuts_a_guest_down",
            the_power_button_shuts_a_guest_down,
        ),
        Body::new(
            "lifecycle::reset_boots_again_by_host_and_by_guest",
            reset_boots_again,
        ),
        Body::new(
            "lifecycle::the_end_of_a_guest_is_told_by_its_cause",
            the_end_is_told_by_its_cause,
        ),
        Body::new(
            "lifecycle::requests_are_refused_by_state",
            requests_are_refused_by_state,
        ),
        Body::new(
            "lifecycle::power_can_be_cut_at_any_moment",
            power_can_be_cut_at_any_moment,
        ),
    ]
}

fn uptime(shell: &mut GuestShell) -> Result<f64, Failed> {
    Ok(shell.succeed("cut -d ' ' -f 1 /proc/uptime")?.parse()?)
}

fn a_paused_guest_stands_still() -> Result<(), Failed> {
    let (guest, mut shell) = Guest::boot(small("pause")?.cpus(2))?;
    shell.succeed("(while :; do echo tick; usleep 1000; done) >/dev/ttyS0 2>&1 &")?;
    guest.host.wait_for_console("tick", WITHIN)?;
    let (began, before) = (Instant::now(), uptime(&mut shell)?);
    done(guest.vm.pause())?;
    let paused = Instant::now();
    let ticks = guest.host.console().matches("tick").count();
    let more = guest.host.wait_for_ticks(ticks + 1, WATCHED);
    assert!(more.is_err(), "a paused guest went on ticking");
    let stood = paused.elapsed();
    done(guest.vm.resume())?;
    guest.host.wait_for_ticks(ticks + 50, WITHIN)?;
    let after = uptime(&mut shell)?;
    let ran = (began.elapsed() - stood).as_secs_f64();
    assert!(after >= before, "time ran backwards: {before} to {after}");
    // The guest's own clock counts hundredths of a second.
    assert!(
        after - before <= ran + 0.02,
        "{} s passed in the guest, it ran {ran} s",
        after - before
    );
    let dmesg = shell.succeed("dmesg")?;
    let complaints = [
        "rcu_sched",
        "rcu_preempt",
        "soft lockup",
        "clocksource: timekeeping watchdog",
    ];
    assert!(
        !complaints.iter().any(|complaint| dmesg.contains(complaint)),
        "{dmesg}"
    );
    Ok(())
}

fn the_power_button_shuts_a_guest_down() -> Result<(), Failed> {
    let (guest, _shell) = Guest::boot(small("button")?)?;
    done(guest.vm.shut_down(WITHIN))?;
    assert_eq!(guest.end(WITHIN)?, EndCause::GuestPowerOff);
    assert_eq!(guest.vm.state(), State::Off);
    // Off is not the end of the VM: it starts again.
    done(guest.vm.start())?;
    guest.host.shell()?;
    Ok(())
}

fn reset_boots_again() -> Result<(), Failed> {
    let (guest, mut shell) = Guest::boot(small("reset")?.cpus(2))?;
    for by_host in [true, false] {
        shell.succeed("echo nonce >/tmp/nonce")?;
        if by_host {
            done(guest.vm.reset())?;
        } else {
            shell.send("reboot -f")?;
        }
        let cause =
            std::iter::from_fn(|| guest.events.next(BOOT_WITHIN)).find_map(|event| match event.kind {
                EventKind::Reset { cause } => Some(cause),
                _ => None,
            });
        assert_eq!(
            cause,
            Some(if by_host {
                ResetCause::Host
            } else {
                ResetCause::Guest
            })
        );
        let found = shell.run_within("cat /tmp/nonce; nproc", BOOT_WITHIN)?;
        assert!(
            found.text.contains("No such file") && found.text.ends_with("2\n"),
            "{found:?}"
        );
        assert_eq!(guest.vm.state(), State::Running);
    }
    assert_eq!(guest.host.console().matches(INIT_REACHED).count(), 3);
    Ok(())
}

fn the_end_is_told_by_its_cause() -> Result<(), Failed> {
    let ends = [
        ("poweroff -f", EndCause::GuestPowerOff),
        (
            "echo triple >/sys/kernel/reboot/type; reboot -f",
            EndCause::TripleFault,
        ),
        ("echo c >/proc/sysrq-trigger", EndCause::GuestPanic),
    ];
    let (guest, mut shell) = Guest::boot(small("end")?)?;
    for (index, (command, cause)) in ends.into_iter().enumerate() {
        if index > 0 {
            done(guest.vm.start())?;
            shell = guest.host.shell()?;
        }
        shell.send(command)?;
        assert_eq!(
            guest.end(WITHIN)?,
            cause,
            "{command}; the console says:\n{}",
            guest.host.console()
        );
        guest.wait_for(State::Off)?;
    }
    Ok(())
}

fn requests_are_refused_by_state() -> Result<(), Failed> {
    let guest = Guest::make(small("refusals")?)?;
    let refused = |names: &[&str], state: &str| -> Vec<String> {
        names
            .iter()
            .map(|name| format!("cannot {name}: the vm is {state}"))
            .collect()
    };
    let answers = [
        guest.vm.pause(),
        guest.vm.resume(),
        guest.vm.shut_down(WITHIN),
        guest.vm.power_off(),
    ];
    let errors: Vec<_> = answers
        .into_iter()
        .filter_map(|a| a.err().map(|e| e.to_string()))
        .collect();
    assert_eq!(
        errors,
        refused(&["pause", "resume", "shut-down", "power-off"], "off")
    );
    done(guest.vm.start())?;
    done(guest.vm.pause())?;
    let errors: Vec<_> = [guest.vm.start(), guest.vm.pause(), guest.vm.shut_down(WITHIN)]
        .into_iter()
        .filter_map(|answer| answer.err().map(|error| error.to_string()))
        .collect();
    assert_eq!(errors, refused(&["start", "pause", "shut-down"], "paused"));
    done(guest.vm.resume())?;
    let errors: Vec<_> = [guest.vm.start(), guest.vm.resume()]
        .into_iter()
        .filter_map(|answer| answer.err().map(|error| error.to_string()))
        .collect();
    assert_eq!(errors, refused(&["start", "resume"], "running"));
    done(guest.vm.power_off())?;
    assert_eq!(guest.end(WITHIN)?, EndCause::HostPowerOff);
    Ok(())
}

/// Brings a VM that is off into the moment in which its power is cut.
struct Moment(fn(&Vm) -> Result<(), Failed>);

fn power_can_be_cut_at_any_moment() -> Result<(), Failed> {
    let guest = Guest::make(small("cut")?.cpus(2))?;
    // While it is being built, while it boots, while it is being paused, while it is paused, while it is being reset.
    let moments = [
        Moment(|vm| {
            let _ = vm.start()?;
            Ok(())
        }),
        Moment(|vm| done(vm.start())),
        Moment(|vm| {
            done(vm.start())?;
            let _ = vm.pause()?;
            Ok(())
        }),
        Moment(|vm| {
            done(vm.start())?;
            done(vm.pause())
        }),
        Moment(|vm| {
            done(vm.start())?;
            let _ = vm.reset()?;
            Ok(())
        }),
    ];
    for moment in moments {
        (moment.0)(&guest.vm)?;
        done(guest.vm.power_off())?;
        assert_eq!(guest.end(WITHIN)?, EndCause::HostPowerOff);
        assert_eq!(guest.vm.state(), State::Off);
    }
    Ok(())
}
