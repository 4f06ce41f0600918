"""Rings, register and message programs, legal and broken, as data: drawn by Hypothesis or at random, or all in turn.

A `RingCase` says how a legal ring is made, what is changed in it, and what must come of it under either policy:

    >>> from virtio_test.strategies import cases
    >>> case = next(cases("A04"))
    >>> case.title, case.writes
    ('head 0x8', (Put(field='avail.ring', value=8, place=0),))
    >>> case.run("strict").rule
    'HeadOutOfRange'

`case.check()` holds it against our core, or against a device end of your own; `case.play()` puts it on stage for a test
of yours; `case.script()` is a Python script that replays it; `case.to_json()` is what a corpus keeps (`codec` describes
the format).

| strategy | what |
|---|---|
| `chains` | a legal ring with your requests in it, cut into descriptors in any way |
| `legal` | legal traffic on any queue in any map of memory, at either end |
| `defects` | one defect in a legal ring, of one row of the catalogue or of any |
| `chaos` | any fields set to anything, between any calls |
| `memory_maps`, `queue_sizes`, `queue_starts`, `feature_sets`, `policies`, `partitions` | the parts |

| `drawn` | any other generator of this package, such as `any_program` and `any_messages`, as a strategy |

These need Hypothesis (`pip install "virtio-test[hypothesis]"`). `cases` and `random_case` make the same without it.
What a driver writes to registers, and what a front-end says to a vhost-user back-end, is in `registers` and `messages`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from .acts import (
    Act,
    Add,
    Buffer,
    Change,
    Copy,
    Fill,
    Look,
    Map,
    Pop,
    Publish,
    Push,
    Put,
    Race,
    Take,
    Unmap,
    Use,
    Write,
)
from .case import CaseFailed, Outcome, RingCase
from .corpus import load, save
from .draw import Draw, RandomDraw, every
from .message_rows import MESSAGE_ROWS, message_case, message_cases
from .messages import (
    ANSWERS,
    FrontEndFacts,
    MessageProgram,
    MessageWriter,
    Say,
    any_messages,
    legal_messages,
)
from .register_rows import REGISTER_ROWS, register_case, register_cases
from .registers import (
    Facts,
    MmioTarget,
    PciTarget,
    Peek,
    Poke,
    ProgramFailed,
    RegisterProgram,
    Target,
    Turn,
    any_program,
    legal_program,
)
from .rows import ROWS, cases, random_case
from .scene import Scene

if TYPE_CHECKING:
    from .rings import (
        chains,
        chaos,
        defects,
        drawn,
        feature_sets,
        legal,
        memory_maps,
        partitions,
        policies,
        queue_sizes,
        queue_starts,
    )

__all__ = [
    "ANSWERS",
    "MESSAGE_ROWS",
    "REGISTER_ROWS",
    "ROWS",
    "Act",
    "Add",
    "Buffer",
    "CaseFailed",
    "Change",
    "Copy",
    "Draw",
    "Facts",
    "Fill",
    "FrontEndFacts",
    "Look",
    "Map",
    "MessageProgram",
    "MessageWriter",
    "MmioTarget",
    "Outcome",
    "PciTarget",
    "Peek",
    "Poke",
    "Pop",
    "ProgramFailed",
    "Publish",
    "Push",
    "Put",
    "Race",
    "RandomDraw",
    "RegisterProgram",
    "RingCase",
    "Say",
    "Scene",
    "Take",
    "Target",
    "Turn",
    "Unmap",
    "Use",
    "Write",
    "any_messages",
    "any_program",
    "cases",
    "chains",
    "chaos",
    "defects",
    "drawn",
    "every",
    "feature_sets",
    "legal",
    "legal_messages",
    "legal_program",
    "load",
    "memory_maps",
    "message_case",
    "message_cases",
    "partitions",
    "policies",
    "queue_sizes",
    "queue_starts",
    "random_case",
    "register_case",
    "register_cases",
    "save",
]

_HYPOTHESIS: Final = {
    **dict.fromkeys(("chains", "chaos", "defects", "drawn", "feature_sets", "legal", "memory_maps"), "rings"),
    **dict.fromkeys(("partitions", "policies", "queue_sizes", "queue_starts"), "rings"),
}
"""Strategies to their modules, which are imported when they are first used: Hypothesis is an extra."""


def __getattr__(name: str) -> Any:
    if name not in _HYPOTHESIS:
        raise AttributeError(f"module 'virtio_test.strategies' has no attribute {name!r}")
    from importlib import import_module

    try:
        import_module("hypothesis")
    except ImportError as error:
        raise ImportError(f"strategies.{name} needs Hypothesis: pip install 'virtio-test[hypothesis]'") from error
    return getattr(import_module(f"{__name__}.{_HYPOTHESIS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HYPOTHESIS})
