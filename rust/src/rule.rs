//! Every rule that the core can find broken: one stable name and its clause of VIRTIO 1.4 for each check.
//!
//! The same rule has one clause for the split ring (2.7) and one for the packed ring (2.8); a rule that
//! only one format knows has only that one.

use crate::mem::MemoryError;

macro_rules! rules {
    ($($(#[$doc:meta])* $name:ident: $split:literal, $packed:literal, $summary:literal;)+) => {
        /// One check on what the other side wrote.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Rule {
            $(#[doc = $summary] $name,)+
        }

        impl Rule {
            /// All rules, in the order of the specification.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The stable name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)+ }
            }

            /// The clause for a split ring; empty when only packed rings know the rule.
            #[must_use]
            pub const fn split_clause(self) -> &'static str {
                match self { $(Self::$name => $split,)+ }
            }

            /// The clause for a packed ring; empty when only split rings know the rule.
            #[must_use]
            pub const fn packed_clause(self) -> &'static str {
                match self { $(Self::$name => $packed,)+ }
            }

            /// One line that says what must hold.
            #[must_use]
            pub const fn summary(self) -> &'static str {
                match self { $(Self::$name => $summary,)+ }
            }
        }
    };
}

rules! {
    QueueSizeZero: "2.7", "2.8", "A queue has at least one descriptor.";
    QueueSizeNotPowerOfTwo: "2.7", "", "The size of a split queue is a power of two.";
    QueueSizeTooBig: "2.7", "2.8", "A queue has at most 32768 descriptors.";
    RingMisaligned: "2.7.1", "2.8.11", "Each part of a virtqueue is aligned as the specification's table says.";
    RingUnmapped: "2.7.1", "2.8.11", "Each part of a virtqueue lies wholly in guest memory, writable where the device writes.";
    MemoryLost: "2.6", "2.6", "Memory that holds a virtqueue or its buffers stays there as long as it is shared.";
    StateOutOfRange: "2.7.6", "2.8.1", "A queue goes on from indices that its size allows.";
    AvailIdxTooFar: "2.7.6.1", "", "The avail idx is at most the queue size ahead of what the device has consumed.";
    AvailIdxDecreased: "2.7.6.1", "", "The avail idx never goes back.";
    HeadOutOfRange: "2.7.6", "", "An avail ring entry is the index of a descriptor of the table.";
    HeadInFlight: "2.7.13.1", "", "A descriptor chain is not made available again before the device has used it.";
    IdInFlight: "", "2.8.21.1", "A buffer id is not given to a second buffer while the first is in flight.";
    TooManyInFlight: "2.7.13.1", "2.8.17", "No more buffers (packed: descriptors) are in flight than the queue has room for.";
    NextOutOfRange: "2.7.5", "", "The next field of a chained descriptor is an index of its table.";
    ChainTooLong: "2.7.5.3.1", "2.8.17", "A descriptor chain is not longer than its table or queue, so it has no loop.";
    ChainTooBig: "2.7.5.2", "2.7.5.2", "A descriptor chain describes at most 2^32 bytes.";
    ChainNotAvail: "", "2.8.17", "All descriptors of a list are available before the first of them is.";
    OutOfOrder: "2.7.4.2", "2.8.17", "Device-writable descriptors come after all device-readable ones.";
    ZeroLength: "2.7.5", "2.8.5", "A descriptor describes at least one byte (a strict reading; real peers differ).";
    UnmappedAddress: "2.7.5", "2.8.5", "A buffer lies wholly in guest memory.";
    AddressWraps: "2.7.5", "2.8.5", "A buffer does not wrap around the end of the address space.";
    ReadOnlyAddress: "2.7.5", "2.8.5", "A device-writable buffer lies in memory that the device may write.";
    IndirectNotNegotiated: "2.7.5.3.1", "2.8.19", "INDIRECT is set only when VIRTIO_F_INDIRECT_DESC was negotiated.";
    IndirectAndNext: "2.7.5.3.1", "2.8.19", "A descriptor does not have both INDIRECT and NEXT.";
    IndirectAfterDirect: "", "2.8.19", "A packed list linked by NEXT has no INDIRECT descriptor.";
    NestedIndirect: "2.7.5.3.1", "2.8.19", "An indirect table holds no INDIRECT descriptor.";
    IndirectBadLen: "2.7.5.3", "2.8.7", "An indirect table is a whole number of descriptors, at least one.";
    IndirectTooLong: "2.7.5.3.1", "2.8.19", "An indirect table is not longer than the queue (or the limit of the policy).";
    IndirectUnmapped: "2.7.5.3", "2.8.7", "An indirect table lies wholly in guest memory.";
    UsedIdxTooFar: "2.7.8", "", "The used idx is at most as far ahead as buffers are in flight.";
    UsedIdOutOfRange: "2.7.8", "2.8.4", "A used id is one that this queue can have.";
    UsedIdNotInFlight: "2.7.8", "2.8.4", "A used id belongs to a buffer that is in flight.";
    UsedLenTooBig: "2.7.8.2", "2.8.4", "A used length is at most the writable bytes of the buffer.";
}

impl Rule {
    /// What is broken where memory cannot be used: this rule, or that the memory is lost.
    #[must_use]
    pub(crate) const fn of_memory(self, error: &MemoryError) -> Self {
        match error {
            MemoryError::Lost { .. } => Self::MemoryLost,
            _ => self,
        }
    }

    /// The clause that holds for a queue of this format.
    #[must_use]
    pub const fn clause(self, packed: bool) -> &'static str {
        let (own, other) = if packed {
            (self.packed_clause(), self.split_clause())
        } else {
            (self.split_clause(), self.packed_clause())
        };
        if own.is_empty() { other } else { own }
    }
}
