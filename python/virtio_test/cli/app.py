"""The commands and their options; what they do is in the files beside this one."""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal

import click

from virtio_test._core import __version__
from virtio_test.errors import PeerError, VirtioTestError

__all__ = ["cli", "run"]

Ring = Literal["split", "packed"]


class Number(click.ParamType[int]):
    """A whole number within bounds, whose message says what to give instead."""

    name = "number"

    def __init__(self, low: int, high: int | None = None) -> None:
        self.low = low
        self.high = high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See `click.ParamType.convert`."""
        text = str(value)
        wanted = f"from {self.low} to {self.high}" if self.high is not None else f"of at least {self.low}"
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
            self.fail(f"{text!r} is not a whole number: give one {wanted}", param, ctx)
        number = int(text)
        if number < self.low or (self.high is not None and number > self.high):
            self.fail(f"{number} is out of range: give a number {wanted}", param, ctx)
        return number


class Seconds(click.ParamType[float]):
    """A time in seconds, finite, from 0 or above it."""

    name = "seconds"

    def __init__(self, *, zero: bool) -> None:
        self.zero = zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See `click.ParamType.convert`."""
        wanted = "0 or more seconds" if self.zero else "more than 0 seconds (at least a nanosecond)"
        try:
            seconds = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a time: give {wanted}", param, ctx)
        if not math.isfinite(seconds) or not (0 if self.zero else 1e-9) <= seconds <= 1e9:
            self.fail(
                f"{value} is not a time that can be waited for: give {wanted}, a thousand million at most", param, ctx
            )
        return seconds


class ReaderGone(Exception):
    """Whoever read our output has left."""


class Group(click.Group):
    """The commands; click would end the process by itself when the output's reader leaves."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """See `click.Command.make_context`; the help is shown from in there."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except BrokenPipeError:
            raise ReaderGone from None

    def invoke(self, ctx: click.Context) -> Any:
        """See `click.Command.invoke`."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise ReaderGone from None


class Command(click.Command):
    """A command that takes ``-1`` for a bad number, not for an unknown option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See `click.Command.parse_args`."""
        given = list(args)  # click takes them out one by one
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if not re.fullmatch(r"-[0-9.]+", error.option_name):
                raise
            negative = next(text for text in given if text.startswith(error.option_name))
            raise click.UsageError(f"{negative} is negative: nothing here can be below 0", ctx) from None


_FIRST = click.option("--first-after", type=Seconds(zero=True), default=30.0, help="Seconds to the first tick.")
_EVERY = click.option("--every", type=Seconds(zero=False), default=1.0, help="Seconds between ticks.")
_RING = click.option("--ring", type=click.Choice(["split", "packed"]), default="split", help="Format of the virtqueue.")
_INDIRECT = click.option("--indirect", is_flag=True, help="Put every chain into an indirect table.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="virtio-test")
def cli() -> None:
    """The virtio workbench: write devices, drive devices, break either side."""


@cli.command(cls=Command)
@click.argument("number", type=Number(0, 255))
@_RING
@_INDIRECT
@click.option("--count", type=Number(1), default=1, help="How often to send it.")
@_JSON
def request(*, number: int, ring: Ring, indirect: bool, count: int, as_json: bool) -> None:
    """Send NUMBER (0 to 255) from the driver to the test device, both in this process."""
    from .session import request

    request(number, ring=ring, indirect=indirect, count=count, as_json=as_json, show=click.echo)


@cli.command(cls=Command)
@click.option("--ticks", type=Number(1), default=9, help="Ticks to run for.")
@_FIRST
@_EVERY
@click.option("--real-time", is_flag=True, help="Wait for the time to pass, instead of moving a virtual clock.")
@_RING
@_INDIRECT
@_JSON
def timer(
    *, ticks: int, first_after: float, every: float, real_time: bool, ring: Ring, indirect: bool, as_json: bool
) -> None:
    """Run the timer variant of device and driver, both in this process."""
    from .session import timer

    timer(
        ticks,
        first_after=first_after,
        every=every,
        real_time=real_time,
        ring=ring,
        indirect=indirect,
        as_json=as_json,
        show=click.echo,
    )


@cli.command(cls=Command)
@click.option("--socket", "path", type=click.Path(path_type=Path), help="UNIX socket to listen on.")
@click.option("--fd", type=Number(0), default=None, help="Instead: a UNIX socket that the launcher gave.")
@click.option("--device", type=click.Choice(["test"]), default="test", help="Which device to serve.")
@click.option("--timer", "timer_variant", is_flag=True, help="Its timer variant.")
@_FIRST
@_EVERY
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
    device: str,
    timer_variant: bool,
    first_after: float,
    every: float,
    features: str | None,
    policy: Literal["interop", "strict"],
) -> None:
    """Serve a device as a vhost-user back-end to a real guest, until interrupted."""
    if (path is None) == (fd is None):
        raise click.UsageError(
            "give --socket PATH to listen on, or --fd with a socket of the launcher's: one of the two"
        )
    from .server import serve

    serve(
        path,
        fd=fd,
        device=device,
        timer=timer_variant,
        first_after=first_after,
        every=every,
        features=features,
        policy=policy,
        show=click.echo,
    )


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
