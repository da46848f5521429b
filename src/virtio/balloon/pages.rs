//! Which pages of the start-up RAM are in the balloon: one bit per page, in chunks that exist where a page is.
//!
//! Pure. Page numbers come from the guest; those outside the RAM are nobody's and never get in. The chunks take at
//! most 1/32768 of the RAM.

use std::collections::BTreeMap;
use std::ops::Range;

/// The pages of one chunk: 128 MiB of RAM.
const CHUNK_PAGES: u64 = 1 << 15;
/// The words of one chunk.
pub(super) const CHUNK_WORDS: usize = 512;

/// The pages in the balloon.
#[derive(Debug)]
pub(super) struct Pages {
    /// The RAM as ranges of page numbers, in order.
    ram: Vec<Range<u64>>,
    /// By their first page over [`CHUNK_PAGES`].
    chunks: BTreeMap<u64, Box<[u64; CHUNK_WORDS]>>,
    count: u64,
}

impl Pages {
    /// An empty balloon in this RAM, given as ranges of page numbers.
    pub(super) fn new(ram: Vec<Range<u64>>) -> Self {
        Self {
            ram,
            chunks: BTreeMap::new(),
            count: 0,
        }
    }

    /// The number of pages in the balloon.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// The number of pages of the RAM.
    pub(super) fn ram_count(&self) -> u64 {
        self.ram.iter().map(|range| range.end - range.start).sum()
    }

    fn is_ram(&self, page: u64) -> bool {
        self.ram.iter().any(|range| range.contains(&page))
    }

    /// The pages of a driver's list that are RAM, as runs that do not touch, in order; and how many there were not.
    pub(super) fn runs(&self, mut list: Vec<u32>) -> (Vec<Range<u64>>, usize) {
        list.sort_unstable();
        list.dedup();
        let listed_count = list.len();
        let (mut runs, mut ram_count): (Vec<Range<u64>>, _) = (Vec::new(), 0);
        for page in list.into_iter().map(u64::from).filter(|page| self.is_ram(*page)) {
            ram_count += 1;
            match runs.last_mut() {
                Some(last) if last.end == page => last.end += 1,
                _ => runs.push(page..page + 1),
            }
        }
        (runs, listed_count - ram_count)
    }

    /// Puts the pages of a run of [`Pages::runs`] into the balloon. Those that are in it already count once.
    pub(super) fn insert(&mut self, run: Range<u64>) {
        for page in run {
            let (chunk, word, bit) = place(page);
            let chunk = self
                .chunks
                .entry(chunk)
                .or_insert_with(|| Box::new([0; CHUNK_WORDS]));
            self.count += u64::from(chunk[word] & bit == 0);
            chunk[word] |= bit;
        }
    }

    /// Takes a page out of the balloon, if it is there.
    pub(super) fn remove(&mut self, page: u64) {
        let (chunk, word, bit) = place(page);
        if let Some(chunk) = self.chunks.get_mut(&chunk) {
            self.count -= u64::from(chunk[word] & bit != 0);
            chunk[word] &= !bit;
        }
    }

    /// Empties the balloon.
    pub(super) fn clear(&mut self) {
        self.chunks.clear();
        self.count = 0;
    }

    /// The chunks that have pages in the balloon, by number.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (u64, &[u64])> {
        let chunks = self.chunks.iter().map(|(number, words)| (*number, &words[..]));
        chunks.filter(|(_, words)| words.iter().any(|word| *word != 0))
    }

    /// Takes over a saved chunk. `None` if it has another size or pages that are not RAM.
    pub(super) fn adopt(&mut self, number: u64, words: &[u64]) -> Option<()> {
        let words: [u64; CHUNK_WORDS] = words.try_into().ok()?;
        let first = number.checked_mul(CHUNK_PAGES)?;
        for (base, word) in (first..first.checked_add(CHUNK_PAGES)?).step_by(64).zip(words) {
            for page in (base..base + 64).filter(|page| word >> (page % 64) & 1 != 0) {
                if !self.is_ram(page) {
                    return None;
                }
                self.insert(page..page + 1);
            }
        }
        Some(())
    }
}

/// A page's chunk, word and bit.
fn place(page: u64) -> (u64, usize, u64) {
    let word = page % CHUNK_PAGES / 64;
    (page / CHUNK_PAGES, word as usize, 1 << (page % 64))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// RAM that does not begin or end with a chunk, and has a hole.
    fn pages() -> Pages {
        Pages::new(vec![10..40_000, 100_000..100_100])
    }

    #[test]
    fn runs_are_sorted_joined_and_in_ram() {
        let list = vec![12, 11, 10, 9, 39_999, 40_000, 500, 11, 99_999, 100_000, u32::MAX];
        let (runs, outside_count) = pages().runs(list);
        assert_eq!(runs, [10..13, 500..501, 39_999..40_000, 100_000..100_001]);
        assert_eq!(outside_count, 4, "9, 40000, 99999 and the last of all");
    }

    #[test]
    fn a_page_counts_once() {
        let mut pages = pages();
        pages.insert(32_760..32_780);
        pages.insert(32_770..32_790);
        assert_eq!(pages.count(), 30, "across the border of two chunks");
        (32_760..32_765).for_each(|page| pages.remove(page));
        pages.remove(32_760);
        pages.remove(99);
        pages.remove(u64::MAX);
        assert_eq!(pages.count(), 25);
        assert_eq!(pages.ram_count(), 40_090);
        pages.clear();
        assert_eq!((pages.count(), pages.chunks().count()), (0, 0));
    }

    #[test]
    fn saved_chunks_of_another_ram_are_refused() {
        let mut words = [0; CHUNK_WORDS];
        words[0] = 1 << 10;
        assert!(pages().adopt(0, &words).is_some());
        assert!(pages().adopt(1, &words).is_some());
        assert!(pages().adopt(2, &words).is_none(), "page 65546 is in the hole");
        assert!(pages().adopt(0, &words[1..]).is_none(), "a word is missing");
        assert!(pages().adopt(u64::MAX, &words).is_none(), "there is no such page");
        words[0] = 1 << 9;
        assert!(pages().adopt(0, &words).is_none(), "page 9 is no RAM");
    }

    proptest! {
        #[test]
        fn the_bits_are_a_set(steps in prop::collection::vec((any::<bool>(), 0u64..50_000, 1u64..300), 0..30)) {
            let mut pages = pages();
            let mut model = BTreeSet::new();
            for (insert, first, length) in steps {
                let list = (first..first + length).map(|page| page as u32).collect();
                let (runs, _) = pages.runs(list);
                for run in runs {
                    if insert {
                        model.extend(run.clone());
                        pages.insert(run);
                    } else {
                        run.for_each(|page| {
                            model.remove(&page);
                            pages.remove(page);
                        });
                    }
                }
            }
            prop_assert_eq!(pages.count(), model.len() as u64);
            let mut again = self::pages();
            for (number, words) in pages.chunks() {
                prop_assert!(again.adopt(number, words).is_some());
            }
            let saved: Vec<_> = pages.chunks().collect();
            prop_assert_eq!(again.count(), pages.count());
            prop_assert_eq!(again.chunks().collect::<Vec<_>>(), saved);
        }
    }
}
