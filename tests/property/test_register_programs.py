"""Register programs against our devices: legal ones do no wrong, a defect comes to what it must, chaos to nothing."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test import strategies
from virtio_test._core import GuestMemory
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.devices.base import BaseDevice
from virtio_test.errors import InvalidArgument, RuleViolation
from virtio_test.features import FeatureSet
from virtio_test.strategies import RandomDraw, drawn
from virtio_test.strategies.register_rows import REGISTER_ROWS, register_case, register_cases
from virtio_test.strategies.registers import (
    Facts,
    MmioTarget,
    PciTarget,
    Peek,
    ProgramFailed,
    RegisterProgram,
    TransportName,
    Writer,
    any_program,
    legal_program,
)
from virtio_test.transport.bank import TRANSPORT_FEATURES
from virtio_test.transport.mmio import VirtioMmio
from virtio_test.transport.pci.function import VirtioPci

TRANSPORTS: tuple[TransportName, ...] = ("pci", "mmio")
SPACE = ConfigLayout(("level", "le32"), ("mode", "le32", "rw"))


def upper() -> BaseDevice:
    return BaseDevice(7, handlers={0: bytes.upper, 1: bytes.upper}, queue_sizes=(8, 8), config=ConfigSpace(SPACE))


def target(transport: TransportName, *, more: FeatureSet | None = None) -> PciTarget | MmioTarget:
    device = upper()
    offered = device.features if more is None else device.features | more
    memory = GuestMemory([(0, 1 << 16)], backing="anonymous")
    if transport == "pci":
        return PciTarget(VirtioPci(device, memory=memory, offered=offered))
    return MmioTarget(VirtioMmio(device, memory=memory, offered=offered))


FACTS = Facts.of(upper())
CASES = [case for transport in TRANSPORTS for case in register_cases(transport=transport, facts=FACTS)]


@pytest.mark.parametrize("case", [pytest.param(each, id=str(each), marks=pytest.mark.row(each.row)) for each in CASES])
def test_each_defect_comes_to_what_it_must(case: RegisterProgram) -> None:
    against = target(case.transport)
    case.check(against)
    assert set(against.rules()) == set(case.rules)


def test_every_row_has_cases_and_no_case_is_twice() -> None:
    assert {each.row for each in CASES} == set(REGISTER_ROWS)
    assert len({str(each) for each in CASES}) == len(CASES)
    with pytest.raises(InvalidArgument, match="A01"):
        list(register_cases("A01"))


@pytest.mark.parametrize("transport", TRANSPORTS)
@given(data=st.data())
def test_a_driver_that_keeps_the_rules_is_told_of_none(transport: TransportName, data: st.DataObject) -> None:
    program = data.draw(drawn(lambda draw: legal_program(draw, transport, facts=FACTS)))
    against = target(transport)
    program.check(against)
    assert against.rules() == {}


@pytest.mark.parametrize("transport", TRANSPORTS)
@given(data=st.data())
def test_whatever_is_written_nothing_raises_and_a_reset_heals(transport: TransportName, data: st.DataObject) -> None:
    foreign = FeatureSet("NOTIF_CONFIG_DATA") if transport == "mmio" else FeatureSet()
    against = target(transport, more=TRANSPORT_FEATURES - foreign)
    facts = Facts.of(upper(), against.bank.offered)
    data.draw(drawn(lambda draw: any_program(draw, transport, facts=facts))).run(against)
    assert all(isinstance(error, RuleViolation) for error in against.bank.errors)
    before = sum(against.rules().values())
    if isinstance(against, PciTarget) and not against.function.awake:
        against.function.reset()
    writer = Writer(transport, facts)
    writer.bring_up()
    writer.program().check(against)
    assert sum(against.rules().values()) == before


@given(seed=st.integers(0, 1 << 32))
def test_there_and_back(seed: int) -> None:
    draw = RandomDraw(Random(seed))
    for transport in TRANSPORTS:
        for program in (any_program(draw, transport), register_case(draw, transport=transport)):
            assert RegisterProgram.from_json(program.to_json()) == program
            names: dict[str, Any] = dict(vars(strategies))
            assert eval(repr(program), names) == program


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"virtio-test": "ring-case", "version": 1}', "3"])
def test_what_is_no_program(text: str) -> None:
    with pytest.raises(InvalidArgument):
        RegisterProgram.from_json(text)


def test_a_device_that_does_something_else_is_found_out() -> None:
    """Every register that a case looks at counts: one wrong bit anywhere fails some case of it."""
    wrong = target("mmio")
    assert isinstance(wrong, MmioTarget)
    wrong.page.registers["Status"] = lambda value: value | 0x20
    with pytest.raises(ProgramFailed, match=r"D04-mmio.*reads") as caught:
        next(register_cases("D04", transport="mmio", facts=FACTS)).check(wrong)
    assert "This replays it" in caught.value.__notes__[1]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_script_replays_it(transport: TransportName, tmp_path: Path) -> None:
    program = next(register_cases("Q02", transport=transport))
    wrong = next(step._replace(value=0x55) for step in program.steps if isinstance(step, Peek) and step.value)
    for number, steps in enumerate((program.steps, (*program.steps, wrong))):
        script = tmp_path / f"{number}.py"
        script.write_text(replace(program, steps=steps).script())
        ran = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
        assert (ran.returncode, len(ran.stderr.splitlines())) == (number, number), ran.stderr
