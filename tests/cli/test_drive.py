"""``virtio-test drive``: our own back-ends driven and checked, and bad ones found out in one line."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from virtio_test.cli.drive import drive
from virtio_test.devices.base import BaseDevice
from virtio_test.devices.blk import BlkDevice
from virtio_test.devices.rng import RngDevice
from virtio_test.errors import AnswerViolation
from virtio_test.features import FeatureSet
from virtio_test.spec.testdevice import CONFIG_FIELDS, FEATURE_NAMES, RESPONSE
from virtio_test.transport.vhost_user.codec import encode
from virtio_test.transport.vhost_user.messages import BackendRequest, Request
from virtio_test.transport.vhost_user.payloads import U64, Config, VringState

from tests.unit import vhost_user_peer as peers
from tests.unit.vhost_user_peer import Fault, peer
from tests.unit.vhost_user_recorder import Recorder, recorder
from tests.unit.vhost_user_world import serving

from .conftest import COMMAND, Result, Run

WAYS = pytest.mark.parametrize(
    "way", [(), ("--ring", "packed"), ("--indirect",), ("--ring", "packed", "--indirect"), ("--depth", "1")]
)


@contextmanager
def served(path: Path, *arguments: str) -> Generator[Path]:
    """A `virtio-test serve` of its own process, listening at `path`."""
    process = subprocess.Popen(
        [*COMMAND, "serve", "--socket", str(path), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("virtio-test: serving")
        yield path
    finally:
        process.kill()
        process.communicate()


@contextmanager
def lying(path: Path, device: object) -> Generator[Path]:
    """A back-end around any device, in a thread."""
    with serving(path, device):  # type: ignore[arg-type]
        yield path


def found(result: Result) -> str:
    """The one line of a finding; the result is shown as well."""
    assert result.status == 1, result
    assert result.err.count("\n") == 1
    assert result.err.startswith("virtio-test: ")
    assert "findings" in result.out
    assert "Traceback" not in result.err + result.out
    return result.err


def facts_of(text: str) -> dict[str, str]:
    """The result's lines by their names."""
    return dict(line.split("  ", 1) for line in text.splitlines() if not line.startswith(" "))


# --- good ones --------------------------------------------------------------------------------------------------


@WAYS
def test_the_test_device(run: Run, tmp_path: Path, way: tuple[str, ...]) -> None:
    with served(tmp_path / "s") as path:
        result = run("drive", "--socket", str(path), "--count", "300", *way)
    assert (result.status, result.err) == (0, "")
    facts = {name.strip(): value.strip() for name, value in facts_of(result.out).items()}
    assert (facts["requests"], facts["bytes"], facts["findings"]) == ("300", str(300 * 12), "none")
    assert "VERSION_1" in facts["features"].split(", ")
    assert ("RING_PACKED" in facts["features"]) == ("packed" in way)
    assert "REPLY_ACK" in facts["protocol"].split(", ")
    assert float(facts["seconds"]) > 0


def test_as_json_and_as_a_process(spawn: Run, tmp_path: Path) -> None:
    with served(tmp_path / "s") as path:
        result = spawn("drive", "--socket", str(path), "--json", "--count", "10")
    facts = json.loads(result.out)
    assert (result.status, result.err) == (0, "")
    assert (facts["device"], facts["requests"], facts["bytes"], facts["findings"]) == ("test", 10, 120, [])


@WAYS
def test_an_entropy_device(run: Run, tmp_path: Path, way: tuple[str, ...]) -> None:
    with served(tmp_path / "s", "--device", "rng") as path:
        result = run("drive", "--socket", str(path), "--device", "rng", "--count", "200", "--json", *way)
    assert (result.status, result.err) == (0, "")
    assert json.loads(result.out)["bytes"] == 200 * 64


