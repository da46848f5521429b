//! vCPUs that run a few real-mode instructions on this machine's KVM.

use std::sync::mpsc::{Receiver, Sender, channel};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::bus::{BusClaim, BusDevice};
use crate::machine::kvm::Kvm;
use crate::machine::memslots::{Memslot, Memslots};
use crate::memory::region::{GuestRam, RAM_MIN_BYTES, RamOptions};

#[derive(Debug, PartialEq)]
enum Heard {
    Parked(u32),
    Exited(u32, VcpuExitReason),
    Write(u64, Vec<u8>),
}

struct Ear(Mutex<Sender<Heard>>);

impl Ear {
    fn hear(&self, heard: Heard) {
        let sender = self.0.lock().expect("no panic while locked");
        // The receiver may be gone when a test ends with its vCPU running.
        let _ = sender.send(heard);
    }
}

impl VcpuListener for Ear {
    fn started(&self, _vcpu: u32) {}

    fn parked(&self, vcpu: u32) {
        self.hear(Heard::Parked(vcpu));
    }

    fn exited(&self, vcpu: u32, reason: VcpuExitReason) {
        self.hear(Heard::Exited(vcpu, reason));
    }
}

impl BusDevice for Ear {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0x40 + offset as u8);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.hear(Heard::Write(offset, data.to_vec()));
    }
}

/// A machine with code at 0x1000, a device on ports 0x100–0x10F and one at 0xD000_0000.
struct Machine {
    vcpus: Vec<Vcpu>,
    heard: Receiver<Heard>,
    ram: GuestRam,
    _slots: Vec<Memslot>,
    _claims: [BusClaim; 2],
}

const CODE: u64 = 0x1000;

fn machine(count: u32, code: &[u8]) -> Machine {
    let kvm = Kvm::open().expect("this test needs /dev/kvm");
    let vm = kvm.create_vm().expect("kvm makes vms");
    let ram = GuestRam::new(RAM_MIN_BYTES, RamOptions::default(), 36).expect("64 MiB are there");
    let slots = Memslots::new(vm.clone(), kvm.memslot_count_max());
    let slots = ram.plug_in(&slots).expect("a fresh vm has memslots");
    ram.memory()
        .write_slice(code, GuestAddress(CODE))
        .expect("the code is in ram");
    let (sender, heard) = channel();
    let ear = Arc::new(Ear(Mutex::new(sender)));
    let buses = Buses {
        pio: Bus::new(),
        mmio: Bus::new(),
    };
    let claims = [
        buses.pio.claim(0x100, 0x10, ear.clone()).expect("free"),
        buses.mmio.claim(0xD000_0000, 0x10, ear.clone()).expect("free"),
    ];
    let make = |index| Vcpu::new(&vm, index, count, buses.clone(), ear.clone()).expect("kvm makes vcpus");
    let vcpus: Vec<_> = (0..count).map(make).collect();
    let machine = Machine {
        vcpus,
        heard,
        ram,
        _slots: slots,
        _claims: claims,
    };
    machine.begin_at_code();
    machine
}

impl Machine {
    /// Puts vCPU 0 at the code, in real mode with segments at 0.
    fn begin_at_code(&self) {
        let fd = self.vcpus[0].waiting_fd().expect("it waits");
        let mut sregs = fd.get_sregs().expect("kvm tells");
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        fd.set_sregs(&sregs).expect("plain real mode");
        let regs = kvm_bindings::kvm_regs {
            rip: CODE,
            rflags: 2,
            ..Default::default()
        };
        fd.set_regs(&regs).expect("plain registers");
    }

    fn hear(&self) -> Heard {
        let limit = std::time::Duration::from_secs(60);
        self.heard.recv_timeout(limit).expect("the vcpu does something")
    }
}

/// mov dx, 0x100; inc al; out dx, al; jmp to inc
const COUNTER: [u8; 8] = [0xBA, 0x00, 0x01, 0xFE, 0xC0, 0xEE, 0xEB, 0xFB];

#[test]
#[ignore = "needs /dev/kvm"]
fn accesses_reach_the_buses_element_by_element() {
    let code = [
        0xBA, 0x04, 0x01, // mov dx, 0x104
        0xB8, 0x22, 0x11, // mov ax, 0x1122
        0xEF, // out dx, ax
        0xBF, 0x00, 0x20, // mov di, 0x2000
        0xB9, 0x03, 0x00, // mov cx, 3
        0xFC, // cld
        0xF3, 0x6C, // rep insb
        0xEF, // out dx, ax
        0xEB, 0xFE, // jmp to itself
    ];
    let machine = machine(1, &code);
    machine.vcpus[0].run();
    assert_eq!(machine.hear(), Heard::Write(4, vec![0x22, 0x11]));
    assert_eq!(machine.hear(), Heard::Write(4, vec![0x22, 0x11]));
    let mut read = [0; 4];
    machine
        .ram
        .memory()
        .read_slice(&mut read, GuestAddress(0x2000))
        .expect("in ram");
    assert_eq!(read, [0x44, 0x44, 0x44, 0]);
}

struct Panicking;

