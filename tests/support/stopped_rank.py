"""`sae-gated` on a rank that is killed or hangs after a step, or lets torchrun be told to end.

torchrun ... stopped_rank.py RANK STEP SIGNAL ARGUMENTS
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from sae_gated_plugin.cli.commands import main

RANK, STEP, NAME = sys.argv[1:4]
del sys.argv[1:4]
steps = itertools.count(1)


def look(*_: Any) -> None:
    if next(steps) != int(STEP):
        return
    if NAME != "SIGTERM":
        os.kill(os.getpid(), signal.Signals[NAME])
        return
    arrived, before = threading.Event(), signal.getsignal(signal.SIGTERM)
    assert callable(before)

    def arrive(*given: Any) -> None:
        before(*given)
        arrived.set()

    signal.signal(signal.SIGTERM, arrive)
    os.kill(os.getppid(), signal.SIGTERM)
    assert arrived.wait(60)


if os.environ["RANK"] == RANK:
    register_optimizer_step_post_hook(look)
main()
