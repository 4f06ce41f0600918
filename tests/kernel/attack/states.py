"""Attacks by features, the device status and resets: rows of 2.7."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from virtio_test.features import FeatureSet
from virtio_test.spec.pci import NO_VECTOR, CapType
from virtio_test.spec.status import Status
from virtio_test.spec.testdevice import QUEUE_SIZE

from tests.kernel.attack.case import NUMBER, Case, Machine, registers, verdict
from tests.kernel.attack.driver import BASIC, CONFIG_VECTOR, QUEUE_VECTOR, Queue, answer, kick, reset
from tests.kernel.attack.pieces import asked
from tests.kernel.attack.program import Program, Results

__all__ = ["CASES"]

_ACKNOWLEDGED: Final = int(Status.ACKNOWLEDGE | Status.DRIVER)
_FEATURES_OK: Final = _ACKNOWLEDGED | int(Status.FEATURES_OK)
_LIVE: Final = _FEATURES_OK | int(Status.DRIVER_OK)


def _accept(p: Program, features: FeatureSet) -> None:
    """From a reset to FEATURES_OK with these, whatever comes of it."""
    reset(p, "before")
    p.out("device_status", _ACKNOWLEDGED)
    for select in range(4):
        p.out("driver_feature_select", select)
        p.out("driver_feature", features.word(select))
    p.out("device_status", _FEATURES_OK)
    p.read("status", "device_status")


def _features(rows: str, name: str, features: FeatureSet, rules: str) -> Case:
    """A choice of features that no device takes; DRIVER_OK after it does nothing."""

    def run(p: Program, _: Machine) -> None:
        _accept(p, features)
        p.out("device_status", _LIVE)
        p.read("after", "device_status")
        reset(p, "again")

    reads = {"status": _ACKNOWLEDGED, "after": _ACKNOWLEDGED}
    return registers(rows, name, run, when="fresh", outcome="refused", rules=rules, reads=reads)


def _status(rows: str, name: str, rules: str, value: int, *, reads: int = _LIVE) -> Case:
    """The status of a running device is written."""

    def run(p: Program, _: Machine) -> None:
        p.out("device_status", value)
        p.read("status", "device_status")

    return registers(rows, name, run, rules=rules, reads={"status": reads})


def _features_late(p: Program, _: Machine) -> None:
    for select in (0, 1):
        p.out("driver_feature_select", select)
        p.out("driver_feature", 0)
        p.read(f"word{select}", "driver_feature")


def _words(p: Program, _: Machine) -> None:
    for select in (4, 0x8000, 0xFFFF_FFFF):
        p.out("device_feature_select", select)
        p.read(f"device.{select}", "device_feature")
        p.out("driver_feature_select", select)
        p.out("driver_feature", 0xFFFF_FFFF)
        p.read(f"driver.{select}", "driver_feature")


_NO_WORDS: Final = {f"{end}.{select}": 0 for end in ("device", "driver") for select in (4, 0x8000, 0xFFFF_FFFF)}


def _widths(p: Program, _: Machine) -> None:
    """Zero with 2, 4 and 8 bytes would reset the device, were it taken for the status."""
    for width in (2, 4):
        p.out_at(CapType.COMMON_CFG, 0x14, width, 0)
    p.out_at(CapType.COMMON_CFG, 0x10, 8, 0)
    p.read("status", "device_status")


def _resets(p: Program, _: Machine) -> None:
    """A reset in every state of the initialization, twice each."""
    for stop in range(5):
        queue = Queue(packed=bool(stop % 2))
        if stop > 0:
            p.out("device_status", 1)
        if stop > 1:
            p.out("device_status", _ACKNOWLEDGED)
        if stop > 2:
            queue.negotiate(p)
        if stop > 3:
            queue.run(p)
        for turn in range(2):
            reset(p, f"{stop}.{turn}")
            for name in (
                "queue_enable",
                "queue_size",
                "queue_select",
                "config_msix_vector",
                "queue_msix_vector",
                "driver_feature_select",
            ):
                p.read(f"{stop}.{turn}.{name}", name)


_FRESH: Final = {
    "queue_enable": 0,
    "queue_size": QUEUE_SIZE,
    "queue_select": 0,
    "config_msix_vector": NO_VECTOR,
    "queue_msix_vector": NO_VECTOR,
    "driver_feature_select": 0,
}


def _broken_then(name: str, rows: str, after: Callable[[Program, Queue], object]) -> list[Case]:
    """A broken device, and what the driver does with it instead of a reset."""
    found: list[Case] = []
    for packed in (False, True):
        queue = Queue(packed=packed)

        def run(p: Program, _: Machine, queue: Queue = queue) -> None:
            queue.start(p)
            asked(p)
            queue.desc(p, 0, 1 << 40, 16, 0)
            queue.publish(p, 0)
            kick(p)
            p.interrupts("any", CONFIG_VECTOR, 1)
            after(p, queue)
            p.read("status", "device_status")
            p.interrupts("config", CONFIG_VECTOR)
            p.interrupts("queue", QUEUE_VECTOR)

        def judge(results: Results) -> str:
            return verdict("broken", results, {"status": _LIVE | 0x40, "config": 1, "queue": 0})

        found.append(
            Case(
                rows=tuple(rows.split()),
                name=name,
                packed=packed,
                run=run,
                judge=judge,
                verdict="broken",
                rules=("UnmappedAddress",),
            )
        )
    return found


def _good_one(p: Program, queue: Queue) -> None:
    """What would be answered, were the device not broken; and kicks."""
    queue.ask(p, NUMBER, position=1)
    for _ in range(8):
        kick(p)


def _status_again(p: Program, _: Queue) -> None:
    p.out("device_status", _LIVE)
    p.out("device_status", _LIVE | 0x40)


_SUSPENDABLE: Final = Queue(features=BASIC | FeatureSet("SUSPEND"))


def _suspended(p: Program, _: Machine) -> None:
    """A request while the device is suspended waits until it goes on; to suspend it twice changes nothing."""
    for turn, status in enumerate((_LIVE, _FEATURES_OK)):
        p.out("device_status", status | int(Status.SUSPEND))
        p.until(f"suspended.{turn}", "device_status", _FEATURES_OK | int(Status.SUSPEND))
    _SUSPENDABLE.ask(p, NUMBER)
    p.read("turn", "device_status")
    p.get("unused", _SUSPENDABLE.layout.at("used.idx"), 2)
    p.out("device_status", _LIVE)
    p.until("resumed", "device_status", _LIVE)
    _SUSPENDABLE.used(p)


def _early(p: Program, _: Machine) -> None:
    """A request and its kick before DRIVER_OK: answered once it is set, without another kick."""
    queue = Queue(final=Status(_FEATURES_OK))
    queue.start(p)
    queue.ask(p, NUMBER)
    p.read("status", "device_status")
    p.get("early", queue.layout.at("used.idx"), 2)
    p.out("device_status", _LIVE)
    queue.used(p)
    queue.answered(p)
    p.interrupts("queue", QUEUE_VECTOR, 1)
    p.interrupts("config", CONFIG_VECTOR)


def _early_judged(results: Results) -> str:
    low, high = answer(NUMBER)
    wanted = {"early": 0, "len": 12, "low": low, "high": high, "status": _FEATURES_OK, "queue": 1, "config": 0}
    return verdict("accepted", results, wanted)


def _other_format(packed: bool) -> Case:
    """One format works, the device is reset, then the other with the same memory."""

    def run(p: Program, _: Machine) -> None:
        before = Queue(packed=not packed)
        before.start(p)
        before.ask(p, NUMBER)
        before.used(p, label="before.")
        reset(p, "between")

    return registers("D13", "after-the-other-format", run, when="fresh", outcome="accepted", queue=Queue(packed=packed),
                     reads={"before.len": 12, "between": 0})  # fmt: skip


_BITS: Final = FeatureSet.from_bits
_REFUSED: Final = "BadFeatures DriverOkWithoutFeaturesOk"
_ZEROS: Final = {f"{stop}.{turn}": 0 for stop in range(5) for turn in range(2)}
_RESET: Final = {f"{step}.{name}": value for step in _ZEROS for name, value in _FRESH.items()}
CASES: Final[list[Case]] = [
    _features("D01", "feature-not-offered", BASIC | _BITS(1 << 60), f"FeatureNotOffered {_REFUSED}"),
    _features("D01", "feature-beyond-64", BASIC | _BITS(1 << 127), f"FeatureNotOffered {_REFUSED}"),
    _features("D01", "no-VERSION_1", BASIC - FeatureSet("VERSION_1"), f"Version1NotAccepted {_REFUSED}"),
    registers("D02", "features-late", _features_late, rules="FeaturesAfterOk",
              reads={"word0": BASIC.word(0), "word1": BASIC.word(1)}),
    registers("D04 A18", "no-FEATURES_OK",
              lambda p, _: (p.out("device_status", _ACKNOWLEDGED | 4), p.read("status", "device_status")),
              when="fresh", rules="DriverOkWithoutFeaturesOk", reads={"status": _ACKNOWLEDGED}),
    *(
        _status("D05", f"bits-cleared-{value:#x}", "StatusBitCleared", value)
        for value in (0x7, 0xB, 0x1)
    ),
    _status("D06", "NEEDS_RESET", "DriverSetNeedsReset", _LIVE | 0x40),
    _status("D07", "undefined-bit", "UndefinedStatusBit", _LIVE | 0x20),
    _status("D10", "DRIVER_OK-twice", "", _LIVE),
    _status("D17", "SUSPEND", "SuspendNotPossible", _LIVE | 0x10),
    registers("D17", "suspended", _suspended, outcome="accepted", rules="UsedWhileSuspended", queue=_SUSPENDABLE,
              position=1,
              reads={"suspended.0": _FEATURES_OK | 0x10, "suspended.1": _FEATURES_OK | 0x10, "unused": 0,
                     "resumed": _LIVE, "len": 12}),
    registers("D08", "resets", _resets, when="fresh", reads={**_ZEROS, **_RESET}),
    *_broken_then("nothing-after-broken", "D08 D16 N07", _good_one),
    *_broken_then("status-after-broken", "D06 D12 D16", _status_again),
    Case(rows=("A18", "D12"), name="early-kick", run=_early, judge=_early_judged, verdict="accepted",
         rules=("NotifiedEarly",)),
    _other_format(packed=False),
    _other_format(packed=True),
    registers("D14 X06", "feature-words", _words, rules="FeaturesAfterOk", reads=_NO_WORDS),
    registers("D15 X01", "status-widths", _widths, rules="AccessWidth", reads={"status": _LIVE}),
]  # fmt: skip
