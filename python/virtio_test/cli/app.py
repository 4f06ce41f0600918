"""The commands and their options; what they do is in the files beside this one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from virtio_test._core import __version__
from virtio_test.errors import PeerError, VirtioTestError

from .params import DEVICES, Command, Group, Number, ReaderGone, Seconds

__all__ = ["cli", "run"]


_FLAVOUR = click.option(
    "--flavour",
    type=click.Choice(["generic", "transitional", "non-transitional"]),
    default=None,
    help="Flavour of a PCI function; generic if not given.",
)
_RING = click.option("--ring", type=click.Choice(["split", "packed"]), default="split", help="Format of the virtqueue.")
_INDIRECT = click.option("--indirect", is_flag=True, help="Put every chain into an indirect table.")
_INTERFACE = click.option(
    "--interface",
    type=click.Choice(["auto", "modern", "legacy"]),
    default="auto",
    help="Which interface of PCI or MMIO the driver uses.",
)
_INTX = click.option("--intx", is_flag=True, help="PCI interrupts by the line instead of by messages.")
_WAY = (
    click.option("--transport", type=click.Choice(["none", "pci", "mmio"]), default="none", help="Registers between."),
    _FLAVOUR,
    _INTERFACE,
    _INTX,
    _RING,
    _INDIRECT,
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")


def _way(command: Callable[..., None]) -> Callable[..., None]:
    """The options of `session.Way`."""
    for option in reversed(_WAY):
        command = option(command)
    return command


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="virtio-test")
def cli() -> None:
    """The virtio workbench: write devices, drive devices, break either side."""


@cli.command(cls=Command)
@click.argument("number", type=Number(0, 255))
@_way
@click.option("--count", type=Number(1), default=1, help="How often to send it.")
@_JSON
def request(*, number: int, count: int, as_json: bool, **way: Any) -> None:
    """Send NUMBER (0 to 255) from the driver to the test device, both in this process."""
    from .session import Way, request

    request(number, way=Way(**way), count=count, as_json=as_json, show=click.echo)


@cli.command(cls=Command)
@click.option("--ticks", type=Number(1), default=9, help="Ticks to run for.")
@click.option("--first-after", type=Seconds(zero=True), default=30.0, help="Seconds to the first tick.")
@click.option("--every", type=Seconds(zero=False), default=1.0, help="Seconds between ticks.")
@click.option("--real-time", is_flag=True, help="Wait for the time to pass, instead of moving a virtual clock.")
@_way
@_JSON
def timer(*, ticks: int, first_after: float, every: float, real_time: bool, as_json: bool, **way: Any) -> None:
    """Run the timer variant of device and driver, both in this process."""
    from .session import Way, timer

    timer(
        ticks,
        first_after=first_after,
        every=every,
        real_time=real_time,
        way=Way(**way),
        as_json=as_json,
        show=click.echo,
    )


@cli.command(cls=Command)
@click.option("--socket", "path", type=click.Path(path_type=Path), help="UNIX socket to listen on.")
@click.option("--fd", type=Number(0), default=None, help="Instead: a UNIX socket that the launcher gave.")
@click.option("--device", type=click.Choice(DEVICES), default="test", help="Which device to serve.")
@click.option(
    "--transport",
    type=click.Choice(["vhost-user", "pci"]),
    default="vhost-user",
    help="Its rings to a virtual machine monitor that has the registers, or all of it as a PCI function.",
)
@click.option(
    "--carrier",
    type=click.Choice(["vfio-user", "uml"]),
    default=None,
    help="Who brings the PCI function to a guest; vfio-user if not given.",
)
@_FLAVOUR
@click.option("--express", is_flag=True, help="The PCI function sits behind a PCI Express port.")
@click.option("--timer", is_flag=True, help="The timer variant (test).")
@click.option(
    "--first-after", type=Seconds(zero=True), default=None, help="Seconds to the first tick, 30 if not given."
)
@click.option("--every", type=Seconds(zero=False), default=None, help="Seconds between ticks, else 1.")
@click.option("--image", type=click.Path(path_type=Path), default=None, help="File behind the device (blk).")
@click.option("--read-only", is_flag=True, help="Offer it for reading only (blk).")
@click.option("--queues", type=Number(1, 1024), default=None, help="Request queues (blk), or pairs (net).")
@click.option("--serial", default=None, help="Identification, 20 characters at most (blk).")
@click.option(
    "--native",
    type=click.Choice(["loop", "blocking", "adaptive", "busy"]),
    default=None,
    help="Without Python: in the owner loop, or in threads that wait in that way (blk, rng, net).",
)
@click.option(
    "--backend",
    type=click.Choice(["loopback", "drop", "generate"]),
    default=None,
    help="What becomes of frames, loopback if not given (net).",
)
@click.option(
    "--frame-size", type=Number(14, 65553), default=None, help="Bytes of each generated frame, else 60 (net)."
)
@click.option("--mac", default=None, metavar="ADDRESS", help="Its address, six bytes as 52:54:00:12:34:56 (net).")
@click.option("--mtu", type=Number(68, 65535), default=None, help="The largest payload; not shown if not given (net).")
@click.option(
    "--features", default=None, metavar="+NAME,-NAME", help="Change what is offered: +NAME to add, -NAME not to."
)
@click.option(
    "--policy", type=click.Choice(["interop", "strict"]), default="interop", help="Tolerance towards drivers."
)
def serve(
    *,
    path: Path | None,
    fd: int | None,
    transport: Literal["vhost-user", "pci"],
    carrier: Literal["vfio-user", "uml"] | None,
    flavour: Literal["generic", "transitional", "non-transitional"] | None,
    express: bool,
    features: str | None,
    policy: Literal["interop", "strict"],
    **choice: Any,
) -> None:
    """Serve a device to a real guest until interrupted: over vhost-user, or as a PCI function."""
    if (path is None) == (fd is None):
        raise click.UsageError(
            "give --socket PATH to listen on, or --fd with a socket of the launcher's: one of the two"
        )
    from .devices import Choice
    from .server import serve

    serve(
        Choice(**choice),
        path,
        fd=fd,
        transport=transport,
        carrier=carrier,
        flavour=flavour,
        express=express,
        features=features,
        policy=policy,
        show=click.echo,
    )


@cli.command(cls=Command)
@click.option("--socket", "path", type=click.Path(path_type=Path), required=True, help="Where its server listens.")
@click.option(
    "--transport",
    type=click.Choice(["vhost-user", "pci"]),
    default="vhost-user",
    help="A vhost-user back-end, or a PCI function over vfio-user.",
)
@_INTERFACE
@_INTX
@click.option("--device", type=click.Choice(["test", "blk", "rng"]), default="test", help="What it serves.")
@_RING
@_INDIRECT
@click.option("--count", type=Number(1), default=1000, help="Requests to send.")
@click.option("--depth", type=Number(1, 1024), default=32, help="Requests in flight at once.")
@click.option("--timeout", type=Seconds(zero=False), default=10.0, help="Seconds that any answer may take.")
@click.option("--write", is_flag=True, help="Overwrite the first blocks too, and put them back at the end (blk).")
@_JSON
def drive(*, path: Path, **options: Any) -> None:
    """Drive a device behind a socket, whoever's it is, and check its answers."""
    from .drive import drive

    drive(path, **options, show=click.echo)


