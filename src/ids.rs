//! Names and numbers that identify things: VMs, units, disks, network cards, PCI functions, MAC addresses.
//!
//! Every type here is a checked value: once constructed it is valid. All of them parse from untrusted text
//! (configuration documents, command lines), so parsing returns a typed error that states the limit.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The identity of a VM, stable for its whole life and across hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VmId(Uuid);

impl VmId {
    /// Makes a new random identity (UUID version 4).
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    /// The 16 bytes of the identity, in RFC 9562 order.
    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why a text is not a valid identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The text is empty.
    #[error("{what} is empty")]
    Empty { what: &'static str },
    /// The text is longer than the limit.
    #[error("{what} has {length_bytes} bytes, the limit is {max_bytes}")]
    TooLong {
        what: &'static str,
        length_bytes: usize,
        max_bytes: usize,
    },
    /// The text holds a character that the identifier may not contain.
    #[error("{what} {text:?} contains the character {character:?}, which is not allowed")]
    Character {
        what: &'static str,
        text: String,
        character: char,
    },
    /// The text does not have the form of the identifier.
    #[error("{text:?} is not a {what}: {expected}")]
    Form {
        what: &'static str,
        text: String,
        expected: &'static str,
    },
    /// The MAC address cannot belong to one network card.
    #[error("mac address {mac} is {reason}")]
    MacKind { mac: MacAddr, reason: &'static str },
}

/// Defines a text identifier with a byte limit and a rule for its characters.
macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $max:expr, $allowed:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The longest allowed text, in bytes of UTF-8.
            pub const MAX_BYTES: usize = $max;

            /// Checks `text` and wraps it.
            ///
            /// # Errors
            /// [`IdError`] when the text is empty, too long or holds a character that is not allowed.
            pub fn new(text: impl Into<String>) -> Result<Self, IdError> {
                let text = text.into();
                check_text($what, &text, Self::MAX_BYTES, $allowed)?;
                Ok(Self(text))
            }

            /// The text itself.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
    };
}

text_id!(
    /// The name of a VM: 1–100 bytes of UTF-8 without control characters.
    VmName, "vm name", 100, |c| !c.is_control()
);
text_id!(
    /// The name of a network card: 1–64 bytes of UTF-8 without control characters, unique in its VM.
    NicName, "network card name", 64, |c| !c.is_control()
);
text_id!(
    /// What the device in a PCI slot is called in the guest, whatever it is: 1–64 bytes of UTF-8 without control
    /// characters (PCI Firmware 3.3 §4.6.7).
    SlotLabel, "slot label", 64, |c| !c.is_control()
);

impl From<&NicName> for SlotLabel {
    /// The rules of a card's name are those of a label.
    fn from(name: &NicName) -> Self {
        const _: () = assert!(NicName::MAX_BYTES <= SlotLabel::MAX_BYTES);
        Self(name.0.clone())
    }
}

text_id!(
    /// The name of a disk: 1–20 ASCII letters, digits, `-`, `_` or `.`; unique in its VM. It is also the serial
    /// number that the guest reads (virtio 1.2 §5.2.6: 20 bytes).
    DiskName, "disk name", 20, |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c)
);
text_id!(
    /// The name of a unit of a VM, such as `serial`, `vcpu-0` or `disk-root`; the key of its saved section.
    UnitName, "unit name", 100, |c| !c.is_control()
);
text_id!(
    /// The name of a console port as the guest sees it (virtio 1.2 §5.3.6.2): 1–64 printable ASCII characters.
    PortName, "port name", 64, |c: char| c.is_ascii_graphic()
);

fn check_text(
    what: &'static str,
    text: &str,
    max_bytes: usize,
    allowed: impl Fn(char) -> bool,
) -> Result<(), IdError> {
    if text.is_empty() {
        return Err(IdError::Empty { what });
    }
    if text.len() > max_bytes {
        return Err(IdError::TooLong {
            what,
            length_bytes: text.len(),
            max_bytes,
        });
    }
    match text.chars().find(|c| !allowed(*c)) {
        Some(character) => Err(IdError::Character {
            what,
            text: text.to_owned(),
            character,
        }),
        None => Ok(()),
    }
}

