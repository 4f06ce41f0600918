//! What is tolerated from the other side: named policies and their switches.
//!
//! `interop` accepts what real peers do against the letter of the specification: QEMU never sets WRITE in
//! packed used descriptors, Windows makes indirect tables longer than the queue, drivers of several systems
//! queue zero-length descriptors. `strict` accepts nothing that the specification forbids, and is for checks.

/// Tolerances towards the other side; `true` accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "a table of independent switches, each named by the catalogue"
)]
pub struct Policy {
    /// Accept descriptors of length 0; they become no segment.
    pub zero_length: bool,
    /// Accept device-readable descriptors after device-writable ones.
    pub mixed_order: bool,
    /// Accept a head (packed: id) that is already in flight.
    pub duplicate_heads: bool,
    /// Accept indirect tables of more entries than the queue size, up to `max_indirect`.
    pub indirect_beyond_queue: bool,
    /// Accept a table length that is no multiple of 16, rounded down.
    pub indirect_remainder: bool,
    /// Ignore every flag but WRITE in a packed indirect table.
    pub packed_table_flags: bool,
    /// Accept an avail idx that goes back without passing what was consumed.
    pub avail_decrease: bool,
    /// Clamp a used length above the writable size (driver end).
    pub used_len_beyond: bool,
    /// Take the length of a packed used descriptor without WRITE as written bytes, if it can be one (driver end).
    pub used_without_write: bool,
    /// Entries of one indirect table at most.
    pub max_indirect: u32,
}

impl Policy {
    /// For serving real peers, and for drivers of real devices.
    pub const INTEROP: Self = Self {
        zero_length: true,
        mixed_order: false,
        duplicate_heads: true,
        indirect_beyond_queue: true,
        indirect_remainder: false,
        packed_table_flags: true,
        avail_decrease: true,
        used_len_beyond: false,
        used_without_write: true,
        max_indirect: 1024,
    };

    /// For checks: nothing that the specification forbids.
    pub const STRICT: Self = Self {
        zero_length: false,
        mixed_order: false,
        duplicate_heads: false,
        indirect_beyond_queue: false,
        indirect_remainder: false,
        packed_table_flags: false,
        avail_decrease: false,
        used_len_beyond: false,
        used_without_write: false,
        max_indirect: 32768,
    };
}
