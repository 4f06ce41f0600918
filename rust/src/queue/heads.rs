//! A set of 16-bit heads or buffer ids, for the policies that refuse a duplicate.

/// One bit for each head; 8 KiB at the most.
#[derive(Debug, Default)]
pub(crate) struct HeadSet {
    words: Vec<u64>,
}

impl HeadSet {
    /// A set for all 16-bit values, or an empty one that remembers nothing.
    pub(crate) fn new(tracking: bool) -> Self {
        Self {
            words: if tracking { vec![0; 1024] } else { Vec::new() },
        }
    }

    #[inline]
    pub(crate) fn contains(&self, head: u16) -> bool {
        self.words
            .get(usize::from(head >> 6))
            .is_some_and(|word| word >> (head & 63) & 1 == 1)
    }

    #[inline]
    pub(crate) fn insert(&mut self, head: u16) {
        if let Some(word) = self.words.get_mut(usize::from(head >> 6)) {
            *word |= 1 << (head & 63);
        }
    }

    #[inline]
    pub(crate) fn remove(&mut self, head: u16) {
        if let Some(word) = self.words.get_mut(usize::from(head >> 6)) {
            *word &= !(1 << (head & 63));
        }
    }
}
