//! Tests of what a network card is given when it enters a configuration, and of changing the cards of a VM.

use super::*;
use crate::config::{ConfigVersion, DiskSpec, VmConfigBuilder, read, write};
use crate::ids::{Bdf, MacAddr, NicName};

fn base() -> VmConfigBuilder {
    VmConfig::builder("db", "/boot/vmlinuz")
}

fn nic(n: usize) -> NicSpec {
    NicSpec::new(format!("card {n}"), format!("tap{n}"))
}

fn name(text: &str) -> NicName {
    NicName::new(text).unwrap()
}

fn indices(config: &VmConfig) -> Vec<Option<u16>> {
    config.nics().iter().map(|nic| nic.acpi_index).collect()
}

#[test]
fn acpi_indices_are_the_lowest_that_nobody_asks_for() {
    let config = base()
        .nic(nic(0))
        .nic(nic(1).acpi_index(1))
        .nic(nic(2))
        .nic(nic(3).acpi_index(ACPI_INDEX_MAX))
        .build()
        .unwrap();
    assert_eq!(indices(&config), [Some(2), Some(1), Some(3), Some(16383)]);
    let config = config.without_nic(&name("card 0")).unwrap();
    let config = config.with_nic(nic(4)).unwrap();
    assert_eq!(indices(&config), [Some(1), Some(3), Some(16383), Some(2)]);
}

#[test]
fn impossible_acpi_indices_are_refused_by_name() {
    let refused = |builder: VmConfigBuilder| builder.build().unwrap_err().to_string();
    for index in [0, 16384] {
        assert_eq!(
            refused(base().nic(nic(0).acpi_index(index))),
            format!("network card card 0 asks for acpi index {index}, from 1 to 16383 are possible")
        );
    }
    assert_eq!(
        refused(base().nic(nic(0).acpi_index(7)).nic(nic(1).acpi_index(7))),
        "network cards card 0 and card 1 have the same acpi index 7"
    );
    let old = base().version(ConfigVersion::V1_0);
    assert_eq!(
        refused(old.clone().nic(nic(0).acpi_index(7))),
        "the network card's name in the guest needs configuration version 2.0, the vm has 1.0"
    );
    assert_eq!(indices(&old.nic(nic(0)).build().unwrap()), [None]);
}

#[test]
fn a_vm_has_at_most_64_cards() {
    let full = (0..64).fold(base(), |builder, n| builder.nic(nic(n)));
    let refusal = "network card card 64 is one too many: a vm can have 64";
    let error = full.clone().nic(nic(64)).build().unwrap_err();
    assert_eq!(error.to_string(), refusal);
    let full = full.build().unwrap();
    assert_eq!(full.nics()[63].bdf.to_string(), "0002:00:09.0");
    assert_eq!(full.with_nic(nic(64)).unwrap_err().to_string(), refusal);
    let free = full.without_nic(&name("card 40")).unwrap();
    let again = free.with_nic(nic(64)).unwrap();
    assert_eq!(again.nics()[63].bdf, full.nics()[40].bdf);
}

#[test]
fn an_added_card_is_checked_against_the_whole_vm() {
    let config = base()
        .disk(DiskSpec::new("root", "/root.img"))
        .nic(nic(0))
        .build()
        .unwrap();
    let added = config.with_nic(nic(1)).unwrap();
    assert_eq!(config.nics().len(), 1, "the old configuration is as it was");
    let card = added.nic(&name("card 1")).unwrap();
    assert_eq!(card.bdf.to_string(), "0000:00:0a.0");
    assert_eq!(card.mac, MacAddr::derived(config.id(), &card.name));
    assert_eq!(read(&write(&added)).unwrap(), added);
    let root: Bdf = "0000:00:08.0".parse().unwrap();
    for (spec, refusal) in [
        (
            NicSpec::new("card 0", "tap1"),
            "two network cards are called card 0",
        ),
        (NicSpec::new("", "tap1"), "network card name is empty"),
        (
            nic(1).mac(config.nics()[0].mac),
            "network cards card 0 and card 1 have the same mac address",
        ),
        (
            NicSpec::new("card 1", "tap0"),
            "network cards card 0 and card 1 use the same tap",
        ),
        (
            nic(1).bdf(root),
            "network card card 1 cannot be at 0000:00:08.0: disk root is there",
        ),
        (
            nic(1).acpi_index(1),
            "network cards card 0 and card 1 have the same acpi index 1",
        ),
    ] {
        let error = config.with_nic(spec).unwrap_err().to_string();
        assert!(
            error.starts_with(refusal),
            "{error}\nshould begin with\n{refusal}"
        );
    }
}

#[test]
fn a_renamed_card_stays_the_same_card() {
    let config = base().nic(nic(0)).nic(nic(1)).build().unwrap();
    let renamed = config.renamed_nic(&name("card 0"), &name("büro 🖧")).unwrap();
    let (before, after) = (&config.nics()[0], &renamed.nics()[0]);
    assert_eq!(after.name.as_str(), "büro 🖧");
    assert_eq!(after.unit_name(), before.unit_name());
    assert_eq!(
        (after.mac, after.bdf, after.acpi_index),
        (before.mac, before.bdf, before.acpi_index)
    );
    assert_eq!(renamed.nics()[1], config.nics()[1]);
    assert_eq!(renamed.renamed_nic(&after.name, &after.name), Ok(renamed.clone()));
    assert_eq!(
        config
            .renamed_nic(&name("card 0"), &name("card 1"))
            .unwrap_err()
            .to_string(),
        "two network cards are called card 1"
    );
    // The old name is free again, and a card that takes it gets an address of its own.
    let third = renamed.with_nic(NicSpec::new("card 0", "tap2")).unwrap();
    assert_eq!(third.nics()[2].mac, before.mac.next_local());
}

#[test]
fn links_change_and_unknown_cards_are_named() {
    let config = base().nic(nic(0)).build().unwrap();
    let down = config.with_nic_link(&name("card 0"), false).unwrap();
    assert!(!down.nics()[0].link_up);
    assert_eq!(down.with_nic_link(&name("card 0"), true), Ok(config.clone()));
    let nobody = name("WAN");
    for refused in [
        config.with_nic_link(&nobody, true),
        config.without_nic(&nobody),
        config.renamed_nic(&nobody, &name("LAN")),
    ] {
        assert_eq!(refused.unwrap_err().to_string(), "the vm has no network card WAN");
    }
    assert_eq!(config.without_nic(&name("card 0")).unwrap().nics(), []);
}
