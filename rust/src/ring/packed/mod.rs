//! The packed virtqueue (VIRTIO 1.4, 2.8).
//!
//! One ring is written by both ends. A place in it is a slot and the wrap counter of its lap, which starts at
//! 1 and toggles each time the end of the ring is passed (2.8.1). A descriptor is available when its AVAIL
//! bit equals the driver's wrap counter and its USED bit does not; it is used when both equal the device's.
//! The flags word is the one that is stored last, with release ordering, and loaded first, with acquire
//! ordering; for several descriptors at once that of the first is stored last of all (2.8.17).

mod device;
mod driver;

pub(crate) use device::PackedDevice;
pub(crate) use driver::PackedDriver;

use super::desc::{AVAIL, INDIRECT, NEXT, USED};
use super::event::{AT_DESC, DISABLE, ENABLE};
use super::layout::{EVENT_FLAGS, EVENT_OFF_WRAP};
use crate::mem::{Access, At, MemoryError};

/// Ask the other side, in our own event structure, for a notification when it passes `place` (2.8.10); whoever asks
/// looks once more afterwards.
fn arm<A: Access>(mem: &A, event: At, event_idx: bool, place: Place) -> Result<(), MemoryError> {
    let flags = if event_idx {
        mem.store_u16(event, EVENT_OFF_WRAP, place.bits())?;
        AT_DESC
    } else {
        ENABLE
    };
    mem.store_u16_release(event, EVENT_FLAGS, flags)?;
    mem.fence();
    Ok(())
}

/// Ask the other side for no notifications.
fn disarm<A: Access>(mem: &A, event: At) -> Result<(), MemoryError> {
    mem.store_u16(event, EVENT_FLAGS, DISABLE)
}

/// A slot of the ring and the wrap counter of the lap it is looked at in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) slot: u16,
    pub(crate) wrap: bool,
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "slots stay below the size, which has 16 bits"
)]
impl Place {
    /// From 15 bits of slot and the wrap counter in bit 15, as states and event structures have it.
    pub(crate) const fn from_bits(bits: u16) -> Self {
        Self {
            slot: bits & 0x7fff,
            wrap: bits & 0x8000 != 0,
        }
    }

    pub(crate) const fn bits(self) -> u16 {
        self.slot | (self.wrap as u16) << 15
    }

    pub(crate) const fn pair(self) -> (u16, bool) {
        (self.slot, self.wrap)
    }

    /// `count` slots further, `count` at most `size`.
    #[inline(always)]
    #[must_use]
    pub(crate) const fn forward(self, count: u16, size: u16) -> Self {
        let slot = self.slot as u32 + count as u32;
        let size = size as u32;
        if slot >= size {
            Self {
                slot: (slot - size) as u16,
                wrap: !self.wrap,
            }
        } else {
            Self {
                slot: slot as u16,
                wrap: self.wrap,
            }
        }
    }

    /// `count` slots back, `count` at most `size`.
    #[must_use]
    pub(crate) const fn back(self, count: u16, size: u16) -> Self {
        if self.slot >= count {
            Self {
                slot: self.slot - count,
                wrap: self.wrap,
            }
        } else {
            Self {
                slot: (self.slot as u32 + size as u32 - count as u32) as u16,
                wrap: !self.wrap,
            }
        }
    }

    /// How many slots `later` is ahead, which is at most `size`.
    pub(crate) const fn distance(self, later: Self, size: u16) -> u32 {
        let lap = if self.wrap == later.wrap { 0 } else { size as u32 };
        (lap + later.slot as u32).saturating_sub(self.slot as u32)
    }

    /// Whether `flags` mark the descriptor here as available.
    #[inline(always)]
    pub(crate) const fn is_avail(self, flags: u16) -> bool {
        (flags & AVAIL != 0) == self.wrap && (flags & USED != 0) != self.wrap
    }

    /// Whether `flags` mark the descriptor here as available, and as one buffer without others.
    #[inline(always)]
    pub(crate) const fn is_alone(self, flags: u16) -> bool {
        flags & (AVAIL | USED | NEXT | INDIRECT) == self.avail_flags()
    }

    /// Whether `flags` mark the descriptor here as used.
    #[inline(always)]
    pub(crate) const fn is_used(self, flags: u16) -> bool {
        flags & (AVAIL | USED) == self.used_flags()
    }

    /// The flags that make a descriptor here available.
    pub(crate) const fn avail_flags(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    /// The flags that make a descriptor here used.
    pub(crate) const fn used_flags(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }
}
