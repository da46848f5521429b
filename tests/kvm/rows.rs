//! The rows of the lifecycle's table, walked by a real VM: every move that a user, a guest or a missing kernel can
//! cause, and no other. What saving and lost storage cause is in the table's own tests (`src/vm/transition.rs`).

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use libtest_mimic::Failed;
use vm_lifecycle::config::VmConfig;
use vm_lifecycle::event::{EndCause, EventKind};
use vm_lifecycle::state::State;
use vm_lifecycle::vm::Vm;

use crate::Body;
use crate::guest::{Guest, WITHIN, done};
use crate::tiny::kernel;

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![Body::new(
        "rows::a_real_vm_walks_every_row",
        a_real_vm_walks_every_row,
    )]
}

/// The moves of the table (`docs/state-machine.md`) that need neither saving nor lost storage, nor a pause that takes its
/// time (`hung_disk`). Resuming has one way out: the supervisor does it in one turn.
const MOVES: [(State, State); 11] = [
    (State::Off, State::Starting),
    (State::Starting, State::Off),
    (State::Starting, State::Running),
    (State::Starting, State::Stopping),
    (State::Running, State::Pausing),
    (State::Running, State::Stopping),
    (State::Pausing, State::Paused),
    (State::Paused, State::Resuming),
    (State::Paused, State::Stopping),
    (State::Resuming, State::Running),
    (State::Stopping, State::Off),
];

/// How often the VM goes through everything until each move was seen: cutting the power may meet a start that is
/// complete.
const ROUNDS_MAX: usize = 60;

/// hlt, for ever.
const IDLE: &[u8] = &[0xF4, 0xEB, 0xFD];
/// mov eax, 0xfea00100, the sleep control register; mov byte [rax], 0x34, off; hlt, for ever.
const OFF: &[u8] = &[0xB8, 0x00, 0x01, 0xA0, 0xFE, 0xC6, 0x00, 0x34, 0xF4, 0xEB, 0xFD];

fn a_real_vm_walks_every_row() -> Result<(), Failed> {
    let kernel_file = kernel(IDLE)?;
    let vm_config = VmConfig::builder("rows", kernel_file.path()).startup_bytes(64 << 20);
    let guest = Guest::make(vm_config.cpus(2))?;
    let expected: BTreeSet<_> = MOVES
        .iter()
        .map(|(from, to)| (from.as_str(), to.as_str()))
        .collect();
    let mut seen = BTreeSet::new();
    for _ in 0..ROUNDS_MAX {
        walk(&guest.vm)?;
        without_a_kernel(&guest.vm, kernel_file.path())?;
        seen.extend(moves(&guest));
        if seen == expected {
            break;
        }
    }
    assert_eq!(seen, expected);
    ends_by_itself()
}

/// The moves since the last call.
fn moves(guest: &Guest) -> Vec<(&'static str, &'static str)> {
    std::iter::from_fn(|| guest.events.next(Duration::ZERO))
        .filter_map(|event| match event.kind {
            EventKind::StateChanged { from, to } => Some((from.as_str(), to.as_str())),
            _ => None,
        })
        .collect()
}

/// From Off through every state in which a VM rests, and out of every one in which it does not.
fn walk(vm: &Vm) -> Result<(), Failed> {
    refused(vm, State::Off, &["pause", "resume", "power-off"])?;
    drop(vm.start()?);
    done(vm.power_off())?;
    done(vm.start())?;
    refused(vm, State::Running, &["start", "resume"])?;
    done(vm.pause())?;
    refused(vm, State::Paused, &["start", "pause"])?;
    done(vm.resume())?;
    done(vm.power_off())?;
    done(vm.start())?;
    done(vm.pause())?;
    done(vm.power_off())
}

/// The requests that the row of `state` refuses, by the state's name.
fn refused(vm: &Vm, state: State, requests: &[&str]) -> Result<(), Failed> {
    assert_eq!(vm.state(), state);
    for request in requests {
        let answer = match *request {
            "start" => vm.start(),
            "pause" => vm.pause(),
            "resume" => vm.resume(),
            _ => vm.power_off(),
        };
        let error = answer.expect_err("the row refuses it").to_string();
        assert!(error.contains(state.as_str()), "{request}: {error}");
        assert_eq!(vm.state(), state, "{request}");
    }
    Ok(())
}

fn without_a_kernel(vm: &Vm, kernel: &std::path::Path) -> Result<(), Failed> {
    let elsewhere = kernel.with_extension("elsewhere");
    fs::rename(kernel, &elsewhere)?;
    let outcome = vm.start()?.wait(WITHIN);
    fs::rename(&elsewhere, kernel)?;
    let outcome = outcome.ok_or("the start has not ended")?;
    assert!(!outcome.is_done(), "{outcome}");
    assert_eq!(vm.state(), State::Off);
    Ok(())
}

/// A guest that is off by its own doing takes the same way as one whose power is cut.
fn ends_by_itself() -> Result<(), Failed> {
    let kernel_file = kernel(OFF)?;
    let vm_config = VmConfig::builder("rows", kernel_file.path()).startup_bytes(64 << 20);
    let guest = Guest::make(vm_config)?;
    drop(guest.vm.start()?);
    let mut seen = Vec::new();
    while seen.last() != Some(&State::Off) {
        let event = guest.events.next(WITHIN).ok_or("the guest does not end")?;
        match event.kind {
            EventKind::StateChanged { to, .. } => seen.push(to),
            EventKind::Ended { cause } => assert_eq!(cause, EndCause::GuestPowerOff),
            _ => {}
        }
    }
    let by_way_of_running = [State::Starting, State::Running, State::Stopping, State::Off];
    let at_once = [State::Starting, State::Stopping, State::Off];
    assert!(seen == by_way_of_running || seen == at_once, "{seen:?}");
    Ok(())
}
