//! Code of the embedder's that a VM calls and that does what it should not: the VM ends by name, this process lives on.

use std::io::{self, Write};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use libtest_mimic::Failed;
use serde_json::Value;
use vm_lifecycle::config::{DiskConfig, DiskSpec, VmConfig};
use vm_lifecycle::event::{EndCause, EventKind};
use vm_lifecycle::state::State;
use vm_lifecycle::storage::{
    DiskBackend, DiskCompletion, DiskFull, DiskProperties, DiskRequest, MemoryDisk, OpenError,
};
use vm_lifecycle::vm::Vm;
use vm_lifecycle::vm::host::{HostDevices, KvmPlatform};

use crate::Body;
use crate::guest::{BOOT_WITHIN, WITHIN, done, small};

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![
        Body::new(
            "embedder::a_disk_that_panics_ends_its_vm_by_name",
            a_disk_that_panics_ends_its_vm,
        ),
        Body::new(
            "embedder::the_last_handle_may_go_while_the_guest_calls",
            the_last_handle_may_go,
        ),
    ]
}

/// A disk that panics at the guest's first request, unless it is told not to.
struct FaultyDisk {
    disk: MemoryDisk,
    panics: Arc<AtomicBool>,
}

impl DiskBackend for FaultyDisk {
    fn properties(&self) -> DiskProperties {
        self.disk.properties()
    }

    fn submit(&mut self, request: DiskRequest) -> Result<(), DiskFull> {
        assert!(
            !self.panics.load(Ordering::SeqCst),
            "the disk panics, as the test wants"
        );
        self.disk.submit(request)
    }

    fn start(&mut self) {
        self.disk.start();
    }

    fn completion_fd(&self) -> RawFd {
        self.disk.completion_fd()
    }

    fn drain(&mut self, completions: &mut Vec<DiskCompletion>) {
        self.disk.drain(completions);
    }

    fn in_flight_count(&self) -> usize {
        self.disk.in_flight_count()
    }

    fn inspect(&self) -> Value {
        self.disk.inspect()
    }
}

struct FaultyHost(Arc<AtomicBool>);

impl HostDevices for FaultyHost {
    fn disk(&self, _disk: &DiskConfig) -> Result<Box<dyn DiskBackend>, OpenError> {
        Ok(Box::new(FaultyDisk {
            disk: MemoryDisk::new(2048).expect("the host has eventfds"),
            panics: self.0.clone(),
        }))
    }
}

fn a_disk_that_panics_ends_its_vm() -> Result<(), Failed> {
    let panics = Arc::new(AtomicBool::new(true));
    let config = small("panics")?.disk(DiskSpec::new("data", "/nowhere")).build()?;
    let vm = Vm::new(config, Arc::new(KvmPlatform::new(FaultyHost(panics.clone()))))?;
    let events = vm.events();
    let mut told = std::iter::from_fn(|| events.next(BOOT_WITHIN));
    done(vm.start())?;
    // The kernel looks for partitions as soon as it has the disk.
    let cause = told.find_map(|event| match event.kind {
        EventKind::Ended { cause } => Some(cause),
        _ => None,
    });
    let reason = "the disk panics, as the test wants".to_string();
    assert_eq!(cause, Some(EndCause::DeviceError { reason }));
    assert!(vm.wait_for(State::Off, WITHIN), "the vm is {}", vm.state());
    // The VM is none the worse for it.
    panics.store(false, Ordering::SeqCst);
    done(vm.start())?;
    let ready = |kind: &EventKind| matches!(kind, EventKind::DriverReady { unit, ready: true } if unit.as_str().contains("data"));
    assert!(
        told.any(|event| ready(&event.kind)),
        "the guest did not take its disk"
    );
    done(vm.power_off())
}

/// Keeps a handle of its VM until the guest writes on the serial port.
#[derive(Clone, Default)]
struct Keeper(Arc<Mutex<Option<Vm>>>);

impl Write for Keeper {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let vm = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(vm);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl HostDevices for Keeper {
    fn serial_output(&self, _vm: &VmConfig) -> io::Result<Box<dyn Write + Send>> {
        Ok(Box::new(self.clone()))
    }
}

fn the_last_handle_may_go() -> Result<(), Failed> {
    let keeper = Keeper::default();
    let vm = Vm::new(
        small("handle")?.build()?,
        Arc::new(KvmPlatform::new(keeper.clone())),
    )?;
    let events = vm.events();
    let starting = vm.start()?;
    *keeper.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(vm);
    let told: Vec<_> = std::iter::from_fn(|| events.next(BOOT_WITHIN)).collect();
    let ended = told.iter().find_map(|event| match &event.kind {
        EventKind::Ended { cause } => Some(cause),
        _ => None,
    });
    assert_eq!(ended, Some(&EndCause::HostPowerOff));
    assert!(events.is_closed(), "something of the vm is left");
    drop(starting);
    Ok(())
}
