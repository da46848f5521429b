//! Whether a guest can really be run here.

use std::env;
use std::fs::{self, OpenOptions};
use std::os::fd::AsRawFd;

/// linux/kvm.h: `_IO(KVMIO, 0x00)`.
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
/// The only version there has been since Linux 2.6.22.
const KVM_API_VERSION: i32 = 12;

/// What the environment says about tests that need real KVM.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// Run them.
    Run,
    /// Report them as ignored; the text says why.
    Ignore(String),
    /// Fail them: they were required and cannot run; the text says why.
    Fail(String),
}

/// Decides for this process: `VM_LIFECYCLE_REQUIRE_KVM=1` makes a missing KVM a failure, and
/// `VM_LIFECYCLE_KVM_ELSEWHERE=1` leaves the tests to another run.
pub fn verdict() -> Verdict {
    let set = |name: &str| env::var_os(name).is_some_and(|value| value == "1");
    decide(
        real_kvm(),
        set("VM_LIFECYCLE_REQUIRE_KVM"),
        set("VM_LIFECYCLE_KVM_ELSEWHERE"),
    )
}

fn decide(real: Result<(), String>, required: bool, elsewhere: bool) -> Verdict {
    match (real, required, elsewhere) {
        (_, false, true) => Verdict::Ignore("another step runs the KVM tests".to_string()),
        (Ok(()), _, _) => Verdict::Run,
        (Err(why), true, _) => Verdict::Fail(why),
        (Err(why), false, false) => {
            Verdict::Ignore(format!("{why}; `cargo xtask test` runs them in an emulated host"))
        }
    }
}

/// Whether KVM runs guests with hardware support; the error says what is missing.
///
/// `/dev/kvm` alone proves nothing: a paravirtual KVM offers it and interprets guests an instruction at a time.
pub fn real_kvm() -> Result<(), String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").map_err(|error| format!("/proc/cpuinfo: {error}"))?;
    let flags = cpuinfo.lines().filter(|line| line.starts_with("flags"));
    if !flags
        .flat_map(str::split_whitespace)
        .any(|flag| flag == "vmx" || flag == "svm")
    {
        return Err("the CPU shows neither vmx nor svm".to_string());
    }
    match api_version()? {
        KVM_API_VERSION => Ok(()),
        other => Err(format!("KVM's API version is {other}, not {KVM_API_VERSION}")),
    }
}

/// What `/dev/kvm` answers to `KVM_GET_API_VERSION`.
pub fn api_version() -> Result<i32, String> {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let kvm = kvm.map_err(|error| format!("/dev/kvm: {error}"))?;
    // SAFETY: the request takes no argument and touches no memory; the descriptor is open for the length of the call.
    Ok(unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_GET_API_VERSION as _, 0) })
}

/// The tests of [`decide`], as a function because programs that include this have no libtest.
pub fn check_decide() {
    let missing = || Err("no svm".to_string());
    assert_eq!(decide(Ok(()), false, false), Verdict::Run);
    assert_eq!(decide(Ok(()), true, true), Verdict::Run);
    assert_eq!(
        decide(missing(), true, false),
        Verdict::Fail("no svm".to_string())
    );
    assert_eq!(decide(missing(), true, true), Verdict::Fail("no svm".to_string()));
    assert!(matches!(decide(missing(), false, false), Verdict::Ignore(why) if why.starts_with("no svm; ")));
    assert!(matches!(decide(Ok(()), false, true), Verdict::Ignore(_)));
}
