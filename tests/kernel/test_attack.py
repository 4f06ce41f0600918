"""A guest that attacks: one boot, and a case for each row of the robustness catalogue that a guest can reach.

The guest has our module of ``guest/attack`` instead of a driver. It sets the function up by itself, breaks one rule in
a ring or a register, says what came of it, resets the device and asks for something that must be answered. Which rule
was broken is known by the server alone, whose log must name it, once.

The rings are attacked behind QEMU's vhost-user front-end as well, where nothing tells the guest of a broken one: there
the ring stands still, and the err fd and the log say so.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from virtio_test.checks import find_row
from virtio_test.spec.pcidev import UML_PCI_DEVICE_ID

from tests.kernel import build
from tests.kernel.attack.case import Case, Machine, Policy
from tests.kernel.attack.cases import CASES
from tests.kernel.attack.run import Outcome, attack, programs
from tests.kernel.guest import Guest, Uml
from tests.kernel.qemu import MEMORY_MIB, Qemu, vfio_user, vhost_user_test
from tests.kernel.server import Server

pytestmark = pytest.mark.kernel

SLOT = "0000:00:00.0"
OFFERED = ("--features", "+NOTIFICATION_DATA,+SUSPEND")
TROUBLE = re.compile(r"WARNING|BUG|Oops|Call Trace|virt-pci delay|unexpected virt-pci|blocked for more|nobody cared")

UML = Machine("uml")
QEMU = Machine("qemu", low=True, end=MEMORY_MIB << 20, rom=0xF0000, relocates=True, keeps_table=True, line=True)
LATE = Machine("late", late=True)
VHOST = Machine("vhost-user", low=True, end=MEMORY_MIB << 20, silent=True, own_bar=False)


@dataclass(frozen=True)
class Traces:
    """What a server has: (open file descriptors by kind, memory mappings, threads)."""

    fds: Sequence[str]
    mappings: int
    threads: int

    @classmethod
    def of(cls, server: Server) -> Traces:
        """As it is now."""
        threads = len(list(Path(f"/proc/{server.console.pid}/task").iterdir()))
        return cls(server.fds(), server.mappings(), threads)


@dataclass(frozen=True)
class World:
    """A guest that has done all of its attacks and was powered off.

    Attributes:
        outcomes: what came of each case.
        console: what its kernel said.
        log: what the server said.
        before: what the server had before the guest came.
        after: what it has when the guest has gone.
        grown: bytes that it has more, of its own.
        status: how the server ended.
    """

    outcomes: dict[str, Outcome]
    console: Sequence[str]
    log: str
    before: Traces
    after: Traces
    grown: int
    status: int


def cases(machine: Machine, policy: Policy) -> list[Case]:
    """What is done there: all that the machine can, and of strict what it judges otherwise than interop."""
    able = [case for case in CASES if machine.can(case)]
    return [case for case in able if policy == "interop" or case.strict is not None]


WORLDS: dict[str, tuple[Machine, Policy]] = {
    "uml-interop": (UML, "interop"),
    "uml-strict": (UML, "strict"),
    "late-interop": (LATE, "interop"),
    "late-strict": (LATE, "strict"),
    "qemu-interop": (QEMU, "interop"),
    "vhost-user-interop": (VHOST, "interop"),
}
PARAMETERS = [
    pytest.param(name, case, id=f"{name}-{case.id}", marks=pytest.mark.row(*case.rows))
    for name, (machine, policy) in WORLDS.items()
    for case in cases(machine, policy)
]


def start(stack: contextlib.ExitStack, machine: Machine, server: Server, attacks: Sequence[Case]) -> Guest:
    """A guest with its function bound to nobody."""
    if machine in (UML, LATE):
        files = build.attack_files(build.uml_kernel()) | dict(programs(attacks, machine))
        # As in test_uml_pci: a guest that waits by spinning comes after its server.
        words = ["loglevel=8", "lpj=170000000"]
        nice = ["nice", "-n", "19"]
        guest: Guest = stack.enter_context(
            Uml(server.path, virtio_id=UML_PCI_DEVICE_ID, arguments=words, prefix=nice, files=files)
        )
        guest.command(f"write /sys/bus/pci/drivers/virtio-pci/unbind {SLOT}")
    else:
        files = build.attack_files(build.debian_kernel()) | dict(programs(attacks, machine))
        if machine.silent:
            device = vhost_user_test(server.path, properties=("packed=on",))
        else:
            device = vfio_user(server.path, addr="04.0")
        guest = stack.enter_context(Qemu(device, modules=(), files=files, apart=True))
    return guest


@pytest.fixture(scope="module")
def worlds(
    serve_all: Callable[..., Server], uml_kernel: build.Kernel, qemu_root: build.QemuRoot
) -> Callable[[str], World]:
    """Each world by its name, made when it is first asked for."""
    assert uml_kernel.image.is_file()
    assert qemu_root.path.is_dir()

    def make(name: str) -> World:
        machine, policy = WORLDS[name]
        attacks = cases(machine, policy)
        if machine.late:
            server = serve_all("--policy", policy, program=("-m", "tests.kernel.attack.late"))
        elif machine.silent:
            server = serve_all("--policy", policy)
        else:
            carrier = "uml" if machine is UML else "vfio-user"
            server = serve_all("--transport", "pci", "--carrier", carrier, "--policy", policy, *OFFERED)
        before, memory = Traces.of(server), server.memory()
        with contextlib.ExitStack() as stack:
            guest = start(stack, machine, server, attacks)
            outcomes = attack(guest, server, attacks, machine)
            guest.power_off()
            server.wait_for_disconnects(1)
            after, grown = Traces.of(server), server.memory() - memory
            status = server.stop()
            return World(outcomes, guest.console.lines, server.log, before, after, grown, status)

    made: dict[str, World | Exception] = {}

    def world(name: str) -> World:
        if name not in made:
            try:
                made[name] = make(name)
            except Exception as error:  # noqa: BLE001 - each test of this world fails by it, and none tries again
                made[name] = error
        found = made[name]
        if isinstance(found, Exception):
            raise found
        return found

    return world


@pytest.mark.parametrize(("name", "case"), PARAMETERS)
def test_attack(worlds: Callable[[str], World], name: str, case: Case) -> None:
    assert worlds(name).outcomes[case.id] == Outcome(*case.expected(WORLDS[name][1]))


_REACHED = """
A01 A02 A04 A05 A06 A07 A08 A09 A13 A14 A15 A16 A17 A18 C01 C02 C03 C04 C05 C06 C07 C08 C09 C10 C11 C12 B01
B02 B03 B04 B05 B06 B09 B10 B12 B13 B14 B15 B17 B19 I01 I02 I03 I05 I06 I07 I08 I10 I11 I12 I13 I15 I16 I17
I18 I21 P01 P02 P03 P04 P05 P06 P07 P09 P11 P12 P13 P14 P15 P16 P18 P19 P20 P22 P23 P24 P29 P30 Q01 Q02 Q03
Q04 Q05 Q06 Q08 Q09 Q10 Q11 Q12 Q13 Q14 Q15 Q16 D01 D02 D04 D05 D06 D07 D08 D09 D10 D11 D12 D13 D14 D15 D16
D17 X01 X02 X03 X04 X05 X06 X07 X08 X09 X10 X11 X12 X13 X14 X15 X16 N03 N04 N05 N07 U07 CVE-2011-2212
CVE-2011-2512 CVE-2016-5403 CVE-2016-6490 CVE-2016-7422 CVE-2023-5158 CVE-2024-3446 CVE-2024-4693
CVE-2026-5747 CVE-2026-16457 CVE-2026-45782 CVE-2026-50624 CVE-2026-50626 firecracker#5353
cloud-hypervisor@082fdc4d0 cloud-hypervisor@2d2931a76 cloud-hypervisor@3b431afba mvm#1860 openvmm#2983
openvmm#4145
"""
"""The rows that a guest can reach.

