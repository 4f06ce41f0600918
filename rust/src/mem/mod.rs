//! Guest memory: regions, their table, and the seam through which queues reach them.

#[cfg(not(target_pointer_width = "64"))]
compile_error!("guest addresses are 64-bit and are mapped into the host's: a 64-bit target is needed");

mod access;
mod copy;
mod fetch;
mod guest;
mod log;
mod lost;
mod mapped;
mod mediated;
mod region;
mod sigbus;
mod stores;
mod table;
#[cfg(test)]
mod tests;
mod traced;
mod transfer;
mod vector;
mod words;

pub(crate) use access::AHEAD;
pub use access::{Access, At, Want};
// Only the Python face does not know at compile time what kind of memory it has.
#[cfg(any(feature = "python", test))]
pub(crate) use guest::with_access;
pub use guest::{AliasSpec, GuestMemory, Live, Pin, RegionSpec};
pub use log::{Elsewhere, LOG_PAGE, Log};
pub(crate) use lost::any_lost;
pub use mapped::Mapped;
pub use mediated::Mediated;
pub use region::{Backing, Mapping, OWN_ALIGN, RECEIVED_ALIGN, Region, RegionError};
pub use stores::{DescStores, HeadStores, Stores, UsedStores};
pub use table::{MAX_REGIONS, MAX_TRANSLATIONS, Near, Table};
pub use traced::{AccessKind, Record, Trace};
pub use transfer::{MAX_TRANSFER, Transfer, TransferFailed, transferring};
pub use vector::Vector;
pub use words::{Area, Descs, Heads, Useds, Words};

/// A number of bytes as the host counts them.
#[expect(
    clippy::cast_possible_truncation,
    reason = "usize has 64 bits: checked at the top of this file"
)]
#[inline]
const fn host_size(bytes: u64) -> usize {
    bytes as usize
}

/// Why a range of guest memory cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// `gpa + len` is beyond the end of the 64-bit address space.
    #[error("{len} bytes at {gpa:#x} wrap around the end of the address space")]
    Wraps {
        /// First guest address of the range.
        gpa: u64,
        /// Length of the range in bytes.
        len: u64,
    },
    /// A byte of the range lies in no region.
    #[error("no memory is mapped at {gpa:#x}")]
    Unmapped {
        /// First guest address that is not mapped.
        gpa: u64,
    },
    /// A byte of a range to be written lies in a region that is not writable.
    #[error("memory at {gpa:#x} is read-only")]
    ReadOnly {
        /// First guest address that is not writable.
        gpa: u64,
    },
    /// A byte of the range has no translation in an IOMMU's memory, or none that allows what is wanted: it may come yet.
    #[error("{gpa:#x} has no translation to {}", want.verb())]
    Untranslated {
        /// First address without one.
        gpa: u64,
        /// What was wanted.
        want: Want,
    },
    /// A ring word is not aligned to its size.
    #[error("{gpa:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// Guest address of the word.
        gpa: u64,
        /// Alignment that it needs, in bytes.
        align: u64,
    },
    /// The file behind the memory was cut short while it was mapped: what was read of it may be zeros, and what was
    /// written may be nowhere.
    #[error("the memory at {gpa:#x} is lost: its file was cut short")]
    Lost {
        /// First guest address of the range that is in the lost region.
        gpa: u64,
    },
    /// Memory that cannot be mapped, and the other side did not do what it was asked.
    #[error("the transfer at {gpa:#x} failed")]
    Transfer {
        /// First guest address of the transfer.
        gpa: u64,
    },
}

impl MemoryError {
    /// The guest address that the error is about.
    #[must_use]
    pub const fn address(&self) -> u64 {
        match *self {
            Self::Wraps { gpa, .. }
            | Self::Unmapped { gpa }
            | Self::ReadOnly { gpa }
            | Self::Untranslated { gpa, .. }
            | Self::Misaligned { gpa, .. }
            | Self::Lost { gpa }
            | Self::Transfer { gpa } => gpa,
        }
    }
}
