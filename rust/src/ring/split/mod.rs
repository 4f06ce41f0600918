//! The split virtqueue (VIRTIO 1.4, 2.7).
//!
//! Free-running 16-bit indices count entries of the avail and used rings; an entry lies at `index & (size - 1)`.
//! The driver publishes by storing `avail.idx`, the device by storing `used.idx`, each with release ordering
//! after the entries (2.7.13.3.1, 2.7.8.2); the reader loads with acquire ordering.

mod device;
mod driver;

pub(crate) use device::SplitDevice;
pub(crate) use driver::SplitDriver;

use super::layout::FLAGS;
use crate::mem::{Access, At, MemoryError};

/// Ask the other side, in our own area, for a notification when its index passes `index`: in the event field at
/// offset `event`, or by flags without EVENT_IDX (2.7.7.1, 2.7.10.2). Whoever asks looks once more afterwards.
fn arm<A: Access>(mem: &A, area: At, event_idx: bool, event: u64, index: u16) -> Result<(), MemoryError> {
    if event_idx {
        mem.store_u16(area, event, index)?;
    } else {
        mem.store_u16(area, FLAGS, 0)?;
    }
    mem.fence();
    Ok(())
}

/// Ask for no notifications. With EVENT_IDX an old event field says so already, and flags stays 0.
fn disarm<A: Access>(mem: &A, area: At, event_idx: bool) -> Result<(), MemoryError> {
    if event_idx {
        Ok(())
    } else {
        mem.store_u16(area, FLAGS, 1)
    }
}
