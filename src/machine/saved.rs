//! The frozen saved forms of the in-kernel chips and the clock, and how KVM's structures are written into them.
//!
//! KVM's structures are its ABI: their bytes mean the same on every host, so they are kept as they are, as
//! hexadecimal text of exactly the structure's length. Saved input is untrusted; what it may hold beyond its length
//! is decided by the host when it takes the structure.

use std::fmt::Write;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::unit::RestoreError;

/// The bytes of a structure; hexadecimal text when written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HexBytes(Vec<u8>);

impl HexBytes {
    /// The bytes of `value`.
    pub(super) fn of(value: &(impl IntoBytes + Immutable + ?Sized)) -> Self {
        Self(value.as_bytes().to_vec())
    }

    /// The structure that these bytes are.
    ///
    /// # Errors
    /// [`RestoreError::Value`] when they are fewer or more than the structure has.
    pub(super) fn read<T: FromBytes>(&self, field: &'static str) -> Result<T, RestoreError> {
        T::read_from_bytes(&self.0).map_err(|_| self.length_error(field))
    }

    /// The bytes as 32-bit words in the host's order.
    ///
    /// # Errors
    /// [`RestoreError::Value`] when they are not exactly `length_bytes`, which is a multiple of 4.
    pub(super) fn words(&self, field: &'static str, length_bytes: usize) -> Result<Vec<u32>, RestoreError> {
        if self.0.len() != length_bytes {
            return Err(self.length_error(field));
        }
        let words = self.0.chunks_exact(4);
        Ok(words
            .map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]]))
            .collect())
    }

    fn length_error(&self, field: &'static str) -> RestoreError {
        RestoreError::Value {
            field,
            value: format!("{} bytes long", self.0.len()),
            reason: "the structure has another length",
        }
    }
}

impl Serialize for HexBytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(self.0.len() * 2);
        for byte in &self.0 {
            write!(text, "{byte:02x}").map_err(serde::ser::Error::custom)?;
        }
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for HexBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digit = |byte: &u8| char::from(*byte).to_digit(16);
        let pair = |pair: &[u8]| match pair {
            [high, low] => Some((digit(high)? * 16 + digit(low)?) as u8),
            _ => None,
        };
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(pair).collect();
        bytes
            .map(Self)
            .ok_or_else(|| D::Error::custom("expected an even number of hexadecimal digits"))
    }
}

/// Schema 1 of `irqchip`: three `kvm_irqchip` (KVM API 4.26).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct IrqchipV1 {
    pub(super) pic_master: HexBytes,
    pub(super) pic_slave: HexBytes,
    pub(super) ioapic: HexBytes,
}

/// Schema 1 of `pit`: one `kvm_pit_state2` (KVM API 4.71).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PitV1 {
    pub(super) state: HexBytes,
}

/// Schema 1 of `clock`: the guest's nanoseconds since power-on (KVM API 4.29).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ClockV1 {
    pub(super) kvmclock_ns: u64,
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_regs;

    use super::*;
    use crate::unit::testing::same_bytes;

    #[test]
    fn a_structure_survives_and_another_length_is_refused() {
        let regs = kvm_regs {
            rip: 0x1234_5678_9ABC_DEF0,
            ..Default::default()
        };
        let text = serde_json::to_string(&HexBytes::of(&regs)).expect("text");
        let bytes: HexBytes = serde_json::from_str(&text).expect("what was written reads");
        let read = bytes.read::<kvm_regs>("regs").expect("the right length");
        assert_eq!(read.rip, regs.rip);
        let short: HexBytes = serde_json::from_str("\"00ff\"").expect("hexadecimal");
        let error = short.read::<kvm_regs>("regs").expect_err("two bytes are too few");
        assert_eq!(
            error.to_string(),
            "saved regs is 2 bytes long: the structure has another length"
        );
        assert!(short.words("xsave", 4096).is_err());
    }

    #[test]
    fn what_is_not_hexadecimal_is_refused() {
        for text in ["\"0\"", "\"zz\"", "\"ä\"", "7"] {
            assert!(serde_json::from_str::<HexBytes>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_irqchips_schema_1_reads_and_writes_these_bytes() {
        let text = r#"{"pic_master":"00ff","pic_slave":"01","ioapic":"abcdef"}"#;
        same_bytes::<IrqchipV1>(text);
    }

    #[test]
    fn the_timers_schema_1_reads_and_writes_these_bytes() {
        let text = r#"{"state":"0102"}"#;
        same_bytes::<PitV1>(text);
    }

    #[test]
    fn the_clocks_schema_1_reads_and_writes_these_bytes() {
        let text = r#"{"kvmclock_ns":18446744073709551615}"#;
        same_bytes::<ClockV1>(text);
    }
}
