"""Sections 2.3 (addresses and lengths) and 2.4 (indirect tables)."""

from __future__ import annotations

from typing import Final

from virtio_test.checks.entry import Outcome

from .row import Meets, row

__all__ = ["BUFFER_ROWS", "TABLE_ROWS"]

_D: Final = Meets.DEVICE

BUFFER_ROWS: Final = (
    row(
        "B01",
        _D,
        "A descriptor has length 0: alone, first, in the middle, last, all of them.",
        by="ZeroLength",
        behaviour="It becomes no segment, and its address is not used.",
    ),
    row(
        "B02",
        _D,
        "A chain with a writable descriptor has no byte at all.",
        behaviour="Nothing can be written, and its used length is 0.",
        by="ZeroLength",
    ),
    row("B03", _D, "A buffer lies beyond memory, in a hole, or at the end of the address space.", by="UnmappedAddress"),
    row("B04", _D, "Address and length of a buffer wrap around 2^64.", by="AddressWraps"),
    row("B05", _D, "A buffer ends exactly where its region ends.", Outcome.ACCEPTED, clauses="2.7.5 2.8.5"),
    row("B06", _D, "A buffer ends one byte behind its region.", by="UnmappedAddress"),
    row(
        "B08",
        _D,
        "A buffer reaches over a hole between two regions.",
        by="UnmappedAddress",
        behaviour="Over the border of two regions that touch it is accepted.",
    ),
    row(
        "B09",
        _D,
        "A chain describes more than 2^32 bytes.",
        by="ChainTooBig",
        behaviour="Exactly 2^32 are accepted.",
    ),
    row("B10", _D, "A descriptor claims 2^32 - 1 bytes at a good address.", by="UnmappedAddress"),
    row(
        "B11",
        _D,
        "One buffer lies over hundreds of regions.",
        Outcome.ACCEPTED,
        "It is one segment; copies go region by region, and no list grows with their number.",
        clauses="2.7.5 2.8.5",
    ),
    row(
        "B12",
        _D,
        "A buffer lies over the ring, its event fields or its own indirect table.",
        Outcome.SAFE,
        "The chain is what was read before the device wrote.",
        clauses="2.7.5.1 2.8.15",
    ),
    row("B13", _D, "Readable and writable buffers of a chain overlap.", Outcome.ACCEPTED, clauses="2.7.4"),
    row(
        "B14",
        _D,
        "A buffer lies in the registers of a device.",
        by="UnmappedAddress",
        behaviour="Only memory that was given as such is ever accessed.",
    ),
    row("B15", _D, "A writable buffer lies in memory that may only be read.", by="ReadOnlyAddress"),
    row(
        "B16",
        _D,
        "A buffer's mapping is missing, allows less than is asked for, or is taken away between pop and copy.",
        Outcome.MISUSE,
        "Between pop and copy: `StaleMemory`, nothing of the copy is made, and the chain lives on. Before the pop the "
        "ring waits, and it is an unmapped address when that is refused; without an IOTLB at once, or a read-only one.",
        by="UnmappedAddress ReadOnlyAddress IotlbRefused",
        clauses="2.7.5 2.8.5 6.1",
        differs="An IOTLB miss is no broken rule: the ring waits where it is until the mapping comes or is refused.",
    ),
    row("B17", _D, "A buffer lies at address 0.", Outcome.ACCEPTED, clauses="2.7.5 2.8.5"),
    row(
        "B19",
        Meets.CLASS,
        "A chain is shorter than the header of its request.",
        Outcome.COMPLETED,
        "It is counted (`rejected`), and nothing is half filled.",
        clauses="2.7.4.1",
    ),
)

TABLE_ROWS: Final = (
    row("I01", _D, "INDIRECT is set without having been negotiated.", by="IndirectNotNegotiated"),
    row("I02", _D, "A descriptor has INDIRECT and NEXT.", by="IndirectAndNext"),
    row(
        "I03",
        _D,
        "An entry of an indirect table has INDIRECT itself.",
        Outcome.BROKEN,
        by="NestedIndirect",
        like="P14",
    ),
    row("I05", _D, "A chain has two INDIRECT descriptors.", by="IndirectAndNext"),
    row("I06", _D, "An indirect table has length 0.", by="IndirectBadLen"),
    row(
        "I07",
        _D,
        "The length of an indirect table is no multiple of 16.",
        by="IndirectBadLen",
        behaviour="`Policy(indirect_remainder=True)` rounds down, which the specification allows.",
    ),
    row(
        "I08",
        _D,
        "An indirect table has more entries than the queue.",
        by="IndirectTooLong",
        behaviour="As many as the queue has are accepted; interop takes 1024 (`max_indirect`), and no length is cut.",
    ),
    row("I10", _D, "An indirect table is not aligned.", Outcome.ACCEPTED, "No clause asks for it.", clauses="2.7.5.3"),
    row("I11", _D, "An indirect table is unmapped, partly so, or wraps.", by="IndirectUnmapped"),
    row("I12", _D, "The next field of a table's entry is beyond the table.", by="NextOutOfRange"),
    row("I13", _D, "The entries of a table link each other in a cycle.", by="ChainTooLong"),
    row(
        "I15",
        _D,
        "Entries of a table lie behind the one that ends the chain.",
        Outcome.UNREAD,
        clauses="2.7.5.3",
    ),
    row("I16", _D, "WRITE is set on the descriptor of an indirect table.", Outcome.UNREAD, clauses="2.7.5.3.2"),
    row(
        "I17",
        _D,
        "An indirect table lies in the ring, in another table or in its own buffers.",
        Outcome.SAFE,
        "The chain is what was read before the device wrote.",
        clauses="2.7.5.3",
    ),
    row(
        "I18",
        _D,
        "The last descriptor of the table is the head and has a table of one entry.",
        Outcome.ACCEPTED,
        clauses="2.7.5.3",
    ),
    row(
        "I19",
        _D,
        "An indirect descriptor changes between the check of its length and the reading of its table.",
        Outcome.ACCEPTED,
        "Its length is read once.",
        clauses="2.7.5.3",
        like="T07",
    ),
    row("I21", _D, "A table in packed format is given to a split ring.", by="NextOutOfRange ChainTooLong", like="I12"),
)