impl BusDevice for Panicking {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, _offset: u64, _data: &[u8]) {
        panic!("a device with a defect");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_device_that_panics_ends_the_vcpu_and_not_its_thread() {
    let code = [
        0xBA, 0x00, 0x02, // mov dx, 0x200
        0xEE, // out dx, al
        0xEB, 0xFE, // jmp to itself
    ];
    let machine = machine(1, &code);
    let vcpu = &machine.vcpus[0];
    let claim = vcpu.shared.buses.pio.claim(0x200, 1, Arc::new(Panicking));
    let _claim = claim.expect("the port is free");
    vcpu.run();
    assert_eq!(machine.hear(), Heard::Exited(0, VcpuExitReason::Panicked));
    vcpu.park();
    assert_eq!(machine.hear(), Heard::Parked(0));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn memory_mapped_accesses_reach_the_device() {
    let code = [
        0x66, 0x67, 0xA1, 0x02, 0x00, 0x00, 0xD0, // mov eax, [0xd0000002], with a 32-bit address
        0xBA, 0x00, 0x01, // mov dx, 0x100
        0xEE, // out dx, al
        0xEB, 0xFE, // jmp to itself
    ];
    let machine = machine(1, &code);
    {
        // A real-mode segment that reaches all of 4 GiB, as left behind by protected mode.
        let fd = machine.vcpus[0].waiting_fd().expect("it waits");
        let mut sregs = fd.get_sregs().expect("kvm tells");
        (sregs.ds.limit, sregs.ds.g) = (u32::MAX, 1);
        fd.set_sregs(&sregs).expect("plain real mode");
    }
    machine.vcpus[0].run();
    assert_eq!(machine.hear(), Heard::Write(0, vec![0x42]));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_parked_vcpu_goes_on_where_it_was() {
    let machine = machine(1, &COUNTER);
    let vcpu = &machine.vcpus[0];
    let mut expected = 1u8;
    for _ in 0..20 {
        vcpu.run();
        let mut count = 0;
        loop {
            match machine.hear() {
                Heard::Write(0, data) => {
                    assert_eq!(data, [expected], "no access is lost or repeated by a park");
                    expected = expected.wrapping_add(1);
                    count += 1;
                    if count == 3 {
                        vcpu.park();
                    }
                }
                Heard::Parked(0) => break,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(vcpu.shared.inspect(), "waiting");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn each_park_is_answered_while_the_vcpu_waits() {
    let machine = machine(2, &COUNTER);
    for vcpu in &machine.vcpus {
        vcpu.park();
        assert_eq!(machine.hear(), Heard::Parked(vcpu.index()));
        vcpu.park();
        assert_eq!(machine.hear(), Heard::Parked(vcpu.index()));
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_vcpu_that_waits_for_its_start_can_be_parked() {
    let machine = machine(2, &COUNTER);
    machine.vcpus[1].run();
    machine.vcpus[1].park();
    assert_eq!(machine.hear(), Heard::Parked(1));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_running_vcpu_is_not_saved() {
    let machine = machine(1, &COUNTER);
    machine.vcpus[0].run();
    machine.hear();
    let error = machine.vcpus[0].save().expect_err("it runs");
    assert_eq!(error.to_string(), "the host does not give the state of vcpu 0");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_vcpu_that_cannot_go_on_is_told_and_runs_again_after_a_reset() {
    // ud2 in protected mode without an interrupt table: a triple fault. A KVM that interprets guests may give up
    // before it gets there.
    let machine = machine(1, &[0x0F, 0x0B]);
    let vcpu = &machine.vcpus[0];
    let entry = BootEntry {
        protocol: boot_regs::BootProtocol::Pvh,
        address: CODE,
    };
    for _ in 0..2 {
        vcpu.enter_at(entry).expect("it waits");
        vcpu.run();
        match machine.hear() {
            Heard::Exited(0, VcpuExitReason::Shutdown | VcpuExitReason::InternalError { .. }) => {}
            other => panic!("{other:?}"),
        }
        vcpu.park();
        assert_eq!(machine.hear(), Heard::Parked(0));
        vcpu.reset();
    }
    machine
        .ram
        .memory()
        .write_slice(&COUNTER, GuestAddress(CODE))
        .expect("in ram");
    machine.begin_at_code();
    vcpu.run();
    assert_eq!(machine.hear(), Heard::Write(0, vec![1]));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_saved_vcpu_goes_on_in_another_vm() {
    let first = machine(1, &COUNTER);
    first.vcpus[0].run();
    for _ in 0..5 {
        first.hear();
    }
    first.vcpus[0].park();
    let mut written = 5u8;
    while first.hear() != Heard::Parked(0) {
        written = written.wrapping_add(1);
    }
    let section = first.vcpus[0].save().expect("it is parked");
    let second = machine(1, &COUNTER);
    second.vcpus[0].restore(&section).expect("the same host");
    let again = second.vcpus[0].save().expect("it waits");
    for field in [
        "cpuid",
        "mp_state",
        "regs",
        "sregs",
        "xsave",
        "xcrs",
        "debug_regs",
    ] {
        assert_eq!(again.body[field], section.body[field], "{field}");
    }
    second.vcpus[0].run();
    assert_eq!(second.hear(), Heard::Write(0, vec![written.wrapping_add(1)]));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_saved_state_that_cannot_be_is_refused() {
    let machine = machine(2, &COUNTER);
    let section = machine.vcpus[0].save().expect("it waits");
    let error = machine.vcpus[1]
        .restore(&section)
        .expect_err("it is that of vcpu 0");
    assert_eq!(
        error.to_string(),
        "saved cpuid is apic id Some(0): it is that of another vcpu"
    );
    let mut short = section.clone();
    short.body["regs"] = json!("00");
    let error = machine.vcpus[0].restore(&short).expect_err("too short");
    assert_eq!(
        error.to_string(),
        "saved regs is 1 bytes long: the structure has another length"
    );
    let mut alien = section;
    for entry in alien.body["cpuid"].as_array_mut().expect("a list") {
        if entry["function"] == 7 && entry["index"] == 0 {
            entry["ebx"] = json!(u32::MAX);
        }
    }
    let error = machine.vcpus[0]
        .restore(&alien)
        .expect_err("no host has every bit");
    assert!(
        error
            .to_string()
            .starts_with("saved cpuid is cpuid 0x7.0x0 ebx needs bits")
    );
}
