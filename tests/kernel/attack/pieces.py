"""What attacks by rings are made of: one request, whole, and the descriptors and tables around it."""

from __future__ import annotations

from typing import Final

from virtio_test.spec.testdevice import REQUEST, RESPONSE

from tests.kernel.attack.case import NUMBER, Chain, Machine, Writes, chain
from tests.kernel.attack.driver import NEXT, REQUESTS, RESPONSES, WRITE, Queue, request
from tests.kernel.attack.program import At, Program

__all__ = ["NOWHERE", "READ", "RESPONSE_AT", "WHOLE", "WRITTEN", "asked", "followed", "joined"]

NOWHERE: Final = 1 << 40
"""No guest has memory there."""

READ: Final[Chain] = (At(REQUESTS), REQUEST.size, 0)
RESPONSE_AT: Final = At(RESPONSES)
WRITTEN: Final[Chain] = (RESPONSE_AT, RESPONSE.size, WRITE)


def followed(link: Chain) -> Chain:
    """The descriptor with NEXT."""
    address, length, flags = link
    return address, length, flags | NEXT


def asked(p: Program) -> None:
    """The bytes of the request that the attacks make, and something in its response's place."""
    p.put_bytes(REQUESTS, request(NUMBER))
    p.fill(RESPONSES, 16, 0xEE)


def joined(*links: Chain) -> Writes:
    """`chain` of descriptors that are joined, over a request that is there."""
    made = chain(*[followed(each) for each in links[:-1]], links[-1])

    def write(p: Program, queue: Queue, machine: Machine) -> None:
        asked(p)
        made(p, queue, machine)

    return write


WHOLE: Final = ((*followed(READ), 1), (*WRITTEN, 0))
"""The request as a table of (address, length, flags, next); a packed one ignores NEXT."""
