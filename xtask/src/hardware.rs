//! Whether this machine can run KVM guests itself.
//!
//! The presence of `/dev/kvm` is the wrong question: a paravirtual KVM without hardware support offers it too and then
//! interprets guests an instruction at a time. What counts is that the CPU shows `vmx` or `svm` as well.

use std::env;
use std::fs::{self, OpenOptions};

/// Set to make this tool use the emulated test host although the machine could do without.
const FORCE_VARIABLE: &str = "VM_LIFECYCLE_FORCE_TEST_HOST";

/// How KVM guests can be run here.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Hardware {
    /// This machine's own KVM.
    Direct,
    /// A test host emulated by QEMU; the text says what this machine lacks.
    Emulated(&'static str),
}

impl Hardware {
    /// Looks at this machine.
    pub fn find() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
        if env::var_os(FORCE_VARIABLE).is_some() {
            return Hardware::Emulated("VM_LIFECYCLE_FORCE_TEST_HOST is set");
        }
        decide(shows_virtualization(&cpuinfo), kvm)
    }
}

fn decide(flags: bool, kvm: bool) -> Hardware {
    match (flags, kvm) {
        (true, true) => Hardware::Direct,
        (true, false) => Hardware::Emulated("/dev/kvm cannot be opened"),
        (false, _) => Hardware::Emulated("the CPU shows neither vmx nor svm"),
    }
}

fn shows_virtualization(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().filter(|line| line.starts_with("flags"));
    flags
        .flat_map(str::split_whitespace)
        .any(|flag| flag == "vmx" || flag == "svm")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_the_flags_and_the_device_are_needed() {
        assert_eq!(decide(true, true), Hardware::Direct);
        assert_eq!(
            decide(true, false),
            Hardware::Emulated("/dev/kvm cannot be opened")
        );
        assert_eq!(
            decide(false, true),
            Hardware::Emulated("the CPU shows neither vmx nor svm")
        );
        assert_eq!(
            decide(false, false),
            Hardware::Emulated("the CPU shows neither vmx nor svm")
        );
    }

    #[test]
    fn only_whole_flags_count() {
        assert!(shows_virtualization("model name\t: x\nflags\t\t: fpu svm sse\n"));
        assert!(shows_virtualization("flags\t\t: fpu vmx\n"));
        assert!(!shows_virtualization(
            "flags\t\t: fpu svm_lock\nvmx flags\t: vnmi\n"
        ));
        assert!(!shows_virtualization("model name\t: vmx\n"));
    }
}
