"""SIGINT and SIGTERM that wait until the state is one that can be saved."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from ..saelens_internals import without_left_handler

#: Python's own; also in the place of a handler that was not set by Python and cannot be named.
_DEFAULT = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Signals:
    """A context in which SIGINT and SIGTERM are remembered instead of acted upon.

    number: the first that came, or 0; more of them change nothing. In a thread other than the main
    one, where Python allows no handlers, the context does nothing. quiet: say nothing then.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.number = 0
        self._quiet = quiet
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(number, self._remember)
                self._before[number] = without_left_handler(before) or _DEFAULT[number]
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def _remember(self, number: int, _: Any) -> None:
        if not self.number and not self._quiet:
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nStopping as soon as this step is done and saved.\n")
        self.number = self.number or number
