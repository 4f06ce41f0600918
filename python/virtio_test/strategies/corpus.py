"""A folder of cases, one JSON file each: what failed once is tried again, here and by the fuzzers in Rust."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Protocol, Self, TypeVar

from virtio_test.errors import InvalidArgument

from .case import RingCase

__all__ = ["Storable", "load", "save"]


class Storable(Protocol):
    """A `RingCase`, or a program for registers or messages: whatever has a JSON of its own."""

    def to_json(self) -> str:
        """One line, with the key ``virtio-test`` that says what it is."""
        ...

    @classmethod
    def from_json(cls, text: str | bytes, /) -> Self:
        """The same back."""
        ...


K = TypeVar("K", bound=Storable)


def save(case: Storable, folder: str | Path) -> Path:
    """Write the case to the folder, which is made if need be; the name says what it is, the same for the same case."""
    text = case.to_json() + "\n"
    words = "".join(each if each.isalnum() else "-" for each in str(case))[:60].strip("-")
    path = Path(folder) / f"{words}-{sha256(text.encode()).hexdigest()[:8]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load(folder: str | Path, kind: type[K] = RingCase) -> Iterator[tuple[str, K]]:
    """(name of the file, case) of every case of the kind in the folder, by name; those of other kinds are passed over.

    As a test of your own::

        @pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in load("corpus")])
        def test_what_failed_once(case):
            case.check()

    Raises:
        InvalidArgument: a file is no case of any kind; it says which.
    """
    wanted = _FORMATS[kind.__name__]
    for path in sorted(Path(folder).glob("*.json")):
        text = path.read_bytes()
        try:
            if _format(text) == wanted:
                yield path.stem, kind.from_json(text)
        except InvalidArgument as error:
            raise InvalidArgument(f"{path}: {error}") from error


_FORMATS: Final = {"RingCase": "ring-case", "RegisterProgram": "register-program", "MessageProgram": "message-program"}


def _format(text: bytes) -> str:
    try:
        found: Any = json.loads(text)["virtio-test"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"this is no case: {error!r}") from error
    if found not in _FORMATS.values():
        raise InvalidArgument(f"{found!r} is no kind of case: {', '.join(_FORMATS.values())}")
    return found
