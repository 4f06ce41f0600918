"""A folder of cases, one JSON file each: what failed once is tried again, here and by the fuzzers in Rust."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from virtio_test.errors import InvalidArgument

from .case import RingCase

__all__ = ["load", "save"]


def save(case: RingCase, folder: str | Path) -> Path:
    """Write the case to the folder, which is made if need be; the name says what it is, the same for the same case."""
    text = case.to_json() + "\n"
    words = "".join(each if each.isalnum() else "-" for each in str(case))[:60].strip("-")
    path = Path(folder) / f"{words}-{sha256(text.encode()).hexdigest()[:8]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load(folder: str | Path) -> Iterator[tuple[str, RingCase]]:
    """(name of the file, case) of every ring case in the folder, by name; an `InvalidArgument` says which is broken.

    As a test of your own::

        @pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in load("corpus")])
        def test_what_failed_once(case):
            case.check()
    """
    for path in sorted(Path(folder).glob("*.json")):
        try:
            yield path.stem, RingCase.from_json(path.read_bytes())
        except InvalidArgument as error:
            raise InvalidArgument(f"{path}: {error}") from error
