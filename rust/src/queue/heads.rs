//! A set of 16-bit heads or buffer ids, for the policies that refuse a duplicate.

/// One bit for each head, up to the highest that was ever in it; 8 KiB at the most.
#[derive(Debug)]
pub(crate) struct HeadSet {
    words: Vec<u64>,
    tracking: bool,
}

impl HeadSet {
    /// A set for all 16-bit values, or an empty one that remembers nothing.
    pub(crate) const fn new(tracking: bool) -> Self {
        Self {
            words: Vec::new(),
            tracking,
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
        match self.words.get_mut(usize::from(head >> 6)) {
            Some(word) => *word |= 1 << (head & 63),
            None if self.tracking => self.grow(head),
            None => {}
        }
    }

    /// Most queues are small, and tests make millions: zeros for all heads cost more than the rest of a new one.
    #[cold]
    fn grow(&mut self, head: u16) {
        self.words.resize(usize::from(head >> 6), 0);
        self.words.push(1 << (head & 63));
    }

    #[inline]
    pub(crate) fn remove(&mut self, head: u16) {
        if let Some(word) = self.words.get_mut(usize::from(head >> 6)) {
            *word &= !(1 << (head & 63));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::HeadSet;

    #[test]
    fn it_holds_what_was_put_in() {
        let mut set = HeadSet::new(true);
        for (at, head) in [65535, 0, 63, 64, 1000].into_iter().enumerate() {
            assert!(!set.contains(head), "{head} before");
            set.insert(head);
            assert!(set.contains(head) && set.contains(65535), "{head} after {at} others");
        }
        set.remove(64);
        set.remove(12);
        let held: Vec<u16> = (0..=65535).filter(|&head| set.contains(head)).collect();
        assert_eq!(held, [0, 63, 1000, 65535]);
    }

    #[test]
    fn it_grows_with_the_highest() {
        let mut set = HeadSet::new(true);
        for head in [3, 64, 1000] {
            set.insert(head);
        }
        let held: Vec<u16> = (0..=65535).filter(|&head| set.contains(head)).collect();
        assert_eq!(held, [3, 64, 1000]);
    }

    #[test]
    fn one_that_does_not_track_holds_nothing() {
        let mut set = HeadSet::new(false);
        set.insert(7);
        assert!(!set.contains(7));
    }
}
