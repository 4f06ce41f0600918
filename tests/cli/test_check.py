"""``virtio-test check``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from virtio_test._core import QueueConfig
from virtio_test.checks import EXAMPLES

from tests.cli.conftest import Run

LENGTH = 0x22000


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    """A split ring of 4 whose only chain has a next beyond the table."""
    return image(tmp_path, "NextOutOfRange")[0]


def image(folder: Path, rule: str, which: int = 0) -> tuple[Path, QueueConfig]:
    memory, config = EXAMPLES[rule][which].image()
    path = folder / "guest.img"
    path.write_bytes(memory.read(0, LENGTH))
    return path, config


def options(config: QueueConfig, *, offset: int = 0) -> list[str]:
    places = [f"--{name}={getattr(config, name) + offset:#x}" for name in ("desc", "driver", "device")]
    return [f"--size={config.size}", *places]


def test_a_finding_is_a_line(run: Run, tmp_path: Path) -> None:
    path, config = image(tmp_path, "NextOutOfRange")
    result = run("check", str(path), *options(config), "--index", "2")
    assert (result.status, result.err) == (1, "")
    assert result.out == (
        "NextOutOfRange (VIRTIO 1.4, 2.7.5): next is 4, the table has 4 descriptors; expected: The next field of a "
        "chained descriptor is an index of its table [queue 2, position 0, head 0, descriptor 0]\n"
    )


def test_nothing_broken_is_a_line_too(run: Run, tmp_path: Path) -> None:
    path, config = image(tmp_path, "NextOutOfRange")
    result = run("check", str(path), *options(config), "--avail-from", "1")
    assert (result.status, result.out, result.err) == (0, "nothing is broken in the split ring of 4\n", "")


def test_a_dump_of_the_middle_of_memory(run: Run, tmp_path: Path) -> None:
    path, config = image(tmp_path, "IndirectBadLen")
    above = 0x1_0000_0000
    result = run("check", str(path), *options(config, offset=above), f"--at={above:#x}", "--features=INDIRECT_DESC")
    assert result.status == 1
    assert result.out.startswith("IndirectBadLen")
    assert run("check", str(path), *options(config)).out.count("RingUnmapped") == 0


def test_a_packed_ring_from_a_description(run: Run, tmp_path: Path) -> None:
    path, config = image(tmp_path, "IndirectTooLong", 1)
    about: dict[str, object] = {"size": 4, "packed": True, "features": ["INDIRECT_DESC"], "avail_from": "0x8000"}
    about |= {"desc": config.desc, "driver": hex(config.driver), "device": config.device}
    described = tmp_path / "queue.json"
    described.write_text(json.dumps(about))
    result = run("check", str(path), f"--queue={described}", "--json")
    assert result.status == 1
    told = json.loads(result.out)
    assert told["queue"]["packed"] is True
    assert [(each["rule"], each["position"]) for each in told["findings"]] == [("IndirectTooLong", 0)]
    # An option wins over the description.
    assert run("check", str(path), f"--queue={described}", "--policy=interop").status == 0


def test_used_elements_that_the_driver_has_not_taken(run: Run, tmp_path: Path) -> None:
    path, config = image(tmp_path, "UsedLenTooBig")
    assert run("check", str(path), *options(config)).status == 0
    result = run("check", str(path), *options(config), "--taken=0")
    assert result.status == 1
    assert "UsedLenTooBig" in result.out
    assert run("check", str(path), *options(config), "--taken=1").status == 0


WHOLE = ["--size=4", "--desc=0x1000", "--driver=0x1040", "--device=0x1050"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no size of the queue: give --size"),
        (WHOLE[:3], "no device of the queue"),
        ([*WHOLE, "--desc=-1"], "desc is '-1'"),
        ([*WHOLE, "--desc=0x10000000000000000"], "desc is"),
        ([*WHOLE, "--size=many"], "size is 'many'"),
        ([*WHOLE, "--avail-from=65536"], "avail-from is 65536: give a number below 2**16"),
        ([*WHOLE, "--features=NOTHING_SUCH"], "NOTHING_SUCH"),
        ([*WHOLE, "--packed", "--taken=0"], "--taken is for split rings"),
        ([*WHOLE, "--at=4"], "multiple"),
        ([*WHOLE, "--at=0xfffffffffffffff8"], "2**64"),
        ([*WHOLE, "--policy=lax"], "lax"),
    ],
)
def test_impossible_input_is_one_line(run: Run, dump: Path, arguments: list[str], words: str) -> None:
    result = run("check", str(dump), *arguments)
    assert (result.status, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert words in result.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[" * 60_000, "not JSON"),
        ("[" * 100_000, "more than 65536 bytes"),
        ('{"size": "' + "9" * 30_000 + '", "desc": 0, "driver": 0, "device": 0}', "size is '9999999"),
        ("[]", "not one JSON object"),
        ('{"sizes": 4}', "'sizes' is none of size, "),
        ('{"size": true}', "no desc"),
        ('{"size": true, "desc": 0, "driver": 0, "device": 0}', "size is True"),
        ('{"size": 4, "desc": 0, "driver": 0, "device": 0, "packed": "yes"}', "packed is 'yes'"),
        ('{"size": 4, "desc": 0, "driver": 0, "device": 0, "policy": 1}', "policy is 1"),
        ('{"size": 4, "desc": 0, "driver": 0, "device": 0, "features": 1.5}', "features is 1.5"),
        ('{"size": 4, "desc": 0, "driver": 0, "device": 0, "features": [7]}', "7"),
    ],
)
def test_an_impossible_description_is_one_line(run: Run, dump: Path, text: str, words: str) -> None:
    described = dump.parent / "queue.json"
    described.write_text(text)
    result = run("check", str(dump), f"--queue={described}")
    assert (result.status, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert words in result.err
    assert len(result.err) < 1000


def test_what_is_no_dump_is_one_line(run: Run, tmp_path: Path) -> None:
    odd, empty = tmp_path / "odd", tmp_path / "empty"
    odd.write_bytes(bytes(4097))
    empty.touch()
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path / "pipe", "not a regular file"),
        (odd, "4097 bytes, a dump of memory has a multiple of 8"),
        (empty, "0 bytes"),
        (tmp_path, "not a regular file"),
        (tmp_path / "none", "No such file"),
    ):
        result = run("check", str(path), *WHOLE)
        assert (result.status, result.out) == (2, "")
        assert result.err.count("\n") == 1
        assert words in result.err


def test_the_help_says_what_a_dump_is(run: Run) -> None:
    out = run("check", "--help").out
    for words in ("--at", "--queue", "raw file of guest memory", "exit status 1"):
        assert words in " ".join(out.split())