@WAYS
@pytest.mark.parametrize("write", [False, True])
def test_a_block_device(run: Run, tmp_path: Path, way: tuple[str, ...], write: bool) -> None:
    image = tmp_path / "image"
    content = os.urandom(1 << 20)
    image.write_bytes(content)
    more = ("--write",) if write else ()
    with served(tmp_path / "s", "--device", "blk", "--image", str(image), "--queues", "2", "--serial", "mine") as path:
        result = run("drive", "--socket", str(path), "--device", "blk", "--count", "600", "--json", *way, *more)
    assert (result.status, result.err) == (0, "")
    facts = json.loads(result.out)
    assert (facts["requests"], facts["bytes"], facts["findings"]) == (600, 600 * 4096, [])
    assert (facts["id"], facts["capacity"], facts["queues"], facts["read_only"]) == ("mine", 2048, 2, False)
    assert image.read_bytes() == content


@pytest.mark.parametrize("size", [512, 4096, 4096 + 512])
@pytest.mark.parametrize("write", [(), ("--write",)])
def test_a_tiny_block_device(run: Run, tmp_path: Path, size: int, write: tuple[str, ...]) -> None:
    image = tmp_path / "image"
    content = os.urandom(size)
    image.write_bytes(content)
    with served(tmp_path / "s", "--device", "blk", "--image", str(image)) as path:
        result = run("drive", "--socket", str(path), "--device", "blk", "--count", "7", "--json", *write)
    assert result.status == 0, result
    assert json.loads(result.out)["requests"] == (8 if write else 7), "what is written is read as well"
    assert image.read_bytes() == content


PCI = ("--transport", "pci")


@pytest.mark.parametrize(
    ("way", "interface", "interrupts"),
    [
        ((), "modern", "msix"),
        (("--ring", "packed", "--indirect"), "modern", "msix"),
        (("--intx",), "modern", "intx"),
        (("--interface", "legacy"), "legacy", "msix"),
        (("--interface", "legacy", "--intx"), "legacy", "intx"),
    ],
    ids=str,
)
def test_a_pci_function(run: Run, tmp_path: Path, way: tuple[str, ...], interface: str, interrupts: str) -> None:
    with served(tmp_path / "s", *PCI, "--flavour", "transitional") as path:
        for _ in range(2):
            result = run("drive", "--socket", str(path), *PCI, "--count", "300", "--json", *way)
            assert (result.status, result.err) == (0, "")
            facts = json.loads(result.out)
            assert (facts["requests"], facts["findings"]) == (300, [])
            assert (facts["interface"], facts["interrupts"]) == (interface, interrupts)
            assert ("RING_PACKED" in facts["features"]) == ("packed" in way)


def test_a_disk_that_is_a_pci_function(run: Run, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(2 << 20))
    before = image.read_bytes()
    with served(tmp_path / "s", *PCI, "--device", "blk", "--image", str(image), "--queues", "2") as path:
        result = run("drive", "--socket", str(path), *PCI, "--device", "blk", "--write", "--json")
        assert (result.status, result.err) == (0, "")
        assert json.loads(result.out)["queues"] == 2
        wrong = run("drive", "--socket", str(path), *PCI, "--device", "rng")
        assert (wrong.status, wrong.out) == (2, "")
        assert wrong.err == "virtio-test: its virtio device id is 2; that of rng is 4\n"
    assert image.read_bytes() == before
    nobody = run("drive", "--socket", str(tmp_path / "s"), *PCI)
    assert (nobody.status, nobody.out, nobody.err.count("\n")) == (2, "", 1)


def test_what_it_returns_is_what_it_shows(tmp_path: Path) -> None:
    shown: list[str] = []
    with served(tmp_path / "s") as path:
        assert drive(path, count=1, show=shown.append) == shown[0]


