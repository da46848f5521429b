//! Tests of the builder and of the documents.

use std::error::Error;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::v1::DocumentV1;
use super::v2::DocumentV2;
use super::*;
use crate::ids::{Bdf, MacAddr};
use crate::memory::layout;

const GIB: u64 = 1 << 30;
const GOLDEN_V1: &[u8] = include_bytes!("../../tests/golden/v1/config.json");
const GOLDEN_V2: &[u8] = include_bytes!("../../tests/golden/v2/config.json");

fn base() -> VmConfigBuilder {
    VmConfig::builder("db", "/boot/vmlinuz")
}

/// An error with its reasons, as an application would print it.
fn message(error: &dyn Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", message(source)),
        None => error.to_string(),
    }
}

fn refused(builder: VmConfigBuilder) -> String {
    message(&builder.build().unwrap_err())
}

/// The configuration that the golden documents hold, as far as `version` can express it.
fn golden(version: ConfigVersion) -> VmConfig {
    let mut builder = VmConfig::builder("Datenbank \"süd\"", "/boot/vmlinuz-6.1.0")
        .id(serde_json::from_value(json!("7f1c2a3e-8b4d-4c5e-9f60-112233445566")).unwrap())
        .version(version)
        .initrd("/boot/initrd.img-6.1.0")
        .cmdline("root=/dev/vda console=ttyS0")
        .cpus(2)
        .startup_bytes(GIB)
        .disk(DiskSpec::new("root", "/var/lib/vm/root.img"))
        .disk(DiskSpec::new("install", "/srv/install.img").read_only(true))
        .nic(NicSpec::new("LAN", "tap0").queue_pairs(2))
        .nic(
            NicSpec::new("büro", "tap1")
                .link_up(false)
                .bdf("0001:00:01.0".parse().unwrap()),
        );
    if version >= ConfigVersion::V2_0 {
        builder = builder.maximum_bytes(4 * GIB).huge_pages(true);
    }
    builder.build().unwrap()
}

#[test]
fn old_documents_are_read_and_written_as_they_were() {
    for (version, bytes) in [(ConfigVersion::V1_0, GOLDEN_V1), (ConfigVersion::V2_0, GOLDEN_V2)] {
        let expected = golden(version);
        assert_eq!(read(bytes).unwrap(), expected, "version {version}");
        let written = String::from_utf8(write(&expected)).unwrap();
        assert_eq!(written, String::from_utf8_lossy(bytes), "version {version}");
    }
}

#[test]
fn the_limits_are_those_of_the_machine() {
    assert_eq!(CMDLINE_MAX_BYTES + 1, layout::CMDLINE_MAX_BYTES);
}

#[test]
fn a_vm_about_which_little_is_said_gets_the_defaults() {
    let config = base()
        .disk(DiskSpec::new("root", "/root.img"))
        .nic(NicSpec::new("LAN", "tap0"))
        .build()
        .unwrap();
    assert_eq!(config.version(), ConfigVersion::newest());
    assert_eq!(config.cpu_count(), 1);
    assert_eq!(config.memory().startup_bytes, config.memory().maximum_bytes);
    assert_eq!(config.boot().cmdline, "");
    let (disk, nic) = (&config.disks()[0], &config.nics()[0]);
    assert_eq!(disk.bdf.to_string(), "0000:00:08.0");
    assert_eq!(nic.bdf.to_string(), "0000:00:09.0");
    assert_eq!(nic.mac, MacAddr::derived(config.id(), &nic.name));
    assert_eq!(nic.acpi_index, Some(1));
    assert!(!disk.read_only && nic.link_up);
    assert_ne!(config.id(), base().build().unwrap().id(), "identities are new");
}

