//! Errors of the queue layer: who is at fault decides the type.
//!
//! [`Violation`] is a broken rule of the other side; it is boxed, since it is rare and a `Result` on the
//! hot path should be small. [`Misuse`] is a fault of the caller.

use crate::mem::{MemoryError, Want};
use crate::rule::Rule;

/// A translation that a chain needs and an IOMMU's memory does not have (yet).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// First address without one.
    pub address: u64,
    /// Bytes from there to the end of what was looked for, at least 1.
    pub len: u64,
    /// What for.
    pub want: Want,
}

/// A rule that the other side broke, with every place that is known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} (VIRTIO 1.4, {}): {message}", rule.name(), rule.clause(*packed))]
pub struct Violation {
    /// The broken rule.
    pub rule: Rule,
    /// Whether the queue is packed; decides the clause.
    pub packed: bool,
    /// Index of the queue.
    pub queue: u16,
    /// Ring position: index into the avail or used ring (split), slot (packed).
    pub position: Option<u16>,
    /// Head descriptor index (split) or buffer id (packed).
    pub head: Option<u16>,
    /// Index of the descriptor in its table.
    pub descriptor: Option<u32>,
    /// Guest address in question.
    pub address: Option<u64>,
    /// What was found and what was expected.
    pub message: String,
    /// What is missing, if all that is wrong is that: then the rule is broken only when it is refused.
    pub missing: Option<Missing>,
}

/// A violation on its way up.
pub type Fault = Box<Violation>;

/// Our own user's mistake; guest memory is unchanged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misuse {
    /// More bytes reported as written than the chain can take.
    #[error("{written} bytes cannot have been written to a chain of {writable} writable bytes")]
    WrittenTooBig {
        /// Bytes reported.
        written: u64,
        /// Bytes the chain can take.
        writable: u64,
    },
    /// The chain came from another queue.
    #[error("the chain came from another queue")]
    ForeignChain,
    /// The chain is not the newest that was popped.
    #[error("only the newest popped chain can be put back")]
    NotNewest,
    /// The chain's queue was reset or broken since it was popped.
    #[error("the queue was reset or broken since the chain was popped")]
    StaleChain,
    /// The memory behind the chain is gone.
    #[error("the memory behind the chain is gone: {0}")]
    StaleMemory(MemoryError),
    /// No free descriptors.
    #[error("{needed} descriptors are needed and {free} are free")]
    QueueFull {
        /// Descriptors needed.
        needed: u32,
        /// Descriptors free.
        free: u32,
    },
    /// An argument that cannot be.
    #[error("{0}")]
    Invalid(String),
    /// INDIRECT_DESC was not negotiated or no room for tables was given.
    #[error("indirect descriptors need INDIRECT_DESC negotiated and room for the tables")]
    NoIndirect,
    /// The queue is latched, or everything was detached from it; it must be reset first.
    #[error("the queue is broken or was detached, and must be reset first")]
    Latched,
}

/// Either side's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The other side broke a rule.
    #[error(transparent)]
    Violation(#[from] Fault),
    /// We were misused.
    #[error(transparent)]
    Misuse(#[from] Misuse),
}
