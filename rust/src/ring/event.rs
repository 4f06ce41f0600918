//! When to notify: event index arithmetic of both formats (VIRTIO 1.4, 2.7.7, 2.7.10, 2.8.10, 2.8.14).

use super::layout::{EVENT_FLAGS, EVENT_OFF_WRAP};
use crate::mem::{Access, At, MemoryError};

/// Whether moving an index from `old` to `new` passed `event`: the specification's `vring_need_event`.
///
/// All three are 16-bit counters, so every difference is taken modulo 2^16.
#[inline]
#[must_use]
pub const fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// An event suppression structure of a packed queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedEvent {
    /// Offset of the descriptor that is waited for, with its wrap counter in bit 15.
    pub off_wrap: u16,
    /// 0 enable, 1 disable, 2 at a descriptor, 3 reserved; further bits are reserved.
    pub flags: u16,
}

pub(crate) const ENABLE: u16 = 0;
pub(crate) const DISABLE: u16 = 1;
pub(crate) const AT_DESC: u16 = 2;

impl PackedEvent {
    /// From memory, in the natural size of the fields (mixed sizes would race where both ends are threads). The other
    /// side stores the place before the flags that tell of it, so the flags are loaded first.
    pub(crate) fn load<A: Access>(mem: &A, area: At) -> Result<Self, MemoryError> {
        let flags = mem.load_u16_acquire(area, EVENT_FLAGS)?;
        let off_wrap = mem.load_u16(area, EVENT_OFF_WRAP)?;
        Ok(Self { off_wrap, flags })
    }
}

/// A place in a packed ring together with its wrap counter, as one number on a circle of `2 * size`.
const fn on_circle(off: u32, wrap: bool, size: u32) -> u32 {
    if wrap { off } else { off + size }
}

/// Whether the other side of a packed queue wants to be told that we moved from `old` to `new`.
///
/// Both places are (slot, wrap counter). What makes no sense (flags 3, flags 2 without EVENT_IDX, an offset
/// beyond the ring) is the other side's mistake: we notify, which is always allowed.
#[must_use]
pub fn packed_need_event(event: PackedEvent, event_idx: bool, size: u16, new: (u16, bool), old: (u16, bool)) -> bool {
    match event.flags & 3 {
        DISABLE => false,
        AT_DESC if event_idx => {
            let size = u32::from(size);
            let off = u32::from(event.off_wrap & 0x7fff);
            if off >= size {
                return true;
            }
            let circle = 2 * size;
            let at = on_circle(off, event.off_wrap & 0x8000 != 0, size);
            let new = on_circle(u32::from(new.0), new.1, size);
            let old = on_circle(u32::from(old.0), old.1, size);
            let gone = |to: u32| if to >= old { to - old } else { to + circle - old };
            gone(at) < gone(new)
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn need_event_counts_around_the_16_bit_edge() {
        // Moving from 0xfffe to 2 passes 0xfffe, 0xffff, 0 and 1, and nothing else.
        for event in 0..=u16::MAX {
            let passed = [0xfffe, 0xffff, 0, 1].contains(&event);
            assert_eq!(need_event(event, 2, 0xfffe), passed, "event {event:#x}");
        }
    }

    #[test]
    fn packed_event_passes_exactly_the_slots_between() {
        let at = |off: u16, wrap: bool| PackedEvent {
            off_wrap: off | u16::from(wrap) << 15,
            flags: 2,
        };
        // Size 5, from slot 3 of a lap with wrap 1 to slot 1 of the next lap.
        let hit: Vec<_> = (0..5u16)
            .flat_map(|off| [(off, true), (off, false)])
            .filter(|&(off, wrap)| packed_need_event(at(off, wrap), true, 5, (1, false), (3, true)))
            .collect();
        assert_eq!(hit, [(0, false), (3, true), (4, true)]);
    }

    #[test]
    fn packed_event_that_makes_no_sense_notifies() {
        let odd = [
            PackedEvent { off_wrap: 0, flags: 3 },
            PackedEvent { off_wrap: 7, flags: 2 },
        ];
        assert!(
            odd.iter()
                .all(|&event| packed_need_event(event, true, 5, (1, true), (0, true)))
        );
        assert!(packed_need_event(
            PackedEvent { off_wrap: 0, flags: 2 },
            false,
            5,
            (3, true),
            (2, true)
        ));
        assert!(!packed_need_event(
            PackedEvent { off_wrap: 0, flags: 1 },
            false,
            5,
            (3, true),
            (2, true)
        ));
    }
}
