//! What every other trial takes for granted of the host.

use kvm_ioctls::Kvm;
use libtest_mimic::Failed;

use crate::Body;
use crate::harness::base64;
use crate::harness::kvm;

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![
        Body::new("basics::a_vcpu_can_be_created", a_vcpu_can_be_created),
        Body::new(
            "basics::missing_kvm_is_ignored_or_failed",
            missing_kvm_is_ignored_or_failed,
        ),
        Body::new("basics::base64_round_trip", base64_round_trip),
    ]
}

fn a_vcpu_can_be_created() -> Result<(), Failed> {
    assert_eq!(kvm::api_version()?, 12);
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    vm.create_irq_chip()?;
    let vcpu = vm.create_vcpu(0)?;
    assert_eq!(
        vcpu.get_sregs()?.cs.base,
        0xffff_0000,
        "a vCPU starts at the reset vector"
    );
    Ok(())
}

fn missing_kvm_is_ignored_or_failed() -> Result<(), Failed> {
    kvm::check_decide();
    Ok(())
}

fn base64_round_trip() -> Result<(), Failed> {
    for (plain, encoded) in [
        ("", ""),
        ("f", "Zg=="),
        ("fo", "Zm8="),
        ("foo", "Zm9v"),
        ("foob", "Zm9vYg=="),
        ("\u{fb}", "w7s="),
    ] {
        assert_eq!(base64::encode(plain.as_bytes()), encoded);
        assert_eq!(base64::decode(encoded).as_deref(), Some(plain.as_bytes()));
    }
    assert_eq!(base64::decode("A"), None);
    assert_eq!(base64::decode("A*=="), None);
    Ok(())
}
