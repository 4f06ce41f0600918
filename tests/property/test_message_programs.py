"""Message programs against our back-end, over a real socket: legal ones are served, each defect is what it must be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test import strategies
from virtio_test.devices.base import BaseDevice
from virtio_test.errors import InvalidArgument
from virtio_test.strategies import RandomDraw
from virtio_test.strategies.message_rows import MESSAGE_ROWS, message_case, message_cases
from virtio_test.strategies.messages import FrontEndFacts, MessageProgram, MessageWriter, any_messages, legal_messages
from virtio_test.strategies.registers import ProgramFailed
from virtio_test.transport.vhost_user.backend import Backend

from tests.unit.world import ServerThread, eventually, mapped_files, open_fds

FACTS = FrontEndFacts(queues=2)
CASES = list(message_cases(facts=FACTS))


class Server(ServerThread):
    """A back-end of two queues in a thread."""

    def __init__(self, path: Path) -> None:
        device = BaseDevice(7, handlers={0: bytes.upper, 1: bytes.upper}, queue_sizes=(16, 16))
        self.backend = Backend(device, path=path)
        super().__init__(path, self.backend)

    def idle(self) -> None:
        """Wait until the last front-end has been taken leave of."""
        assert eventually(lambda: self.backend.session is None)

    def serves(self) -> None:
        good = MessageWriter(FACTS)
        good.begin()
        good.run()
        good.program().check(self.path)
        self.idle()


@pytest.fixture(name="server", scope="module")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with closing(Server(tmp_path_factory.mktemp("messages") / "socket")) as server:
        yield server


@pytest.mark.parametrize("case", [pytest.param(each, id=str(each), marks=pytest.mark.row(each.row)) for each in CASES])
def test_each_defect_comes_to_what_it_must(
    server: Server, case: MessageProgram, caplog: pytest.LogCaptureFixture
) -> None:
    case.check(server.path)
    server.idle()
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == (case.rule is not None), said
    if case.rule is not None:
        assert case.rule in said[0]
    server.serves()


@given(seed=st.integers(0, 1 << 32))
def test_a_front_end_that_keeps_the_rules_is_served(server: Server, seed: int) -> None:
    legal_messages(RandomDraw(Random(seed)), facts=FACTS).check(server.path)
    server.idle()
    assert server.backend.last_error is None or server.backend.last_error.rule != "Truncated"


def test_whatever_is_said_the_next_one_is_served(server: Server) -> None:
    """And neither a descriptor nor a mapping is left of it (V12)."""
    server.serves()
    before = (open_fds(), mapped_files())
    for seed in range(150):
        any_messages(RandomDraw(Random(seed)), facts=FACTS).run(server.path)
        server.idle()
    server.serves()
    assert (open_fds(), mapped_files()) == before


@given(seed=st.integers(0, 1 << 32))
def test_there_and_back(seed: int) -> None:
    draw = RandomDraw(Random(seed))
    for program in (any_messages(draw), message_case(draw), legal_messages(draw)):
        assert MessageProgram.from_json(program.to_json()) == program
        names: dict[str, Any] = dict(vars(strategies))
        assert eval(repr(program), names) == program


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"virtio-test": "register-program", "version": 1}'])
def test_what_is_no_program(text: str) -> None:
    with pytest.raises(InvalidArgument):
        MessageProgram.from_json(text)


def test_rows() -> None:
    assert {each.row for each in CASES} == set(MESSAGE_ROWS)
    assert len({str(each) for each in CASES}) == len(CASES)
    with pytest.raises(InvalidArgument, match="A01"):
        list(message_cases("A01"))


def test_a_back_end_that_does_something_else_is_found_out(server: Server) -> None:
    """One that serves what it must refuse: here, a message that is none of the defect's."""
    case = next(message_cases("M05", facts=FACTS))
    good = MessageWriter(FACTS)
    good.begin()
    good.memory()
    harmless = good.messages[-1]._replace(answer="refused")
    with pytest.raises(ProgramFailed, match=r"done came back") as caught:
        MessageProgram(row=case.row, title=case.title, messages=(*good.messages, harmless)).check(server.path)
    assert "This replays it" in caught.value.__notes__[1]
    server.idle()


def test_a_script_replays_it(server: Server, tmp_path: Path) -> None:
    good = MessageWriter(FACTS)
    good.begin()
    good.memory()
    wrong = good.messages[-1]._replace(answer="refused")
    for number, messages in enumerate((good.messages, (*good.messages, wrong))):
        script = tmp_path / f"{number}.py"
        script.write_text(MessageProgram(title="a script", messages=tuple(messages)).script())
        ran = subprocess.run([sys.executable, script, server.path], capture_output=True, text=True, check=False)
        assert (ran.returncode, len(ran.stderr.splitlines())) == (number, number), ran.stderr
        server.idle()