@cli.command(cls=Command)
@click.argument("rule", required=False)
@click.option("--list", "all_rules", is_flag=True, help="One line for each rule there is.")
@click.option("--rows", is_flag=True, help="With --list: a line for each row of the robustness catalogue instead.")
@_JSON
def explain(*, rule: str | None, all_rules: bool, rows: bool, as_json: bool) -> None:
    """Explain RULE: its clause, what follows when it is broken, what others do, and a ring that shows it.

    Instead of a rule it may be a row of the robustness catalogue, such as A05 or CVE-2016-5403: what the other side
    does, and what comes of it under both policies.
    """
    if (rule is None) != all_rules:
        raise click.UsageError("give the name of one rule, or --list: one of the two")
    if rows and not all_rules:
        raise click.UsageError("--rows goes with --list; a row is explained by its id alone")
    from .explain import explain

    explain(rule, rows=rows, as_json=as_json, show=click.echo)


@cli.command(cls=Command)
@click.argument("dump", type=click.Path(path_type=Path))
@click.option(
    "--queue",
    type=click.Path(path_type=Path),
    help="JSON object that describes the queue by the names of these options (avail_from for --avail-from).",
)
@click.option("--at", metavar="ADDRESS", default=None, help="Guest address of the dump's first byte, else 0.")
@click.option("--size", metavar="N", default=None, help="Descriptors of the queue.")
@click.option("--desc", metavar="ADDRESS", default=None, help="Descriptor table, or ring of a packed queue.")
@click.option("--driver", metavar="ADDRESS", default=None, help="Avail ring, or driver event area.")
@click.option("--device", metavar="ADDRESS", default=None, help="Used ring, or device event area.")
@click.option("--packed", is_flag=True, default=None, help="The queue is packed.")
@click.option("--features", metavar="NAMES", default=None, help="Negotiated: NAME,NAME or a number of bits.")
@click.option("--index", metavar="N", default=None, help="Number of the queue in its device, for messages.")
@click.option(
    "--avail-from",
    metavar="N",
    default=None,
    help="What the device pops next: an avail index (used.idx); packed: slot, and 0x8000 for wrap counter 1 (0x8000).",
)
@click.option("--taken", metavar="N", default=None, help="Used index up to which the driver took elements (split).")
@click.option(
    "--policy", type=click.Choice(["interop", "strict"]), default=None, help="What is tolerated; strict if not given."
)
@_JSON
@click.pass_context
def check(ctx: click.Context, *, dump: Path, **options: Any) -> None:
    """Find everything that is broken in a queue of DUMP, a raw file of guest memory at rest.

    The queue is described by --size, --desc, --driver and --device, or by --queue. Addresses are guest addresses,
    decimal or with 0x. Each finding is one line and the exit status 1; it is 0 when nothing is broken.
    """
    from .check import check

    ctx.exit(check(dump, **options, show=click.echo))