# --- misuse -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Missing option '--socket'"),
        (("--socket", "{}/nobody"), "no back-end at {}/nobody: No such file or directory; start one there"),
        (("--socket", "{}/file"), "no back-end at {}/file: Connection refused"),
        (("--socket", "{}"), "no back-end at {}: Connection refused"),
        (("--socket", "{}/" + "x" * 120), "AF_UNIX path too long"),
        (("--socket", "{}/s", "--device", "gpu"), "'gpu' is not one of 'test', 'blk', 'rng'"),
        (("--socket", "{}/s", "--ring", "round"), "'round' is not one of 'split', 'packed'"),
        (("--socket", "{}/s", "--count", "0"), "give a number of at least 1"),
        (("--socket", "{}/s", "--depth", "1025"), "give a number from 1 to 1024"),
        (("--socket", "{}/s", "--timeout", "0"), "give more than 0 seconds"),
        (("--socket", "{}/s", "--write"), "--write is for blk"),
        (("--socket", "{}/s", "--intx"), "--transport pci"),
        (("--socket", "{}/s", "--interface", "legacy"), "--transport pci"),
        (("--socket", "{}/s", "more"), "unexpected extra argument"),
    ],
)
def test_misuse_is_one_line(run: Run, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    (tmp_path / "file").touch()
    result = run("drive", *(each.replace("{}", str(tmp_path)) for each in arguments))
    assert (result.status, result.out) == (2, "")
    assert says.replace("{}", str(tmp_path)) in result.err
    assert result.err.count("\n") == 1


def test_what_the_back_end_does_not_offer_is_misuse(run: Run, tmp_path: Path) -> None:
    with served(tmp_path / "s", "--features=-RING_PACKED,-CAN_PRINT") as path:
        packed = run("drive", "--socket", str(path), "--ring", "packed")
        assert (packed.status, packed.out) == (2, "")
        assert packed.err == "virtio-test: the device offers no RING_PACKED: drive it with --ring split\n"
        silent = run("drive", "--socket", str(path))
        assert (silent.status, silent.out) == (2, "")
        assert "does not offer CAN_PRINT" in silent.err
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    with served(tmp_path / "t", "--device", "blk", "--image", str(image), "--read-only") as path:
        written = run("drive", "--socket", str(path), "--device", "blk", "--write")
        assert (written.status, written.out) == (2, "")
        assert "drive it without --write" in written.err


def test_a_listener_that_others_wait_at_already(run: Run, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        first.connect(str(tmp_path / "s"))
        started = time.monotonic()
        result = run("drive", "--socket", str(tmp_path / "s"), "--timeout", "1")
        assert time.monotonic() - started < 10
    assert (result.status, result.out) == (2, "")
    assert "others wait there already" in result.err


# --- bad ones ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "fault", "says"),
    [
        (Request.GET_FEATURES, peers.close, "closed the connection instead of answering GET_FEATURES"),
        (Request.ADD_MEM_REG, peers.hang_inside, "did not answer ADD_MEM_REG within 1 s"),
        (Request.GET_FEATURES, peers.hang, "did not answer GET_FEATURES within 1 s"),
        (Request.SET_FEATURES, peers.refuse, "Refused (vhost-user, VHOST_USER_PROTOCOL_F_REPLY_ACK): SET_FEATURES was"),
        (Request.ADD_MEM_REG, peers.with_fds, "FdCount (vhost-user, Communication): 3 fds came with ADD_MEM_REG"),
        (Request.GET_CONFIG, peers.too_short, "(vhost-user, Payload)"),
        (Request.SET_VRING_KICK, peers.other_version, "BadVersion (vhost-user, Header): SET_VRING_KICK has version 2"),
    ],
)
def test_a_bad_message_is_a_finding(run: Run, tmp_path: Path, request_: Request, fault: Fault, says: str) -> None:
    with peer(tmp_path / "s", faults={request_: fault}) as bad:
        result = run("drive", "--socket", str(bad.path), "--timeout", "1")
    assert says in found(result)


def test_a_finding_in_json(run: Run, tmp_path: Path) -> None:
    with peer(tmp_path / "s", answers={Request.GET_QUEUE_NUM: U64(0)}) as bad:
        result = run("drive", "--socket", str(bad.path), "--timeout", "1", "--json")
    found(result)
    (finding,) = json.loads(result.out)["findings"]
    assert finding == {
        "rule": "QueueCount",
        "clause": "vhost-user, Multiple queue support",
        "message": "the back-end says that it has 0 queues",
    }


def test_a_device_that_never_answers(run: Run, tmp_path: Path) -> None:
    with peer(tmp_path / "s") as silent:
        started = time.monotonic()
        result = run("drive", "--socket", str(silent.path), "--timeout", "1")
        assert time.monotonic() - started < 10
        assert "GET_VRING_BASE" not in silent.names()
    assert "PeerTimeout" in result.out
    assert found(result) == "virtio-test: the answer to request 0 did not come within 1 s\n"


@pytest.mark.parametrize("packed", [False, True])
def test_a_used_ring_that_breaks_the_rules(run: Run, tmp_path: Path, packed: bool) -> None:
    stop = threading.Event()

    def spoil(device: Recorder) -> None:
        """As soon as something is available: use a buffer that never was."""
        while not stop.wait(0.005):
            if device.running and (device.field("desc.flags", 0) if packed else device.field("avail.idx")):
                if packed:
                    device.put("desc.id", 4000)
                    device.put("desc.flags", 1 << 7 | 1 << 15)
                else:
                    device.put("used.ring.id", 4000)
                    device.put("used.idx", 1)
                os.eventfd_write(device.fds[Request.SET_VRING_CALL, 0], 1)
                return

    with recorder(tmp_path / "s", packed=packed) as device:
        thread = threading.Thread(target=spoil, args=(device,))
        thread.start()
        result = run("drive", "--socket", str(device.path), "--ring", "packed" if packed else "split")
        stop.set()
        thread.join()
    line = found(result)
    assert "(VIRTIO 1.4, 2." in line
    assert "[queue 0, " in line


def test_a_back_end_that_leaves_in_the_middle(run: Run, tmp_path: Path) -> None:
    with recorder(tmp_path / "s", packed=False) as device:
        threading.Timer(0.3, device.hang_up).start()
        line = found(run("drive", "--socket", str(device.path)))
    assert line == "virtio-test: the back-end has closed the connection\n"


class WrongAnswers(BaseDevice):
    """A test device that cannot add, after a while."""

    def __init__(self) -> None:
        from virtio_test.config import ConfigLayout, ConfigSpace

        self.left = 20
        super().__init__(
            45,
            handlers={0: self.answer},
            queue_sizes=(128,),
            features=FeatureSet("CAN_PRINT", device=FEATURE_NAMES),
            config=ConfigSpace(ConfigLayout(*CONFIG_FIELDS)),
        )

    def answer(self, request: bytes) -> bytes:
        self.left -= 1
        numbers = [int.from_bytes(request[at : at + 4], "little") + 100 for at in (4, 8, 12)]
        return RESPONSE.pack(*(numbers if self.left else [1, 2, 3]))


def test_a_wrong_answer_is_a_finding(run: Run, tmp_path: Path) -> None:
    with lying(tmp_path / "s", WrongAnswers()) as path:
        result = run("drive", "--socket", str(path))
    assert found(result) == "virtio-test: the request 19 was answered (1, 2, 3), where (120, 121, 122) is right\n"
    assert "requests   19\n" in result.out


def _counted(count: int) -> bytes:
    return bytes(range(count))


def _nothing(_: int) -> bytes:
    return b""


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (bytes, "NotRandom (VIRTIO 1.4, 5.4.6.2): read 0 gave 64 bytes of 0x00; expected: Entropy is neither"),
        (_counted, "read 1 gave the same 64 bytes as the one before it"),
        (_nothing, None),
    ],
    ids=["constant", "repeated", "nothing"],
)
def test_randomness_that_is_none(run: Run, tmp_path: Path, source: Callable[[int], bytes], says: str | None) -> None:
    with lying(tmp_path / "s", RngDevice(source=source)) as path:
        line = found(run("drive", "--socket", str(path), "--device", "rng"))
    assert says is None or says in line


