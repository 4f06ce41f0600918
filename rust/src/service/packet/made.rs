//! Frames that are made.
//!
//! # Theory
//!
//! A processor keeps what was just stored in a line. To load more than one store has put there, as a long copy does of a
//! header that was just filled in, it waits for the whole line. So frames lie ready, a group of them, and one is made anew
//! when it was copied. A group is small enough to stay near.

use super::frame::received;
use super::{BURST, Setup};

/// Bytes of a group.
const GROUP: usize = 16 << 10;
/// Where frames begin: a cache line.
const LINE: usize = 64;

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
