//! What a driver writes beside its rings' own steps: fresh areas and indirect tables.

use super::Buffers;
use crate::mem::{Access, At, MemoryError, Want};
use crate::ring::RingLayout;
use crate::ring::desc::{self, Desc};

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
pub(super) fn write_table<A: Access>(mem: &A, at: At, packed: bool, buffers: Buffers<'_>) -> Result<u64, MemoryError> {
    let mut index = 0u16;
    buffers.describe(|(addr, len), flags| {
        let next = index.saturating_add(1);
        let rest = if packed {
            Desc::rest(len, 0, flags & !desc::NEXT)
        } else if flags & desc::NEXT != 0 {
            Desc::rest(len, flags, next)
        } else {
            Desc::rest(len, flags, 0)
        };
        let off = desc::BYTES * u64::from(index);
        index = next;
        mem.store_desc(at, off, (addr, rest))
    })?;
    Ok(at.gpa)
}