def test_a_short_but_random_answer_is_none(run: Run, tmp_path: Path) -> None:
    with lying(tmp_path / "s", RngDevice(limit=3)) as path:
        result = run("drive", "--socket", str(path), "--device", "rng", "--count", "50", "--json")
    assert (result.status, json.loads(result.out)["bytes"]) == (0, 150)


def test_a_disk_that_forgets(run: Run, tmp_path: Path) -> None:
    image = bytearray(os.urandom(64 << 10))
    device = BlkDevice(image)
    stop = threading.Event()

    def change() -> None:
        while not stop.wait(0.0005):
            image[4096] ^= 1

    thread = threading.Thread(target=change)
    with lying(tmp_path / "s", device) as path:
        thread.start()
        result = run("drive", "--socket", str(path), "--device", "blk", "--count", "20000")
        stop.set()
        thread.join()
    assert "sector 8 reads otherwise than before" in found(result)


def test_what_a_device_calls_itself_cannot_reach_the_terminal(run: Run, tmp_path: Path) -> None:
    with lying(tmp_path / "s", BlkDevice(bytearray(4096), serial="\x1b[31mred\nline")) as path:
        result = run("drive", "--socket", str(path), "--device", "blk", "--count", "2")
    assert result.status == 0
    assert "\x1b" not in result.out
    assert "id          \\x1b[31mred\\nline\n" in result.out


