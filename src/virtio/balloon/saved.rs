//! The frozen saved form of the balloon. What is read here is untrusted: pages that are not RAM are refused.
//!
//! The guest's statistics are not part of it: the buffer they came in is in the ring still, and is read again.

use serde::{Deserialize, Serialize};

use super::device::{Balloon, PAGE_BYTES};
use super::hinting::Hinting;
use crate::unit::RestoreError;

/// The balloon as the guest saw it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BalloonV1 {
    ram_bytes: u64,
    target_bytes: u64,
    actual_pages: u32,
    poison_val: u32,
    hint_command: u32,
    last_hint_round: u32,
    driver_hint_round: Option<u32>,
    /// The pages in the balloon, in chunks of 128 MiB that have any, in order.
    pages: Vec<ChunkV1>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ChunkV1 {
    /// The chunk's guest-physical address over 128 MiB.
    number: u64,
    /// 512 words, one bit per page of 4 KiB, the first page's lowest.
    words: Vec<u64>,
}

impl BalloonV1 {
    /// The saved form of `balloon`.
    pub(super) fn new(balloon: &Balloon) -> Self {
        let Hinting {
            command,
            last_round,
            driver_round,
        } = balloon.hinting;
        let chunks = balloon.pages.chunks().map(|(number, words)| ChunkV1 {
            number,
            words: words.to_vec(),
        });
        Self {
            ram_bytes: balloon.pages.ram_count() * PAGE_BYTES,
            target_bytes: balloon.target_bytes(),
            actual_pages: balloon.actual_pages,
            poison_val: balloon.poison_val,
            hint_command: command,
            last_hint_round: last_round,
            driver_hint_round: driver_round,
            pages: chunks.collect(),
        }
    }

    /// Makes `balloon` what was saved. Nothing is discarded: the pages were never restored, or read as zeros.
    ///
    /// # Errors
    /// [`RestoreError`] when a value is impossible in this RAM.
    pub(super) fn apply(self, balloon: &mut Balloon) -> Result<(), RestoreError> {
        let Self {
            ram_bytes,
            target_bytes,
            actual_pages,
            poison_val,
            hint_command,
            last_hint_round,
            driver_hint_round,
            pages,
        } = self;
        let impossible = |field, value: u64, reason| RestoreError::Value {
            field,
            value: value.to_string(),
            reason,
        };
        if ram_bytes != balloon.pages.ram_count() * PAGE_BYTES {
            let reason = "the start-up RAM has another size";
            return Err(impossible("ram_bytes", ram_bytes, reason));
        }
        if hint_command > 1 && hint_command != last_hint_round {
            let reason = "no round has it";
            return Err(impossible("hint_command", hint_command.into(), reason));
        }
        if balloon.store_target(target_bytes).is_err() {
            let reason = "it is not a number of pages of the RAM";
            return Err(impossible("target_bytes", target_bytes, reason));
        }
        balloon.pages.clear();
        let mut before = None;
        for ChunkV1 { number, words } in pages {
            if before.is_some_and(|before| before >= number) || balloon.pages.adopt(number, &words).is_none()
            {
                let reason = "the chunk is out of order, cut off, or has pages that are not RAM";
                return Err(impossible("pages", number, reason));
            }
            before = Some(number);
        }
        balloon.actual_pages = actual_pages;
        balloon.poison_val = poison_val;
        balloon.hinting = Hinting {
            command: hint_command,
            last_round: last_hint_round,
            driver_round: driver_hint_round,
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::testing::same_bytes;

    #[test]
    fn schema_1_reads_and_writes_these_bytes() {
        let text = concat!(
            r#"{"ram_bytes":268435456,"target_bytes":4096,"actual_pages":1,"poison_val":170,"hint_command":1,"#,
            r#""last_hint_round":2,"driver_hint_round":null,"pages":[{"number":1,"words":[1,0]}]}"#
        );
        same_bytes::<BalloonV1>(text);
    }
}