Of the others some need what no guest decides on (where a ring begins, what is restored, when memory changes under the
device: A03, P32, 2.11, 2.12), some another memory map (B08, B11, B16) or another class of device.
"""


def test_every_row_that_a_guest_can_reach_has_a_case() -> None:
    assert {row for case in CASES for row in case.rows} == set(_REACHED.split())
    assert len({case.id for case in CASES}) == len(CASES)


RINGS = re.compile(r"[ABCIP]\d\d")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_a_ring_breaks_is_a_rule_of_its_row(case: Case) -> None:
    rows = [row for row in case.rows if RINGS.fullmatch(row)]
    rules = {rule for row in rows for rule in find_row(row).rules}
    for verdict, named in (case.expected("interop"), case.expected("strict")):
        assert not rows or verdict != "broken" or rules & set(named)


@pytest.mark.parametrize("name", WORLDS)
def test_the_server_is_left_as_it_was(worlds: Callable[[str], World], name: str) -> None:
    world = worlds(name)
    assert world.after.fds == world.before.fds
    assert world.after.threads == world.before.threads
    assert abs(world.after.mappings - world.before.mappings) <= 4
    assert world.grown < 64 << 20
    assert world.status == 0
    assert "Traceback" not in world.log
    named = ("the driver: ", "queue 0 stopped: ")
    warnings = [line for line in world.log.splitlines() if "WARNING" in line]
    assert [line for line in warnings if not any(each in line for each in named)] == []


@pytest.mark.parametrize("name", WORLDS)
def test_the_guest_lives(worlds: Callable[[str], World], name: str) -> None:
    assert [line for line in worlds(name).console if TROUBLE.search(line)] == []
