//! Frames between the queues: read and judged, or made, and not yet in a receive buffer.
//!
//! # Theory
//!
//! Memory that the driver has just touched is slow to store to, and a processor keeps such stores in a line. To load more
//! than one of them has stored, as a long copy does of a header that was just filled in, it waits for the whole line. So
//! frames are made ready in a group, and copied when all of it is ready. A group is small enough to stay near.

use std::ops::Range;

use super::frame::{Broken, fits, receivable, received};
use super::{LONGEST, MOST_HEADER, Setup};
use crate::chain::Element;
use crate::iov::Iov;
use crate::mem::{Access, MemoryError};
use crate::service::BURST;

/// Bytes from which on a group is full.
const GROUP: usize = 16 << 10;
/// Where frames may begin: a cache line.
const LINE: usize = 64;

/// A group of chains that were read.
#[derive(Debug)]
pub(super) struct Frames {
    bytes: Box<[u8]>,
    taken: usize,
    /// Header and frame of each chain; of no bytes where there is none.
    places: Vec<Range<usize>>,
    /// What is wrong with chains that broke a rule, by their number in the group.
    broken: Vec<(usize, Broken)>,
}

impl Default for Frames {
    fn default() -> Self {
        let room = GROUP + MOST_HEADER + LONGEST;
        Self {
            bytes: vec![0; room].into_boxed_slice(),
            taken: 0,
            places: Vec::new(),
            broken: Vec::new(),
        }
    }
}

impl Frames {
    /// Begin a new group.
    pub(super) fn clear(&mut self) {
        self.taken = 0;
        self.places.clear();
        self.broken.clear();
    }

    /// Chains in it.
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether no other frame belongs to this group.
    pub(super) const fn full(&self) -> bool {
        self.taken >= GROUP
    }

    /// The frame of this chain behind its header, ready to be received; nothing where there is none.
    pub(super) fn get(&mut self, number: usize) -> &mut [u8] {
        let place = self.places.get(number).cloned().unwrap_or_default();
        self.bytes.get_mut(place).unwrap_or_default()
    }

    /// What is wrong with this chain, if it broke a rule; said once.
    #[cold]
    pub(super) fn take_broken(&mut self, number: usize) -> Option<Broken> {
        let at = self.broken.iter().position(|(other, _)| *other == number)?;
        Some(self.broken.swap_remove(at).1)
    }

    /// Read a chain, judge it, and make its header one to be received with; bytes of the frame. What is not passed on is read
    /// as well: whoever discards a frame has received it.
    ///
    /// # Errors
    /// The chain's memory cannot be read: the chain is not in the group.
    #[inline(always)]
    pub(super) fn read<A: Access>(
        &mut self,
        mem: &A,
        (element, iov): (&Element, Iov<'_>),
        setup: &Setup,
    ) -> Result<usize, MemoryError> {
        let length = usize::try_from(element.readable).unwrap_or(usize::MAX);
        if let Err(broken) = fits(length, setup) {
            return Ok(self.refuse(broken));
        }
        // A header and a frame that fit are no longer than the room behind a group that is not full.
        let place = self.taken..self.taken + length;
        let whole = self.bytes.get_mut(place.clone()).unwrap_or_default();
        iov.read(mem, 0, whole)?;
        if let Err(broken) = receivable(whole, setup) {
            return Ok(self.refuse(broken));
        }
        self.taken = place.end.next_multiple_of(LINE);
        self.places.push(place);
        Ok(length - setup.header)
    }

    #[cold]
    fn refuse(&mut self, broken: Broken) -> usize {
        self.broken.push((self.places.len(), broken));
        self.places.push(0..0);
        0
    }
}

/// Frames that are made: the next ones lie ready, as many as a group has.
#[derive(Debug, Default)]
pub(super) struct Made {
    bytes: Vec<u8>,
    /// Bytes of each, and from one to the next.
    whole: usize,
    stride: usize,
    count: usize,
    /// Where the next one begins.
    at: usize,
    /// Its number; None when all are to be made anew.
    next: Option<u64>,
}

impl Made {
    /// The frame is another one from now on.
    pub(super) const fn forget(&mut self) {
        self.next = None;
    }

    /// The frame of this number behind its header, as it is received; those after it lie ready too.
    pub(super) fn frame(&mut self, setup: &Setup, number: u64) -> &mut [u8] {
        if self.next != Some(number) {
            self.make(setup, number);
        }
        self.bytes.get_mut(self.at..self.at + self.whole).unwrap_or_default()
    }

    #[cold]
    fn make(&mut self, setup: &Setup, number: u64) {
        self.whole = setup.header + setup.frame.len();
        self.stride = self.whole.next_multiple_of(LINE);
        self.count = GROUP.checked_div(self.stride).unwrap_or(0).clamp(1, BURST);
        self.bytes.clear();
        for ahead in (0..).take(self.count) {
            let at = self.bytes.len();
            self.bytes.resize(at + setup.header, 0);
            received(self.bytes.get_mut(at..).unwrap_or_default());
            self.bytes.extend_from_slice(&setup.frame);
            self.bytes.resize(at + self.stride, 0);
            self.write(setup, at, number.wrapping_add(ahead));
        }
        (self.at, self.next) = (0, Some(number));
    }

    /// Write a frame's number.
    fn write(&mut self, setup: &Setup, at: usize, number: u64) {
        let frame = self.bytes.get_mut(at + setup.header..at + self.whole);
        let place = frame.zip(setup.number_at).and_then(|(frame, at)| frame.get_mut(at..));
        if let Some(place) = place.and_then(|place| place.first_chunk_mut()) {
            *place = number.to_be_bytes();
        }
    }

    /// That frame is away: have the one ready for which there is room now.
    pub(super) fn done(&mut self, setup: &Setup) {
        let Some(number) = self.next else { return };
        self.write(setup, self.at, number.wrapping_add(self.count as u64));
        self.at += self.stride;
        if self.at >= self.bytes.len() {
            self.at = 0;
        }
        self.next = Some(number.wrapping_add(1));
    }
}
