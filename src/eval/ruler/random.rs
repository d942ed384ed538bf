//! A small generator, so that the same seed gives the same samples everywhere.

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Random(u64);

impl Random {
    /// One for this seed and these names.
    #[must_use]
    pub fn new(seed: u64, names: &str) -> Self {
        Self(xxhash_rust::xxh3::xxh3_64_with_seed(names.as_bytes(), seed))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        // The bias is less than n / 2^64.
        (self.next() % n as u64) as usize
    }

    /// One of `items`, which are not none.
    pub fn one<'a, T: ?Sized>(&mut self, items: &[&'a T]) -> &'a T {
        items[self.below(items.len())]
    }

    /// Puts `items` into a random order (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }

    /// Calls `make` until it has given `n` different texts.
    pub fn distinct(&mut self, n: usize, mut make: impl FnMut(&mut Self) -> String) -> Vec<String> {
        let mut seen = std::collections::HashSet::new();
        let mut all = vec![];
        while all.len() < n {
            let text = make(self);
            if seen.insert(text.clone()) {
                all.push(text);
            }
        }
        all
    }

    /// A number of seven digits.
    pub fn number(&mut self) -> String {
        (1_000_000 + self.below(9_000_000)).to_string()
    }

    /// A random identifier in the form of a UUID of version 4.
    pub fn uuid(&mut self) -> String {
        let (a, b) = (self.next(), self.next());
        format!(
            "{:08x}-{:04x}-4{:03x}-{:x}{:03x}-{:012x}",
            a >> 32,
            a >> 16 & 0xffff,
            a & 0xfff,
            8 + (b >> 62),
            b >> 48 & 0xfff,
            b & 0xffff_ffff_ffff
        )
    }

    /// `n` letters from `first` to `last`.
    pub fn letters(&mut self, n: usize, first: u8) -> String {
        (0..n).map(|_| char::from(first + self.below(26) as u8)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_and_names_give_the_same() {
        let mut a = Random::new(1, "x");
        let text = (a.number(), a.uuid(), a.letters(5, b'A'), a.below(10));
        let mut b = Random::new(1, "x");
        assert_eq!(text, (b.number(), b.uuid(), b.letters(5, b'A'), b.below(10)));
        assert_ne!(Random::new(2, "x").number(), text.0);
        assert_ne!(Random::new(1, "y").number(), text.0);
        assert_eq!((text.0.len(), text.1.len(), text.2.len()), (7, 36, 5));
        assert!(text.1.as_bytes()[14] == b'4' && b"89ab".contains(&text.1.as_bytes()[19]), "{}", text.1);
    }

    #[test]
    fn shuffling_keeps_what_was_there() {
        let mut items: Vec<usize> = (0..100).collect();
        Random::new(3, "").shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
        let distinct = Random::new(3, "").distinct(26, |r| r.letters(1, b'a'));
        assert_eq!(distinct.iter().collect::<std::collections::HashSet<_>>().len(), 26);
    }
}
