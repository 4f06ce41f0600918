"""`RingCase`: one ring, what is wrong with it, what happens to it, and what must come of it. Plain data.

A legal ring is made by a real `DriverQueue`; `writes` change it through `RingLayout`; then the end in question is
built, does what `later` says, and at last takes everything there is. The same case is judged under either policy.

The canonical map holds everything below 64 KiB, so that a fuzzer can take the image as it is:

| from | what |
|---|---|
| 0 | one page of data: 0 is an address like any other |
| 0x1000 | the ring, its three areas one after another |
| 0x4000 | the indirect tables, `entries` descriptors each |
| 0x8000 | data |
| 0xf000 | one page of data in a region of its own |
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, fields, make_dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self, cast

from virtio_test._core import Policy, QueueConfig, QueueState, RingLayout
from virtio_test.errors import InvalidArgument

from .acts import Act, Add, Buffer, Change, Race

if TYPE_CHECKING:
    from collections.abc import Generator

    from .scene import MakeDevice, Scene, Stage

__all__ = ["EDGE", "HOLE", "LOW", "PAGE", "RAM", "RING", "TABLES", "CaseFailed", "Outcome", "RingCase"]

PAGE: Final = 4096
LOW: Final = 0
RING: Final = 0x1000
TABLES: Final = 0x4000
DATA: Final = 0x8000
EDGE: Final = 0xF000
HOLE: Final = 0x10000
RAM: Final = ((0, EDGE, True), (EDGE, PAGE, True))

AVAIL: Final = 1 << 7
USED: Final = 1 << 15
RING_PACKED: Final = 1 << 34
INDEX: Final = 3
"""Number of the queue in its device, so that no message has it right by accident."""

_ENDS: Final = ("device", "driver")
_AREAS: Final = ("size", "desc", "driver", "device")
_SWITCHES: Final = tuple(Policy.strict.switches())

Name = Literal["interop", "strict"]
Segments = tuple[tuple[int, int, bool], ...]


class Outcome(NamedTuple):
    """What comes of a case: how many chains (driver end: used buffers) are handed out, and the rule found broken then.

    `built` is False when the queue itself is refused. `segments`, of every chain, and `used`, the number and the
    written bytes of every used buffer, are compared unless None.
    """

    chains: int
    rule: str | None = None
    built: bool = True
    segments: tuple[Segments, ...] | None = None
    used: tuple[tuple[int, int], ...] | None = None

    def agrees(self, found: Outcome) -> bool:
        """Whether that is what was expected."""
        same = (self.chains, self.rule, self.built) == (found.chains, found.rule, found.built)
        return same and self.segments in (None, found.segments) and self.used in (None, found.used)


class CaseFailed(AssertionError):
    """Something else came of a case than what must."""


@cache
def _stage() -> Stage:
    from .scene import STAGE

    return STAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class RingCase:
    """One case; `codec` says what each field is, by its key in JSON."""

    row: str = ""
    title: str = ""
    end: Literal["device", "driver"] = "device"
    packed: bool = False
    size: int = 8
    features: int = 1 << 28
    start: int = 0
    switches: dict[str, bool | int] = field(default_factory=dict[str, bool | int])
    regions: tuple[tuple[int, int, bool], ...] = RAM
    ring: int = RING
    tables: int = TABLES
    entries: int = 16
    areas: dict[str, int] = field(default_factory=dict[str, int])
    state: tuple[int, int] | None = None
    buffers: tuple[Buffer, ...] = ()
    writes: tuple[Change, ...] = ()
    later: tuple[Act, ...] = ()
    interop: Outcome | None = None
    strict: Outcome | None = None

    def __post_init__(self) -> None:
        """Names that nobody knows are refused here, values where they are used."""
        if self.end in _ENDS and not self.switches and not self.areas:
            return
        for what, given, known in (
            ("end", (self.end,), _ENDS),
            ("switch", self.switches, _SWITCHES),
            ("area", self.areas, _AREAS),
        ):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise InvalidArgument(f"{unknown[0]!r} is no {what}: {', '.join(known)}")

    # ---------------------------------------------------------------------------------------------- what it stands for

    def layout(self) -> RingLayout:
        """Where the fields of the ring lie."""
        return RingLayout.contiguous(self.size, self.ring, packed=self.packed)

    def table(self) -> RingLayout:
        """The indirect tables, as one long table."""
        return RingLayout(32768, packed=self.packed, desc=self.tables)

    def policy(self, name: Name = "strict") -> Policy:
        """The named policy with the case's switches."""
        if not self.switches:
            return Policy.strict if name == "strict" else Policy.interop
        return Policy(name, **cast("dict[str, Any]", self.switches))

    def config(self, name: Name = "strict", *, judged: bool = True) -> QueueConfig:
        """Of the judged end, or of its legal peer."""
        layout = self.layout()
        places = {"size": self.size, "desc": layout.desc, "driver": layout.driver, "device": layout.device}
        places |= self.areas if judged else {}
        size = places.pop("size")
        features = self.features | RING_PACKED * self.packed
        policy = self.policy(name) if judged else Policy.interop
        return QueueConfig(size, **places, index=INDEX, features=features, policy=policy)

    def begin(self, *, judged: bool = True) -> QueueState:
        """Where the judged end, or its legal peer, goes on."""
        avail, used = self.state if judged and self.state is not None else (self.start, self.start)
        return QueueState(avail, used)

    def outcome(self, name: Name = "strict") -> Outcome | None:
        """What must come of it under that policy; None where nothing is known."""
        return self.strict if name == "strict" else self.interop

    @property
    def tabled(self) -> bool:
        """Whether the driver needs room for indirect tables."""
        added = [act.buffer for act in self.later if isinstance(act, Add)]
        return any(buffer.indirect for buffer in (*self.buffers, *added))

    @property
    def traced(self) -> bool:
        """Whether it needs a memory that can change at an access."""
        return any(isinstance(act, Race) for act in self.later)

    def __str__(self) -> str:
        ring = "packed" if self.packed else "split"
        return f"{self.row or self.end}-{ring}-{self.title}".replace(" ", "_")

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __repr__(self) -> str:
        """What differs from a plain ring; evaluates back with the names of `virtio_test.strategies`."""
        plain = type(self)()
        said = (
            f"{each.name}={getattr(self, each.name)!r}"
            for each in fields(self)
            if getattr(self, each.name) != getattr(plain, each.name)
        )
        return f"RingCase({', '.join(said)})"

    def but(self, **changes: Any) -> Self:
        """The same with some fields changed."""
        return replace(self, **changes)

    # ----------------------------------------------------------------------------------------------------- what it does

    @contextmanager
    def play(
        self, policy: Name = "strict", *, device: MakeDevice | None = None, traced: bool = False
    ) -> Generator[Scene]:
        """The case on stage, in memory that the next one uses again; the judged end is built, and nothing has happened.

        With `traced` the memory records every access of queues and chains (`scene.memory.trace`).
        An exception that leaves the block carries the case and the script that replays it.
        """
        from .scene import STAGE, Scene, our_device

        memory = STAGE.memory(self, traced=traced)
        try:
            yield Scene(self, policy, memory=memory, device=device or our_device)
        except Exception as error:
            error.add_note(f"{self!r}\n\nThis replays it:\n\n{self.script(policy)}")
            error.__dict__["case"] = self
            raise
        STAGE.give_back(self, memory)

    def run(self, policy: Name = "strict", *, device: MakeDevice | None = None) -> Outcome:
        """What comes of it at our end, or at the device end that `device(memory, config, state)` makes."""
        found = self._found(policy) if device is None else None
        if found is not None:
            return found
        with self.play(policy, device=device) as scene:
            return scene.run()

    def _found(self, policy: Name) -> Outcome | None:
        """What comes of it at our end, in one call; None where it is unusual, and must be played."""
        return _stage().outcome(self, self.policy(policy))

    def check(self, policy: Name | None = None, *, device: MakeDevice | None = None) -> None:
        """Hold what comes of it against what must, under that policy, or under both.

        Raises:
            CaseFailed: something else came of it; the error carries the case and the script that replays it.
        """
        names: tuple[Name, ...] = ("interop", "strict") if policy is None else (policy,)
        for name in names:
            wanted = self.strict if name == "strict" else self.interop
            found = self._found(name) if device is None else None
            if found is not None and (wanted is None or wanted == found or wanted.agrees(found)):
                continue
            with self.play(name, device=device) as scene:
                found = scene.run() if found is None else found
                if wanted is not None and not wanted.agrees(found):
                    raise CaseFailed(f"{self} under {name}: {found} came of it, and {wanted} is what must")

    def script(self, policy: Name = "strict") -> str:
        """A standalone script of plain calls that replays it: it exits with 0 when what must come of it comes of it."""
        from .script import script

        return script(self, policy)

    # ------------------------------------------------------------------------------------------------------------- JSON

    def to_json(self) -> str:
        """One line of JSON; what has its default is left out."""
        from .codec import encode

        return encode(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The case back.

        Raises:
            InvalidArgument: not JSON, not a case, of another version, or with a key or an act that is not known.
        """
        from .codec import decode

        return cls(**decode(text))


OpenCase: Final[Any] = make_dataclass(
    "RingCase", [(each.name, each.type, each) for each in fields(RingCase)], slots=True, kw_only=True
)
"""What a generator fills before it is `closed`: nothing is checked, and fields can be set.

A frozen dataclass sets each of its fields by a call, which was a tenth of all that a case costs.
"""


def closed(case: Any) -> RingCase:
    """The open case itself, as one of ours, which has the same slots."""
    case.__class__ = RingCase
    return case