#[test]
fn a_given_address_is_not_taken_by_an_earlier_device() {
    let first_slot: Bdf = "0000:00:08.0".parse().unwrap();
    let config = base()
        .disk(DiskSpec::new("a", "/a.img"))
        .nic(NicSpec::new("LAN", "tap0").bdf(first_slot))
        .build()
        .unwrap();
    assert_eq!(config.nics()[0].bdf, first_slot);
    assert_eq!(config.disks()[0].bdf.to_string(), "0000:00:09.0");
}

#[test]
fn impossible_vms_are_refused_with_name_and_limit() {
    let long = "x".repeat(CMDLINE_MAX_BYTES + 1);
    assert_eq!(refused(VmConfig::builder("", "/k")), "vm name is empty");
    assert_eq!(
        refused(base().cpus(0)),
        "0 vcpus are asked for, from 1 to 64 are possible"
    );
    assert_eq!(
        refused(base().cpus(65)),
        "65 vcpus are asked for, from 1 to 64 are possible"
    );
    assert_eq!(
        refused(base().cmdline(long)),
        "the kernel command line has 2048 bytes, the limit is 2047"
    );
    assert_eq!(
        refused(base().cmdline("a\nb")),
        "the kernel command line contains the control character '\\n'"
    );
    assert_eq!(
        refused(VmConfig::builder("db", "vmlinuz")),
        "kernel path \"vmlinuz\" is not absolute"
    );
    assert_eq!(
        refused(base().initrd("/a\0b")),
        "initrd path \"/a\\0b\" contains a control character"
    );
    assert_eq!(
        refused(
            base()
                .version(ConfigVersion::V1_0)
                .startup_bytes(GIB)
                .maximum_bytes(2 * GIB)
        ),
        "runtime memory above the start-up size needs configuration version 2.0, the vm has 1.0"
    );
}

#[test]
fn impossible_disks_are_refused_with_their_name() {
    let disk = |name: &str| DiskSpec::new(name, "/x.img");
    assert_eq!(
        refused(base().disk(disk("a")).disk(disk("a"))),
        "two disks are called a"
    );
    assert_eq!(
        refused(base().disk(DiskSpec::new("a", "/".repeat(4096)))),
        format!("disk a path {:?} is longer than 4095 bytes", "/".repeat(4096))
    );
    let many = (0..118).fold(base(), |builder, n| builder.disk(disk(&format!("d{n}"))));
    assert_eq!(
        refused(many),
        "no pci slot is left for disk d117, all 117 are taken"
    );
}

#[test]
fn impossible_network_cards_are_refused_with_their_name() {
    let nic = |name: &str, tap: &str| NicSpec::new(name, tap);
    assert_eq!(
        refused(base().nic(nic("LAN", "tap0")).nic(nic("LAN", "tap1"))),
        "two network cards are called LAN"
    );
    assert_eq!(
        refused(base().nic(nic("a", "tap0")).nic(nic("b", "tap0"))),
        "network cards a and b use the same tap \"tap0\""
    );
    let mac: MacAddr = "52:54:00:12:34:56".parse().unwrap();
    assert_eq!(
        refused(
            base()
                .nic(nic("a", "tap0").mac(mac))
                .nic(nic("b", "tap1").mac(mac))
        ),
        "network cards a and b have the same mac address 52:54:00:12:34:56"
    );
    for count in [0, 17] {
        assert_eq!(
            refused(base().nic(nic("a", "tap0").queue_pairs(count))),
            format!("network card a asks for {count} queue pairs, from 1 to 16 are possible")
        );
    }
    for (tap, reason) in [
        ("", "it is empty"),
        ("sixteen-bytes-xx", "it is longer than 15 bytes"),
        ("..", "it is a directory"),
        ("a/b", "it holds whitespace, a control character, '/', ':' or '%'"),
        (
            "tap%d",
            "it holds whitespace, a control character, '/', ':' or '%'",
        ),
    ] {
        assert_eq!(
            refused(base().nic(nic("a", tap))),
            format!("tap {tap:?} of network card a cannot be an interface: {reason}")
        );
    }
}

