"""The pairs of packets run: both back-ends pass on what their drivers send, or send what these get."""

from __future__ import annotations

import pytest

from benches.pairs import net
from benches.runner import BenchError, Case
from tests.benches.smoke import smoke

pytestmark = pytest.mark.peers

CASES = {case.shape: case for case in net.cases()}
FEW = (
    "64 B, split, to the back-end",
    "64 B, split, from the back-end",
    "64 B, packed, both ways",
    "1518 B, split, both ways",
)


def test_every_shape_of_the_table_is_there() -> None:
    assert len(CASES) == 12
    assert set(FEW) <= set(CASES)
    assert all(case.must is not None and case.aim is not None for case in CASES.values())


@pytest.mark.parametrize("shape", FEW)
def test_both_sides_do_the_work(shape: str) -> None:
    case: Case = CASES[shape]
    smoke(case)


def test_packets_that_do_not_arrive_are_found_out() -> None:
    class Lossy:
        def tell(self, _: str) -> str:
            return ""

        def stats(self) -> dict[str, int]:
            return {"TX-packets": 1000, "RX-packets": 0, "TX-bytes": 64_000, "RX-bytes": 0}

        def counted(self) -> tuple[int, int]:
            return 700, 0

    side = net.Side(Lossy(), Lossy(), "to", 64, 0.0)  # type: ignore[arg-type]
    with pytest.raises(BenchError, match="has sent 1000 packets, and 700 came"):
        side.check()
