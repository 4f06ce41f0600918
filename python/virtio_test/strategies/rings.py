"""The Hypothesis strategies about rings, memory and requests.

Cases are made by the same generators as everywhere else; the plain choice comes first in each of them, so what
Hypothesis shrinks to is a small case in a plain scene. In a test, `case.check()` and `with case.play() as scene` add to
an exception the case itself and the script that replays it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Final, Literal, TypeVar

from hypothesis import strategies as st

from virtio_test._core import Policy
from virtio_test.device import RING_FEATURES
from virtio_test.features import FeatureSet

from .case import RingCase
from .draw import Draw
from .noise import chaos_case
from .rows import mutators
from .traffic import Request, any_map, any_size, any_start, legal_case, partition

__all__ = [
    "chains",
    "chaos",
    "defects",
    "drawn",
    "feature_sets",
    "legal",
    "memory_maps",
    "partitions",
    "policies",
    "queue_sizes",
    "queue_starts",
]

T = TypeVar("T")
_VERSION_1: Final = FeatureSet("VERSION_1")
_SWITCHES: Final = tuple(name for name in Policy.interop.switches() if name != "max_indirect")


@lru_cache(4096)
def _between(low: int, high: int) -> st.SearchStrategy[int]:
    """Making a strategy anew takes longer than drawing from it."""
    return st.integers(low, high)


class HypothesisDraw:
    """Decisions of Hypothesis; the plain choice comes first, so that it is what shrinking ends at."""

    __slots__ = ("_draw",)

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def choice(self, options: Sequence[T], /) -> T:
        """As `Draw` says."""
        return options[self._draw(_between(0, len(options) - 1))]

    def integer(self, low: int, high: int, /) -> int:
        """As `Draw` says."""
        return self._draw(_between(low, high))

    def some(self, options: Sequence[T], /) -> T:
        """As `Draw` says."""
        return options[self._draw(_between(0, len(options) - 1))]

    def vary(self, low: int, high: int, _usual: int, /) -> int:
        """As `Draw` says."""
        return self._draw(_between(low, high))


@st.composite
def _made(draw: st.DrawFn, generator: Callable[[Draw], T]) -> T:
    return generator(HypothesisDraw(draw))


@st.composite
def _made_by_one(draw: st.DrawFn, generators: Sequence[Callable[[Draw], T]]) -> T:
    return draw(st.sampled_from(generators))(HypothesisDraw(draw))


def drawn(generator: Callable[[Draw], T]) -> st.SearchStrategy[T]:
    """What a generator makes, as a strategy: `drawn(any_program)`; it takes a `Draw` and nothing else."""
    return _made(generator)


# ---------------------------------------------------------------------------------------------------------------- cases


def legal(
    *, end: Literal["device", "driver"] = "device", packed: bool | None = None, features: int | None = None
) -> st.SearchStrategy[RingCase]:
    """Legal traffic on any queue: the case says which chains, or used buffers, must be handed out.

    Args:
        end: which end is judged.
        packed: the format; either when None.
        features: bits of INDIRECT_DESC, EVENT_IDX and IN_ORDER; any when None.
    """
    return drawn(lambda draw: legal_case(draw, end=end, packed=packed, features=features))


@st.composite
def chains(
    draw: st.DrawFn,
    requests: st.SearchStrategy[bytes],
    responses: st.SearchStrategy[int],
    *,
    packed: bool | None = None,
    most: int = 4,
) -> RingCase:
    """A legal ring with requests of yours in it, cut into descriptors in any way: for testing a device's handler.

    `responses` are the bytes of room for the answer to each. At most `most` requests; those that do not fit into the
    queue at once are left out. The case's buffers carry what stands in them::

        @given(chains(st.binary(max_size=64), st.integers(0, 64)))
        def test_my_handler(case):
            with case.play() as scene:
                scene.device.process(my_handler)
                for number, written, answer in scene.returned():
                    assert answer == expected(case.buffers[number].data)[:written]
    """
    wanted: list[Request] = draw(st.lists(st.tuples(requests, responses), min_size=1, max_size=most))
    case = legal_case(HypothesisDraw(draw), packed=packed, requests=wanted)
    # What came in a later round is not in the ring yet.
    outcome = case.interop
    assert outcome is not None
    assert outcome.segments is not None
    count = len(case.buffers)
    first = outcome._replace(chains=count, segments=outcome.segments[:count])
    return case.but(title="chains", later=(), interop=first, strict=first)


def defects(
    row: str | Iterable[str] | None = None,
) -> st.SearchStrategy[RingCase]:
    """Rings with one defect, of one row of the catalogue or of several; of any when None.

    Raises:
        InvalidArgument: no such row, or none that is about rings; `ROWS` has those that are.
    """
    return _made_by_one(mutators(row))


def chaos(*, end: Literal["device", "driver"] = "device", packed: bool | None = None) -> st.SearchStrategy[RingCase]:
    """Legal rings of which any fields are set to anything, between any calls; nothing is known of what comes of it."""
    return drawn(lambda draw: chaos_case(draw, end=end, packed=packed))


# ---------------------------------------------------------------------------------------------------------------- parts


def memory_maps() -> st.SearchStrategy[list[tuple[int, int]]]:
    """Regions for `GuestMemory`: below 64 KiB, with borders and holes from 0x8000 on."""
    return drawn(lambda draw: [(address, size) for address, size, _ in any_map(draw)[0]])


def queue_sizes(*, packed: bool) -> st.SearchStrategy[int]:
    """Sizes that a queue of the format may have; packed ones need not be powers of two."""
    return drawn(lambda draw: any_size(draw, packed=packed))


def queue_starts(size: int, *, packed: bool) -> st.SearchStrategy[int]:
    """Where both indices of a queue stand, near all that they wrap at: arguments of `QueueState`."""
    return drawn(lambda draw: any_start(draw, packed=packed, size=size))


def feature_sets(
    offered: FeatureSet = RING_FEATURES, *, always: FeatureSet = _VERSION_1
) -> st.SearchStrategy[FeatureSet]:
    """What a driver may accept of an offer: `always`, and any of the others."""
    bits = (offered - always).bit_numbers()
    return st.sets(st.sampled_from(bits)).map(
        lambda found: always | FeatureSet.from_bits(sum(1 << bit for bit in found))
    )


def policies() -> st.SearchStrategy[Policy]:
    """The two named policies, and those with any switches turned."""
    turned: dict[str, st.SearchStrategy[Any]] = dict.fromkeys(_SWITCHES, st.booleans())
    return drawn_policy(st.fixed_dictionaries({}, optional=turned))


@st.composite
def drawn_policy(draw: st.DrawFn, switches: st.SearchStrategy[dict[str, Any]]) -> Policy:
    """A policy with some switches turned."""
    return Policy(draw(st.sampled_from(("interop", "strict"))), **draw(switches))


def partitions(length: int, *, most: int = 6) -> st.SearchStrategy[list[int]]:
    """Lengths of up to `most` parts that are `length` bytes together, none of them empty."""
    return drawn(lambda draw: partition(draw, length, most))