/// The golden document of version 2.0 with one place changed.
fn edited(edit: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut document = serde_json::from_slice(GOLDEN_V2).unwrap();
    edit(&mut document);
    serde_json::to_vec(&document).unwrap()
}

fn refused_document(bytes: &[u8]) -> String {
    message(&read(bytes).unwrap_err())
}

#[test]
fn the_version_is_looked_at_before_the_rest() {
    let newer =
        edited(|document| *document = json!({"format": "vm-lifecycle config", "version": "3.0", "x": 1}));
    assert_eq!(
        refused_document(&newer),
        "configuration version 3.0 is newer than 2.0, the newest that this library knows"
    );
    let foreign = edited(|document| document["format"] = json!("recipe"));
    assert_eq!(
        refused_document(&foreign),
        "the document's format is \"recipe\", not \"vm-lifecycle config\""
    );
    let untold = edited(|document| document["version"] = json!(2));
    assert!(refused_document(&untold).starts_with("the document is not a vm configuration: invalid type"));
}

#[test]
fn unknown_missing_and_impossible_fields_are_loud() {
    let form = "the document does not have the form of version 2.0: ";
    let cases: [(&[u8], String); 6] = [
        (
            &edited(|document| document["nics"][0]["speed"] = json!(10)),
            format!("{form}unknown field `speed`"),
        ),
        (
            &edited(|document| drop(document["boot"].as_object_mut().unwrap().remove("initrd"))),
            format!("{form}missing field `initrd`"),
        ),
        (
            &edited(|document| document["cpus"] = json!(256)),
            format!("{form}invalid value: integer `256`"),
        ),
        (
            &edited(|document| document["nics"][0]["mac"] = json!("01:00:00:00:00:00")),
            format!("{form}mac address 01:00:00:00:00:00 is a multicast address"),
        ),
        (
            &edited(|document| document["disks"][1]["bdf"] = json!("0000:00:08.0")),
            "the document describes an impossible vm: disk install cannot be at 0000:00:08.0: disk root is there"
                .to_owned(),
        ),
        (
            &edited(|document| document["version"] = json!("1.0")),
            "the document does not have the form of version 1.0: unknown field `maximum_bytes`".to_owned(),
        ),
    ];
    for (bytes, expected) in cases {
        let message = refused_document(bytes);
        assert!(
            message.starts_with(&expected),
            "{message}\nshould begin with\n{expected}"
        );
    }
    let twice = String::from_utf8_lossy(GOLDEN_V2).replacen("\"cpus\": 2,", "\"cpus\": 2, \"cpus\": 3,", 1);
    assert!(refused_document(twice.as_bytes()).contains("duplicate field `cpus`"));
}

#[test]
fn a_step_down_names_what_it_cannot_express() {
    let document: DocumentV2 = serde_json::from_slice(GOLDEN_V2).unwrap();
    assert_eq!(
        DocumentV1::try_from(document).unwrap_err().to_string(),
        "memory.maximum_bytes is 4294967296, which a document of version 1.0 cannot express"
    );
}

#[test]
fn the_largest_configuration_fits_into_a_document() {
    let path = |n: usize| format!("/{}{n:03}", "\"".repeat(PATH_MAX_BYTES - 4));
    let name = |n: usize| format!("{}{n:03}", "\"".repeat(61));
    let mut builder = VmConfig::builder("\"".repeat(100), path(0))
        .initrd(path(1))
        .cmdline("\"".repeat(CMDLINE_MAX_BYTES));
    for n in 0..117 {
        builder = builder.disk(DiskSpec::new(format!("disk-with-a-name-{n:03}"), path(n)));
    }
    let disks = builder.build().unwrap();
    assert_eq!(read(&write(&disks)).unwrap(), disks);
    let nics = (0..NICS_MAX).fold(base(), |builder, n| {
        builder.nic(NicSpec::new(name(n), format!("tap{n}")))
    });
    let nics = nics.build().unwrap();
    assert_eq!(read(&write(&nics)).unwrap(), nics);
}

