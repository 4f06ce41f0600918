//! Frames that go straight from the buffer they were sent in to the one they are received in.
//!
//! # Theory
//!
//! Nearly every frame lies in one buffer behind a header that asks for nothing, and fits into the next receive buffer. Of
//! such a frame nothing is judged but its header, so the bytes behind that need no stop in between. The header is read once;
//! that of the received frame is ours. Whatever is not so is left, with nothing done of it, to the way that does everything.

use super::frame::{PLAIN, asks_nothing};
use super::{Bounds, MOST_HEADER, Mode, Packets, Tally};
use crate::mem::{Access, At, any_lost};

impl Packets {
    /// Pass such frames on, in the chains from `first` on; how many they were.
    #[inline(always)]
    pub(super) fn straight<A: Access>(
        &mut self,
        mem: &A,
        first: usize,
        bounds: Bounds,
        bytes: &mut u64,
        tally: &mut Tally,
    ) -> usize {
        let (setup, receive) = (&self.setup, &mut self.receive);
        let header = MOST_HEADER as u64;
        if self.mode != Mode::Loopback || !setup.usable || setup.header != MOST_HEADER {
            return 0;
        }
        let (mut passed, mut lengths, mut spent) = (0, 0_u64, *bytes);
        for (element, from) in self.sent.alone(first) {
            // At least a byte behind the header, and no more than may be: of a buffer to be written to, none is readable.
            let length = element.readable.wrapping_sub(header);
            if length.wrapping_sub(1) >= setup.longest as u64 || spent >= bounds.bytes {
                break;
            }
            let Some(to) = receive.next_alone(element.readable) else {
                break;
            };
            let plain = |header: &_| asks_nothing(header).then_some(PLAIN);
            if !mem.relay(from, to, element.readable, plain) {
                break;
            }
            // Of lost memory nothing is told here. What is lost elsewhere is no reason to read again: the two may overlap.
            let intact = |at: At| mem.intact(at.gpa, element.readable).is_ok();
            if any_lost() && !(intact(from) && intact(to)) {
                break;
            }
            receive.fill_next(element.readable);
            lengths = lengths.saturating_add(length);
            spent = spent.saturating_add(element.readable).saturating_add(length);
            passed += 1;
        }
        *bytes = spent;
        for told in [&mut tally.sent, &mut tally.received] {
            told[0] += passed as u64;
            told[1] += lengths;
        }
        passed
    }
}
