"""Rings, legal and broken, as data: for Hypothesis, for plain random numbers, and for all cases in turn.

A `RingCase` says how a legal ring is made, what is changed in it, and what must come of it under either policy:

    >>> from virtio_test.strategies import cases
    >>> case = next(cases("A04"))
    >>> case
    RingCase(row='A04', title='head 0x8', writes=(Put(field='avail.ring', value=8, place=0),), ...)
    >>> case.run("strict").rule
    'HeadOutOfRange'

`case.check()` holds it against our core, or against the device end of your own; `case.script()` is a Python script that
replays it; `case.to_json()` is what a corpus keeps, and the module `codec` describes the format.
"""

from __future__ import annotations

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
    "every",
    "legal_messages",
    "legal_program",
    "load",
    "message_case",
    "message_cases",
    "random_case",
    "register_case",
    "register_cases",
    "save",
]
