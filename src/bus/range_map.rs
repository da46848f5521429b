//! A map from disjoint ranges of addresses to values; pure, used by the bus and nothing else.

use std::collections::BTreeMap;

use super::BusError;

/// Disjoint ranges, found by any address in them.
pub struct RangeMap<T> {
    ranges: BTreeMap<u64, (u64, T)>,
}

impl<T> RangeMap<T> {
    pub fn new() -> Self {
        Self {
            ranges: BTreeMap::new(),
        }
    }

    /// Adds `len` addresses from `base`.
    ///
    /// # Errors
    /// [`BusError::Range`] for an empty or wrapping range, [`BusError::Overlap`] with the first range in the way.
    pub fn insert(&mut self, base: u64, len: u64, value: T) -> Result<(), BusError> {
        let last = match len.checked_sub(1).and_then(|rest| base.checked_add(rest)) {
            Some(last) => last,
            None => return Err(BusError::Range { base, len }),
        };
        // The only range that can reach into [base, last] is the last one that begins at or before `last`.
        if let Some((&other_base, &(other_len, _))) = self.ranges.range(..=last).next_back()
            && other_base + (other_len - 1) >= base
        {
            return Err(BusError::Overlap {
                base,
                len,
                other_base,
                other_len,
            });
        }
        self.ranges.insert(base, (len, value));
        Ok(())
    }

    /// Takes away the range that begins at `base`.
    pub fn remove(&mut self, base: u64) -> Option<T> {
        self.ranges.remove(&base).map(|(_, value)| value)
    }

    /// The range that holds `address`: its base, its length and its value.
    pub fn find(&self, address: u64) -> Option<(u64, u64, &T)> {
        let (&base, (len, value)) = self.ranges.range(..=address).next_back()?;
        (address - base < *len).then_some((base, *len, value))
    }

    pub fn len(&self) -> usize {
        self.ranges.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_last_address_can_be_used_and_not_passed() {
        let mut map = RangeMap::new();
        assert_eq!(map.insert(u64::MAX, 1, 'a'), Ok(()));
        assert_eq!(
            map.insert(u64::MAX, 2, 'b'),
            Err(BusError::Range {
                base: u64::MAX,
                len: 2
            })
        );
        assert_eq!(map.insert(5, 0, 'c'), Err(BusError::Range { base: 5, len: 0 }));
        assert_eq!(
            map.find(u64::MAX).map(|(base, _, v)| (base, *v)),
            Some((u64::MAX, 'a'))
        );
    }

    proptest! {
        #[test]
        fn agrees_with_a_list_of_ranges(ranges in prop::collection::vec((0u64..200, 0u64..40), 0..20)) {
            let mut map = RangeMap::new();
            let mut model: Vec<(u64, u64)> = Vec::new();
            for (base, len) in ranges {
                let fits = len > 0 && model.iter().all(|(b, l)| base + len <= *b || b + l <= base);
                prop_assert_eq!(map.insert(base, len, base).is_ok(), fits);
                if fits {
                    model.push((base, len));
                }
            }
            for address in 0..250 {
                let expected = model.iter().find(|(b, l)| (*b..b + l).contains(&address)).map(|(b, _)| *b);
                prop_assert_eq!(map.find(address).map(|(_, _, v)| *v), expected);
            }
        }
    }
}
