"""``virtio-test judge``: the catalogue's broken rings put to somebody else's device, and what becomes of it.

A target that dies or hangs is a finding and the exit status 1. Everything happens in temporary folders, between
processes of this machine; whatever was started is ended.
"""

from __future__ import annotations

import datetime
import shlex
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from virtio_test import judge as judging
from virtio_test.console import print_line
from virtio_test.errors import InvalidArgument

from .progress import Progress

__all__ = ["judge", "list_targets"]


def list_targets(*, show: Callable[[str], object] = print_line) -> str:
    """One line for each target: name and what it is."""
    width = max(map(len, judging.TARGETS))
    text = "\n".join(f"{each.name:{width}}  {each.what}" for each in judging.TARGETS.values())
    show(text)
    return text


def judge(
    targets: Sequence[str],
    *,
    programs: Sequence[str] = (),
    rows: Sequence[str] = (),
    patience: float = judging.PATIENCE,
    as_json: bool = False,
    markdown: Path | None = None,
    show: Callable[[str], object] = print_line,
) -> int:
    """Judge targets and show what was found.

    Args:
        targets: their names.
        programs: the words that start each of them, in the same order; the name alone where there are none.
        rows: the rows to put to them; all when empty.
        patience: seconds that any answer may take.
        as_json: show one JSON object instead of lines.
        markdown: write a page there too.
        show: takes the text.

    Returns:
        1 when a target died or hung, else 0.

    Raises:
        InvalidArgument: an unknown target or row, one named twice, a target that is not there or does not serve, a page
            that cannot be written.
    """
    if programs and len(programs) != len(targets):
        raise InvalidArgument(f"{len(programs)} times --program for {len(targets)} targets: give one for each, or none")
    if len(set(targets)) != len(targets):
        raise InvalidArgument("a target is named twice: judge two programs of one kind in two runs")
    if markdown is not None and (markdown.is_dir() or not markdown.parent.is_dir()):
        raise InvalidArgument(f"{markdown}: no page can be written there")
    put = judging.chosen(rows)
    given = programs or [None] * len(targets)
    chosen = [judging.named(name).started_by(words) for name, words in zip(targets, given, strict=True)]
    versions = [each.version() for each in chosen]
    tables: dict[str, list[judging.Result]] = {}
    for target, version, words in zip(chosen, versions, given, strict=True):
        title = f"{target.name} {version}"
        again = _again(words, patience)
        with Progress(title, len(put)) as tick, _ended_by_sigterm():
            tables[title] = judging.judge(target, put, patience=patience, again=again, done=tick)
        if not as_json:
            show(judging.as_lines(title, tables[title], every=bool(rows)))
    everything = [each for results in tables.values() for each in results]
    if as_json:
        named = {each.name: version for each, version in zip(chosen, versions, strict=True)}
        show(judging.as_json(named, everything))
    if markdown is not None:
        markdown.write_text(judging.as_markdown(tables, date=datetime.datetime.now(datetime.UTC).date().isoformat()))
    return int(any(each.verdict in judging.BAD for each in everything))


def _again(program: str | None, patience: float) -> str:
    """The command that repeats a row with the same program and patience, for `judging.judge`."""
    options = [] if program is None else ["--program", program]
    options += [] if patience == judging.PATIENCE else ["--patience", f"{patience:g}"]
    more = shlex.join(options).replace("{", "{{").replace("}", "}}")
    return f"{judging.AGAIN} {more}".rstrip()


@contextmanager
def _ended_by_sigterm() -> Generator[None]:
    """Inside, SIGTERM interrupts as SIGINT does: what was started has a session of its own and would stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
