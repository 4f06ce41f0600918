"""The pairs of Python handlers run, and a side that answers wrongly is found out."""

from __future__ import annotations

from pathlib import Path

import pytest

from benches.build import built
from benches.pairs import handlers
from benches.peers.plain import BrokenRing
from benches.runner import BenchError, Case, MissingPeer
from tests.benches.smoke import smoke


@pytest.mark.timeout(600)  # the first time, the handler in Rust is compiled
@pytest.mark.parametrize("case", handlers.cases(), ids=lambda case: case.shape)
def test_both_sides_do_the_work(case: Case) -> None:
    smoke(case)


@pytest.mark.parametrize("packed", [False, True])
def test_a_wrong_answer_is_found(monkeypatch: pytest.MonkeyPatch, *, packed: bool) -> None:
    def wrong(_: bytes) -> bytes:
        return bytes(12)

    monkeypatch.setattr(handlers, "handler", wrong)
    with pytest.raises(BenchError, match="wrong answers"):
        handlers.per_request(32, 1, packed=packed)()
    with pytest.raises(BenchError, match="wrong answers"):
        handlers.alone(32, 1)()


def test_a_batch_that_is_answered_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "HUNDRED", 99)
    with pytest.raises(BenchError, match="wrong answers"):
        handlers.at_once(32, 1, packed=False)()
    with pytest.raises(BenchError, match="wrong answers"):
        handlers.array(32, 1)()


def test_work_that_was_not_done_is_found() -> None:
    driver = handlers.Driver(packed=False)
    with pytest.raises(BenchError, match="0 of 512 requests"):
        driver.measure(32, 1, lambda: 0)


def test_a_program_that_cannot_be_built_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built.cache_clear()
    with pytest.raises(BenchError, match="could not build nothing"):
        built("nothing")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(MissingPeer, match="no cargo in PATH"):
        built("handler")


Change = tuple[str, int, bytes]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("desc.next", 0, b"\0\0"), "has no end"),
        (("desc.next", 0, b"\0\4"), "descriptor 1024 of 1024"),
        (("desc.addr", 1, b"\0" * 7 + b"\1"), "not in the memory"),
        (("desc.flags", 0, b"\5\0"), "must not be indirect"),
        (("avail.idx", 0, b"\1\4"), "avail.idx went from 0 to 1025"),
    ],
    ids=["loop", "index", "address", "table", "idx"],
)
def test_the_plain_back_end_keeps_itself_alive(change: Change, text: str) -> None:
    driver = handlers.Driver(packed=False)
    with handlers.plain_queue(driver) as queue:
        driver.add(1)
        name, index, data = change
        driver.memory.write(driver.layout.at(name, index), data)
        with pytest.raises((BrokenRing, BenchError), match=text):
            driver.check(queue.process(handlers.handler, 1), 1)


def test_the_plain_back_end_reads_indirect_tables() -> None:
    driver = handlers.Driver(packed=False)
    with handlers.plain_queue(driver) as queue:
        driver.add(1)
        table = driver.memory.read(driver.layout.at("desc.addr", 0), 32)
        driver.memory.write(0x8000, table)
        entry = (0x8000).to_bytes(8, "little") + (32).to_bytes(4, "little") + b"\4\0\0\0"
        driver.memory.write(driver.layout.at("desc.addr", 0), entry)
        driver.check(queue.process(handlers.handler, 1), 1)
