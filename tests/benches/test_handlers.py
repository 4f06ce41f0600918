"""The pairs of Python handlers run, and a side that answers wrongly is found out."""

from __future__ import annotations

import pytest

from benches.pairs import handlers
from benches.peers.plain import BrokenRing, PlainQueue
from benches.runner import BenchError, Case
from tests.benches.smoke import smoke


@pytest.mark.parametrize("case", handlers.cases(), ids=lambda case: case.shape)
def test_both_sides_do_the_work(case: Case) -> None:
    smoke(case)


@pytest.mark.parametrize("packed", [False, True])
def test_a_wrong_answer_is_found(monkeypatch: pytest.MonkeyPatch, *, packed: bool) -> None:
    def wrong(_: bytes) -> bytes:
        return bytes(12)

    monkeypatch.setattr(handlers, "handler", wrong)
    with pytest.raises(BenchError, match="wrong answers"):
        handlers.per_request(4, 1, packed=packed)()


def test_work_that_was_not_done_is_found() -> None:
    driver = handlers.Driver(4, packed=False)
    with pytest.raises(BenchError, match="0 of 4 requests"):
        driver.measure(lambda: 0, 1)


def test_the_plain_back_end_refuses_a_chain_without_an_end() -> None:
    driver = handlers.Driver(1, packed=False)
    layout = driver.layout
    fd = driver.memory.regions[0].fd
    assert fd is not None
    queue = PlainQueue(
        fd, handlers.MEMORY, size=handlers.SIZE, desc=layout.desc, avail=layout.driver, used=layout.device
    )
    driver.add()
    driver.memory.write(layout.at("desc.flags", 1), b"\x01\x00")
    driver.memory.write(layout.at("desc.next", 1), b"\x00\x00")
    with pytest.raises(BrokenRing, match="has no end"):
        queue.process(handlers.handler)
    queue.close()