def test_an_err_fd_is_the_finding_and_not_what_follows(tmp_path: Path) -> None:
    shown: list[str] = []

    def give_up(device: Recorder) -> None:
        os.eventfd_write(device.fds[Request.SET_VRING_ERR, 0], 1)

    with recorder(tmp_path / "s", packed=False) as device:
        timer = threading.Timer(0.3, give_up, (device,))
        timer.start()
        with pytest.raises(Exception, match="has stopped queue 0"):
            drive(device.path, timeout=5.0, show=shown.append)
        timer.join()
    assert "findings   1\n" in shown[0]


def test_several_findings_are_all_shown(run: Run, tmp_path: Path) -> None:
    def say(device: peers.Peer, _: peers.Message, good: bytes) -> None:
        """Do as asked, and ask for something that was not negotiated."""
        assert device.channel is not None
        assert device.connection is not None
        device.connection.send(good)
        device.channel.send(encode(BackendRequest.VRING_CALL, VringState(0)))

    with peer(tmp_path / "s", faults={Request.SET_VRING_ENABLE: say}) as bad:
        result = run("drive", "--socket", str(bad.path), "--timeout", "1")
    assert result.out.endswith(
        "findings   2\n"
        "  NotNegotiated (vhost-user, Protocol features): "
        "the back-end sent VRING_CALL, for which nothing was negotiated\n"
        "  PeerTimeout: the answer to request 0 did not come within 1 s\n"
    )
    assert found(result).startswith("virtio-test: NotNegotiated (vhost-user, Protocol features): ")


def test_a_configuration_space_that_is_too_short(run: Run, tmp_path: Path) -> None:
    with peer(tmp_path / "s", answers={Request.GET_CONFIG: Config(0, 2, 0, b"ab")}) as bad:
        line = found(run("drive", "--socket", str(bad.path), "--timeout", "1"))
    assert "ConfigSize (vhost-user, VHOST_USER_GET_CONFIG): 2 bytes came where 4 were asked for" in line


def test_the_error_is_the_drivers_own(tmp_path: Path) -> None:
    with lying(tmp_path / "s", RngDevice(source=bytes)) as path, pytest.raises(AnswerViolation):
        drive(path, device="rng", show=lambda _: None)


# --- while it runs ----------------------------------------------------------------------------------------------


def test_an_interrupt_is_no_traceback(tmp_path: Path) -> None:
    with recorder(tmp_path / "s", packed=False) as device:
        process = subprocess.Popen(
            [*COMMAND, "drive", "--socket", str(device.path), "--timeout", "60"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        end = time.monotonic() + 60
        while not device.running:
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err.strip()) == (130, "", "")


def test_how_far_it_is_shows_on_a_terminal_only(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    try:
        with served(tmp_path / "s") as path:
            process = subprocess.Popen(
                [*COMMAND, "drive", "--socket", str(path), "--count", "40000", "--depth", "8"],
                stdout=subprocess.PIPE,
                stderr=theirs,
                env=dict(os.environ) | {"TERM": "xterm", "COLUMNS": "80"},
            )
            shown = bytearray()
            reader = threading.Thread(target=_drain, args=(ours, shown))
            reader.start()
            out, _ = process.communicate(timeout=60)
    finally:
        os.close(theirs)
    reader.join()
    os.close(ours)
    assert process.returncode == 0
    assert b"requests   40000" in out
    assert b"\x1b" not in out
    assert b"requests" in shown, "40000 requests take longer than nobody minds"
    assert b"%" in shown


def _drain(fd: int, into: bytearray) -> None:
    while True:
        try:
            data = os.read(fd, 4096)
        except OSError:
            return
        if not data:
            return
        into += data