@cli.command(cls=Command)
@click.option(
    "--target", "targets", multiple=True, metavar="NAME", help="Who is judged; --list names them. Repeatable."
)
@click.option(
    "--program", "programs", multiple=True, metavar="WORDS", help="What starts it, where its name does not. Repeatable."
)
@click.option("--row", "rows", multiple=True, metavar="ID", help="Row of the catalogue, else all. Repeatable.")
@click.option("--patience", type=Seconds(zero=False), default=1.0, help="Seconds that any answer may take.")
@click.option("--markdown", type=click.Path(path_type=Path), default=None, help="Write a page there, too.")
@click.option("--list", "list_them", is_flag=True, help="Show the targets that are known.")
@_JSON
@click.pass_context
def judge(ctx: click.Context, *, targets: tuple[str, ...], list_them: bool, **options: Any) -> None:
    """Put the catalogue's broken rings to somebody else's device, in a process of its own each time."""
    if bool(targets) == list_them:
        raise click.UsageError("give one --target or more, or --list: one of the two")
    from .judge import judge, list_targets

    if list_them:
        list_targets(show=click.echo)
        return
    ctx.exit(judge(targets, **options, show=click.echo))


@cli.command()
@_JSON
def info(*, as_json: bool) -> None:
    """Show versions, features, how the core was built, and what of this machine is usable."""
    from .info import info

    info(as_json=as_json, show=click.echo)


def run(arguments: list[str]) -> int:
    """Run the command; the exit status. Errors become one line on stderr."""
    try:
        result = cli.main(arguments, prog_name="virtio-test", standalone_mode=False)
        # There is none where the launcher has closed it.
        if sys.stdout is not None:
            sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        return _fail(_click_line(error), 2)
    except click.Abort:
        return 130
    except ReaderGone:
        # Nothing is wrong and there is nobody to tell; what is still buffered must not fail at exit again.
        if sys.stdout is not None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        return 0
    except PeerError as error:
        return _fail(str(error), 1)
    except (VirtioTestError, OSError) as error:
        return _fail(_os_line(error), 2)
    return result if isinstance(result, int) else 0


def _click_line(error: click.ClickException) -> str:
    """What is wrong, in one line, with the command that can say more."""
    ctx = getattr(error, "ctx", None)
    path = ctx.command_path if isinstance(ctx, click.Context) else "virtio-test"
    return f"{error.format_message().rstrip('.')} (see {path} --help)"


def _os_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return str(error)


def _fail(line: str, status: int) -> int:
    click.echo(f"virtio-test: {' '.join(line.split())}", err=True)
    return status
