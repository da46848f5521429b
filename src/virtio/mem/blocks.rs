//! One bit per block of the region: whether it is plugged.
//!
//! Pure. Ranges are checked by the region before they come here; bits behind the last block are never set.

use std::ops::Range;

/// Which blocks are plugged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Blocks {
    words: Vec<u64>,
    block_count: u64,
    plugged_count: u64,
}

impl Blocks {
    /// `block_count` unplugged blocks.
    pub(super) fn new(block_count: u64) -> Self {
        Self {
            words: vec![0; block_count.div_ceil(64) as usize],
            block_count,
            plugged_count: 0,
        }
    }

    /// Blocks as saved words say; `None` if these are not the words of `block_count` blocks.
    pub(super) fn from_words(words: Vec<u64>, block_count: u64) -> Option<Self> {
        let surplus = match block_count % 64 {
            0 => 0,
            used => words.last().copied().unwrap_or(0) >> used,
        };
        if words.len() as u64 != block_count.div_ceil(64) || surplus != 0 {
            return None;
        }
        let plugged_count = words.iter().map(|word| u64::from(word.count_ones())).sum();
        Some(Self {
            words,
            block_count,
            plugged_count,
        })
    }

    /// The bits, the first block's lowest.
    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }

    /// The number of plugged blocks.
    pub(super) fn plugged_count(&self) -> u64 {
        self.plugged_count
    }

    /// The number of plugged blocks in `range`.
    pub(super) fn plugged_in(&self, range: Range<u64>) -> u64 {
        let end = range.end.min(self.block_count);
        let words = range.start / 64..end.div_ceil(64);
        let count = |index: u64| {
            let word = self.words.get(index as usize).copied().unwrap_or(0);
            let first = index * 64;
            let below = u64::MAX << range.start.saturating_sub(first).min(63);
            let above = u64::MAX >> (first + 64).saturating_sub(end).min(63);
            u64::from((word & below & above).count_ones())
        };
        if range.start >= end {
            0
        } else {
            words.map(count).sum()
        }
    }

    /// Plugs or unplugs every block of `range`.
    pub(super) fn set(&mut self, range: Range<u64>, plugged: bool) {
        for block in range {
            if self.is_plugged(block) == plugged {
                continue;
            }
            if let Some(word) = self.words.get_mut((block / 64) as usize) {
                *word ^= 1 << (block % 64);
                self.plugged_count = match plugged {
                    true => self.plugged_count + 1,
                    false => self.plugged_count - 1,
                };
            }
        }
    }

    /// Unplugs every block.
    pub(super) fn clear(&mut self) {
        self.words.fill(0);
        self.plugged_count = 0;
    }

    /// The plugged blocks as ranges that do not touch, in order.
    pub(super) fn runs(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for block in (0..self.block_count).filter(|block| self.is_plugged(*block)) {
            match runs.last_mut() {
                Some(last) if last.end == block => last.end += 1,
                _ => runs.push(block..block + 1),
            }
        }
        runs
    }

    fn is_plugged(&self, block: u64) -> bool {
        let word = self.words.get((block / 64) as usize);
        word.is_some_and(|word| word >> (block % 64) & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn words_of_another_number_of_blocks_are_refused() {
        assert!(Blocks::from_words(vec![1 << 5], 6).is_some());
        assert!(Blocks::from_words(vec![1 << 6], 6).is_none(), "block 6 of 6");
        assert!(Blocks::from_words(vec![u64::MAX], 64).is_some());
        assert!(Blocks::from_words(vec![0, 0], 64).is_none(), "a word too many");
        assert!(Blocks::from_words(Vec::new(), 1).is_none(), "a word too few");
    }

    proptest! {
        #[test]
        fn counts_runs_and_words_tell_the_same(changes in prop::collection::vec((0u64..200, 0u64..200, any::<bool>()), 0..20)) {
            let mut blocks = Blocks::new(200);
            let mut model = [false; 200];
            for (one, other, plugged) in changes {
                let range = one.min(other)..one.max(other);
                blocks.set(range.clone(), plugged);
                model[range.start as usize..range.end as usize].fill(plugged);
            }
            let count = model.iter().filter(|plugged| **plugged).count() as u64;
            prop_assert_eq!(blocks.plugged_count(), count);
            prop_assert_eq!(blocks.plugged_in(0..200), count);
            let runs = blocks.runs();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
            let mut again = Blocks::new(200);
            runs.into_iter().for_each(|run| again.set(run, true));
            prop_assert_eq!(&again, &blocks);
            prop_assert_eq!(Blocks::from_words(blocks.words().to_vec(), 200), Some(blocks));
        }
    }
}
