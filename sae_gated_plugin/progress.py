"""How far a long task is, where there is no terminal for a bar: a line a minute on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

from tqdm.auto import tqdm

from .distributed import torchrun

T = TypeVar("T")

#: Seconds between lines.
LINE_EVERY = 60.0


class Lines:
    """What is written in place of a bar of tqdm's that is not shown.

    Nothing under TQDM_DISABLE, and of several ranks by the first alone. unit: of what is counted.
    """

    def __init__(self, bar: Any, unit: str):
        self._bar, self._unit = bar, unit
        unwanted = os.environ.get("TQDM_DISABLE") or torchrun.rank()
        self._wanted = bar.disable and not unwanted
        self._begun = self._written = time.monotonic()

    def write(self, what: str, done: float, numbers: Callable[[], str] = str) -> None:
        """Write how much of the bar's total is done, if a line is due. numbers: read only then."""
        now = time.monotonic()
        if not self._wanted or now - self._written < LINE_EVERY:
            return
        self._written = now
        line = tqdm.format_meter(
            min(done, self._bar.total),
            self._bar.total,
            now - self._begun,
            prefix=what,
            unit=self._unit,
            unit_scale=True,
            bar_format="{desc}, {percentage:.1f}% done, {rate_fmt}, {remaining} left{postfix}",
            postfix=numbers(),
            initial=self._bar.n,
        )
        print(line, file=sys.stderr, flush=True)


def counted(items: Collection[T], what: str, unit: str) -> Iterator[T]:
    """Go through items that take long each, under a bar or with lines."""
    with tqdm(items, desc=what, unit=unit, disable=None, leave=False) as bar:
        lines = Lines(bar, unit)
        for done, item in enumerate(bar, 1):
            yield item
            lines.write(what, done)