/// The number of one operation of a VM, counted from 1 in the order in which they began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct OperationId(pub u64);

impl fmt::Display for OperationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A PCI function's address: segment, slot (device number on bus 0) and function.
///
/// Every segment of a VM has exactly one bus, number 0 (`docs/memory-map.md`). Written `ssss:00:dd.f`, as Linux does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bdf {
    segment: u16,
    slot: u8,
}

impl Bdf {
    /// The number of slots on a bus (PCI Local Bus 3.0 §3.2.2.3).
    pub const SLOT_COUNT: u8 = 32;

    /// Makes the address of function 0 in `slot` (0–31) of `segment`; `None` when the slot is out of range.
    pub const fn new(segment: u16, slot: u8) -> Option<Self> {
        if slot < Self::SLOT_COUNT {
            Some(Self { segment, slot })
        } else {
            None
        }
    }

    /// The PCI segment (an independent ECAM region).
    pub const fn segment(self) -> u16 {
        self.segment
    }

    /// The slot, which PCI calls device number: 0–31.
    pub const fn slot(self) -> u8 {
        self.slot
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:00:{:02x}.0", self.segment, self.slot)
    }
}

impl FromStr for Bdf {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let error = || IdError::Form {
            what: "pci address",
            text: text.to_owned(),
            expected: "expected ssss:00:dd.0 with dd from 00 to 1f",
        };
        let (segment, rest) = text.split_once(":00:").ok_or_else(error)?;
        let slot = rest.strip_suffix(".0").ok_or_else(error)?;
        if segment.len() != 4 || slot.len() != 2 {
            return Err(error());
        }
        let segment = u16::from_str_radix(segment, 16).map_err(|_| error())?;
        let slot = u8::from_str_radix(slot, 16).map_err(|_| error())?;
        Self::new(segment, slot).ok_or_else(error)
    }
}

impl Serialize for Bdf {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Bdf {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// A network card's Ethernet address: unicast and not all zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr([u8; 6]);

impl MacAddr {
    /// Checks that `bytes` can be the address of one card.
    ///
    /// # Errors
    /// [`IdError::MacKind`] for a multicast, broadcast or all-zero address.
    pub fn new(bytes: [u8; 6]) -> Result<Self, IdError> {
        let mac = Self(bytes);
        if bytes == [0; 6] {
            return Err(IdError::MacKind {
                mac,
                reason: "all zero",
            });
        }
        if bytes[0] & 1 != 0 {
            return Err(IdError::MacKind {
                mac,
                reason: "a multicast address",
            });
        }
        Ok(mac)
    }

    /// Derives a locally administered address from the VM and the card's name: the same on every host and start.
    pub fn derived(vm: VmId, name: &NicName) -> Self {
        let uuid = Uuid::from_u128(vm.0.as_u128());
        // FNV-1a over the identity and the name: stable for ever, and good enough to spread 40 bits.
        let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
        for byte in uuid.as_bytes().iter().chain(name.as_str().as_bytes()) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        let [a, b, c, d, e, ..] = hash.to_be_bytes();
        Self([0x52, a, b, c, d, e])
    }

    /// The address after this one among the locally administered addresses that begin with 52; they go round.
    pub(crate) fn next_local(self) -> Self {
        let [_, a, b, c, d, e] = self.0;
        let number = u64::from_be_bytes([0, 0, 0, a, b, c, d, e]).wrapping_add(1);
        let [_, _, _, a, b, c, d, e] = number.to_be_bytes();
        Self([0x52, a, b, c, d, e])
    }

    /// The six bytes in transmission order.
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddr {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let error = || IdError::Form {
            what: "mac address",
            text: text.chars().take(64).collect(),
            expected: "expected six two-digit hexadecimal numbers separated by colons",
        };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(error)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(error());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() {
            return Err(error());
        }
        Self::new(bytes)
    }
}

impl TryFrom<String> for MacAddr {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> String {
        mac.to_string()
    }
}
