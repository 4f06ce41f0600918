//! What a driver writes beside its rings' own steps: fresh areas and indirect tables.

use super::Buffer;
use crate::mem::{Access, At, MemoryError, Want};
use crate::ring::{RingLayout, desc};

/// Memory for indirect tables: one of `entries` descriptors for each head or id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndirectArea {
    /// Guest address of the first table.
    pub address: u64,
    /// Descriptors of each table.
    pub entries: u16,
}

/// Zero the three areas.
pub(super) fn zero<A: Access>(mem: &A, layout: &RingLayout) -> Result<(), MemoryError> {
    let areas = [
        (layout.desc, layout.desc_bytes()),
        (layout.driver, layout.driver_bytes()),
        (layout.device, layout.device_bytes()),
    ];
    // All or nothing: the device's area may be mapped and yet not be ours to write.
    for (address, len) in areas {
        mem.resolve(address, len, Want::Write)?;
    }
    for (address, len) in areas {
        mem.fill(At::unresolved(address), 0, len, 0)?;
    }
    Ok(())
}

/// Write an indirect table at `at` and give its address (2.7.5.3: linked by `next`; 2.8.7: one after another).
pub(super) fn write_table<A: Access>(mem: &A, at: At, packed: bool, buffers: &[Buffer]) -> Result<u64, MemoryError> {
    for (i, buffer) in (0u16..).zip(buffers) {
        let off = desc::BYTES * u64::from(i);
        let more = usize::from(i) + 1 < buffers.len();
        let rest = if packed {
            desc::Desc::rest(buffer.len, 0, buffer.flags)
        } else if more {
            desc::Desc::rest(buffer.len, buffer.flags | desc::NEXT, i + 1)
        } else {
            desc::Desc::rest(buffer.len, buffer.flags, 0)
        };
        mem.store_u64(at, off, buffer.addr)?;
        mem.store_u64(at, off + 8, rest)?;
    }
    Ok(at.gpa)
}
