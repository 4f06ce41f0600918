"""What the command line reads: numbers and times within bounds, and commands that say what to give instead."""

from __future__ import annotations

import math
import re
from typing import Any, Final

import click

__all__ = ["DEVICES", "Command", "Group", "Number", "ReaderGone", "Seconds"]

DEVICES: Final = ("test", "blk", "rng", "console", "net")
"""The devices that can be served or driven by name."""


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