prop_compose! {
    fn any_config()(
        version in prop::sample::select(ConfigVersion::SUPPORTED.to_vec()),
        name in "[^\\p{Cc}]{1,25}",
        cmdline in "[^\\p{Cc}]{0,200}",
        initrd in prop::option::of("/[^\\p{Cc}]{0,50}"),
        cpus in 1..=CPUS_MAX,
        startup in 32u64..1000,
        growth in 0u64..64,
        (huge_pages, overcommit, deflate_on_oom) in any::<(bool, bool, bool)>(),
        (minimum, assigned) in (any::<bool>(), 0u64..=100),
        disks in prop::collection::vec(("/[^\\p{Cc}]{0,50}", any::<bool>()), 0..8),
        nics in prop::collection::vec(("[^\\p{Cc}]{0,15}", 1..=QUEUE_PAIRS_MAX, any::<bool>()), 0..8),
    ) -> VmConfig {
        let startup_bytes = startup * HUGE_PAGE_BYTES;
        let growth = if version >= ConfigVersion::V2_0 { growth } else { 0 };
        let mut builder = VmConfig::builder(name, "/boot/vmlinuz")
            .version(version)
            .cmdline(cmdline)
            .cpus(cpus.into())
            .startup_bytes(startup_bytes)
            .maximum_bytes(startup_bytes + growth * RUNTIME_MEMORY_STEP_BYTES)
            .huge_pages(huge_pages)
            .overcommit(overcommit)
            .deflate_on_oom(deflate_on_oom);
        if minimum {
            builder = builder.minimum_bytes(startup_bytes);
        }
        // From the start-up size, below which a minimum may be, to the maximum.
        builder = builder.assigned_bytes(startup_bytes + growth * RUNTIME_MEMORY_STEP_BYTES * assigned / 100);
        if let Some(initrd) = initrd {
            builder = builder.initrd(initrd);
        }
        for (n, (path, read_only)) in disks.into_iter().enumerate() {
            builder = builder.disk(DiskSpec::new(format!("disk{n}"), path).read_only(read_only));
        }
        for (n, (name, queue_pairs, link_up)) in nics.into_iter().enumerate() {
            let nic = NicSpec::new(format!("{n}{name}"), format!("tap{n}"));
            builder = builder.nic(nic.queue_pairs(queue_pairs).link_up(link_up));
        }
        builder.build().unwrap()
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(config in any_config()) {
        let bytes = write(&config);
        prop_assert_eq!(write(&read(&bytes).unwrap()), bytes.clone());
        prop_assert_eq!(read(&bytes).unwrap(), config);
    }

    #[test]
    fn a_step_up_and_down_again_loses_nothing(config in any_config()) {
        if config.version() == ConfigVersion::V1_0 {
            let document: DocumentV1 = serde_json::from_slice(&write(&config)).unwrap();
            prop_assert_eq!(DocumentV1::try_from(DocumentV2::from(document.clone())), Ok(document));
        }
    }

    #[test]
    fn hostile_documents_give_an_error_or_a_valid_vm(
        is_v1 in any::<bool>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
        is_cut in any::<bool>(),
    ) {
        let mut bytes = if is_v1 { GOLDEN_V1 } else { GOLDEN_V2 }.to_vec();
        for (index, byte) in edits {
            let index = index.index(bytes.len());
            bytes[index] = byte;
        }
        if is_cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(config) = read(&bytes) {
            prop_assert_eq!(read(&write(&config)).unwrap(), config);
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = read(&bytes);
    }
}

#[test]
fn deep_nesting_is_an_error_and_not_a_stack_overflow() {
    let mut bytes = br#"{"format":"vm-lifecycle config","version":"2.0","x":"#.to_vec();
    bytes.extend(std::iter::repeat_n(b'[', 500_000));
    let message = refused_document(&bytes);
    assert!(
        message.starts_with("the document is not a vm configuration: EOF"),
        "{message}"
    );
}
