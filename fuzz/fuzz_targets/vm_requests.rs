//! Sequences of requests and of what a guest and a host do, against the supervisor over a machine without a guest.
//!
//! Every accepted operation ends, in one final event; power-off ends in Off; nothing outlives the last handle.
#![no_main]
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vm_lifecycle::config::VmConfig;
use vm_lifecycle::event::{EndCause, EventKind, EventStream};
use vm_lifecycle::state::State;
use vm_lifecycle::unit::PowerRequest;
use vm_lifecycle::vm::Vm;
use vm_lifecycle::vm::fake::FakePlatform;
use vm_lifecycle::vm::operation::Operation;

/// So few that the stream of events does not overflow.
const STEPS_MAX: usize = 50;
/// Only a finding waits for it.
const SOON: Duration = Duration::from_secs(20);
const GUEST_REQUESTS: [PowerRequest; 3] = [
    PowerRequest::PowerOff,
    PowerRequest::Reset,
    PowerRequest::Panicked,
];

#[derive(Debug, Arbitrary)]
enum Step {
    Start,
    Pause,
    Resume,
    Reset,
    /// Within so many milliseconds, or for ever.
    ShutDown(Option<u8>),
    PowerOff,
    /// Waits for the latest operation, unless it waits for the guest.
    Wait,
    /// The guest asks for one of what it can ask for.
    Guest(u8),
    TripleFault,
    /// To build, to reset.
    Refuse(bool, bool),
    ObeyButton(bool),
    Ask,
}

struct Played {
    vm: Vm,
    platform: FakePlatform,
    operations: Vec<Operation>,
}

impl Played {
    fn step(&mut self, step: &Step) {
        let control = self.platform.control();
        let vm = &self.vm;
        let request = match step {
            Step::Start => vm.start(),
            Step::Pause => vm.pause(),
            Step::Resume => vm.resume(),
            Step::Reset => vm.reset(),
            Step::ShutDown(within_ms) => {
                let within = within_ms.map_or(Duration::MAX, |ms| Duration::from_millis(u64::from(ms % 4)));
                vm.shut_down(within)
            }
            Step::PowerOff => vm.power_off(),
            Step::Wait => {
                let running = |operation: &&Operation| operation.kind().as_str() != "shut-down";
                if let Some(operation) = self.operations.last().filter(running) {
                    assert!(operation.wait(SOON).is_some(), "{operation:?} has no outcome");
                }
                return;
            }
            Step::Guest(number) => {
                return control.guest(GUEST_REQUESTS[usize::from(*number) % GUEST_REQUESTS.len()]);
            }
            Step::TripleFault => return control.vcpu_ended(EndCause::TripleFault),
            Step::Refuse(build, reset) => return control.refuse(*build, *reset),
            Step::ObeyButton(obeys) => return control.obey_button(*obeys),
            Step::Ask => {
                vm.status().expect("the supervisor lives");
                vm.inspect().expect("the supervisor lives");
                return;
            }
        };
        self.operations.extend(request.ok());
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let platform = FakePlatform::default();
    let config = VmConfig::builder("fuzz", "/kernel").cpus(3).build();
    let config = config.expect("the configuration is valid");
    let vm = Vm::new(config, Arc::new(platform.clone())).expect("the fake refuses nothing");
    let events = vm.events();
    let mut played = Played {
        vm,
        platform,
        operations: Vec::new(),
    };
    steps.iter().take(STEPS_MAX).for_each(|step| played.step(step));
    let Played {
        vm,
        platform,
        mut operations,
    } = played;
    operations.extend(vm.power_off().ok());
    assert!(vm.wait_for(State::Off, SOON), "{}", vm.state());
    for operation in &operations {
        assert!(operation.wait(SOON).is_some(), "{operation:?} has no outcome");
    }
    drop(vm);
    assert_eq!(platform.control().alive_count(), 0);
    check(&events);
});

/// Numbers have no gap and operations end exactly once.
fn check(events: &EventStream) {
    let (mut last, mut open) = (0, BTreeSet::new());
    while let Some(event) = events.next(SOON) {
        assert_eq!(event.number, last + 1);
        last = event.number;
        match event.kind {
            EventKind::OperationBegan { id, .. } => assert!(open.insert(id)),
            EventKind::OperationEnded { id, .. } => assert!(open.remove(&id)),
            _ => {}
        }
    }
    assert!(open.is_empty(), "{open:?} have no final event");
}
