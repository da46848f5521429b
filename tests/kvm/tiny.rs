//! Guests of a few instructions, for what no stock kernel does: the least RAM, and a vCPU that cannot go on.

use std::io::Write;

use libtest_mimic::Failed;
use tempfile::NamedTempFile;
use vm_lifecycle::config::VmConfig;
use vm_lifecycle::event::EndCause;
use vm_lifecycle::state::State;
use vm_lifecycle::vm::host::{DefaultHost, KvmPlatform};
use vm_lifecycle::vm::platform::Platform;

use crate::Body;
use crate::guest::{Guest, WITHIN};
use crate::harness::artefacts::{Flavour, GuestKernel};

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![
        Body::new(
            "tiny::a_guest_with_the_least_ram_runs",
            a_guest_with_the_least_ram_runs,
        ),
        Body::new(
            "tiny::a_vcpu_that_cannot_go_on_ends_its_vm_by_name",
            a_vcpu_that_cannot_go_on,
        ),
    ]
}

/// Where the instructions are loaded and entered.
const ADDRESS: u64 = 0x10_0000;

/// An ELF image of `code`, entered in 64-bit mode with the first 4 GiB mapped to themselves.
pub fn kernel(code: &[u8]) -> Result<NamedTempFile, Failed> {
    let code_offset = 128u64;
    let code_bytes = code.len() as u64;
    let mut image = b"\x7FELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2u16, 62].map(u16::to_le_bytes).concat()); // executable, x86-64
    image.extend(1u32.to_le_bytes());
    image.extend([ADDRESS, 64, 0].map(u64::to_le_bytes).concat()); // entry, program headers, sections
    image.extend(0u32.to_le_bytes());
    image.extend([64u16, 56, 1, 0, 0, 0].map(u16::to_le_bytes).concat());
    image.extend([1u32, 5].map(u32::to_le_bytes).concat()); // load, read and execute
    let places = [code_offset, ADDRESS, ADDRESS, code_bytes, code_bytes, 0x1000];
    image.extend(places.map(u64::to_le_bytes).concat());
    image.resize(code_offset as usize, 0);
    image.extend_from_slice(code);
    let mut file = NamedTempFile::new()?;
    file.write_all(&image)?;
    Ok(file)
}

fn a_guest_with_the_least_ram_runs() -> Result<(), Failed> {
    let kernel = kernel(&[
        0x66, 0xBA, 0xF8, 0x03, // mov dx, 0x3f8: the serial port
        0xB0, b'!', 0xEE, // mov al, '!'; out dx, al
        0xB8, 0xFC, 0xFF, 0xFF, 0x03, // mov eax, 0x3fffffc: the last word of 64 MiB
        0xC7, 0x00, 0x78, 0x56, 0x34, 0x12, // mov dword [rax], 0x12345678
        0x81, 0x38, 0x78, 0x56, 0x34, 0x12, // cmp dword [rax], 0x12345678
        0x75, 0x06, // jne over what follows
        0xB0, b'=', 0xEE, // mov al, '='; out dx, al
        0xB0, b'\n', 0xEE, // mov al, '\n'; out dx, al
        0xB8, 0x00, 0x01, 0xA0, 0xFE, // mov eax, 0xfea00100: the sleep control register
        0xC6, 0x00, 0x34, // mov byte [rax], 0x34: off
        0xF4, 0xEB, 0xFD, // hlt, for ever
    ])?;
    let guest = Guest::start(VmConfig::builder("least", kernel.path()).startup_bytes(64 << 20))?;
    assert_eq!(guest.end(WITHIN)?, EndCause::GuestPowerOff);
    assert_eq!(guest.host.console(), "!=\n");
    // A stock kernel does not fit, and is told so before anything is made.
    let stock = GuestKernel::find(Flavour::Cloud)?;
    let config = VmConfig::builder("least", &stock.bzimage)
        .startup_bytes(64 << 20)
        .build()?;
    let refused = KvmPlatform::new(DefaultHost).check(&config);
    let refused = refused.expect_err("the kernel is too large").to_string();
    assert!(refused.contains("needs ram up to 0x4"), "{refused}");
    assert!(
        refused.ends_with("ram below 4 GiB ends at 0x4000000"),
        "{refused}"
    );
    Ok(())
}

fn a_vcpu_that_cannot_go_on() -> Result<(), Failed> {
    let kernel = kernel(&[
        0xB8, 0x00, 0x00, 0x00, 0xE0, // mov eax, 0xe0000000: registers, not memory
        0xFF, 0xE0, // jmp rax
    ])?;
    let guest = Guest::start(VmConfig::builder("stuck", kernel.path()).startup_bytes(64 << 20))?;
    match guest.end(WITHIN)? {
        EndCause::VcpuError { vcpu: 0, reason } => {
            assert!(reason.starts_with("kvm internal error, suberror"), "{reason}");
        }
        other => return Err(format!("the vm ended with {other:?}").into()),
    }
    assert!(guest.vm.wait_for(State::Off, WITHIN));
    Ok(())
}
