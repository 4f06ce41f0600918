//! What a driver end knows of each of its buffers in flight, by head or buffer id, where the device cannot reach it.
//!
//! Sixteen bytes each, four to a cache line. An id that is free has a token which no buffer ever gets and which is larger than
//! all: one comparison tells whether an id is in flight and the device was shown it.

/// No buffer's token.
const FREE: u64 = u64::MAX;

/// A buffer in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shadow {
    pub(super) token: u64,
    /// Bytes that the device can write; a buffer of 2^32 counts as one of one byte less, as no used entry can tell the two
    /// apart.
    pub(super) writable: u32,
    /// Its last descriptor.
    pub(super) tail: u16,
    pub(super) descriptors: u16,
}

impl Shadow {
    #[inline(always)]
    pub(super) fn new(token: u64, tail: u16, descriptors: u16, writable: u64) -> Self {
        Self {
            token,
            writable: u32::try_from(writable).unwrap_or(u32::MAX),
            tail,
            descriptors,
        }
    }
}

/// One for each head or id.
#[derive(Debug)]
pub(super) struct Shadows(Box<[Shadow]>);

impl Shadows {
    pub(super) fn new(size: u16) -> Self {
        let free = Shadow {
            token: FREE,
            writable: 0,
            tail: 0,
            descriptors: 0,
        };
        Self(vec![free; usize::from(size)].into_boxed_slice())
    }

    #[inline(always)]
    pub(super) fn set(&mut self, id: u16, shadow: Shadow) {
        if let Some(slot) = self.0.get_mut(usize::from(id)) {
            *slot = shadow;
        }
    }

    /// The buffer `id`, if it is in flight with a token below `published`.
    #[inline(always)]
    pub(super) fn get(&self, id: u16, published: u64) -> Option<Shadow> {
        let shadow = self.0.get(usize::from(id))?;
        (shadow.token < published).then_some(*shadow)
    }

    /// The buffer `id`, which the device says it has written `len` bytes of, if it is in flight with a token below `published`
    /// and can hold as many: it is free from now on.
    #[inline(always)]
    pub(super) fn take(&mut self, id: u16, len: u32, published: u64) -> Option<Shadow> {
        let slot = self.0.get_mut(usize::from(id))?;
        if slot.token >= published || len > slot.writable {
            return None;
        }
        Some(std::mem::replace(slot, Shadow { token: FREE, ..*slot }))
    }

    #[inline(always)]
    pub(super) fn free(&mut self, id: u16) {
        if let Some(slot) = self.0.get_mut(usize::from(id)) {
            slot.token = FREE;
        }
    }

    /// Tokens of all in flight, which are all free then.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = u64> + '_ {
        let tokens = self.0.iter_mut().map(|slot| std::mem::replace(&mut slot.token, FREE));
        tokens.filter(|&token| token != FREE)
    }
}
