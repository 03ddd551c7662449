"""The bar of a training, in a terminal that is one: what it shows, within its width."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import termios
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from support.planted import make_trainer, planted_batches
from support.process import Process
from tqdm.auto import tqdm

from sae_gated_plugin.model.text import token_batches
from sae_gated_plugin.progress import counted
from sae_gated_plugin.training.progress import Progress

BAR = re.compile(
    r"training +(\d+)%\|.*\| ([\d.]+k?)tok/s, (\d\d:\d\d|\?) left, L0 [\d.e+–]+, loss [\d.e+–]+"
)


def in_terminal(width: int, log: Path, *arguments: str | Path) -> list[str]:
    """What the command line shows in a terminal of that width, each time it begins a line anew."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))

    def attach() -> None:
        for number in range(3):
            os.dup2(theirs, number)
        os.close(ours)

    process = Process(*arguments, log=log, before=attach)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        shown += part
    os.close(ours)
    text = shown.decode()
    assert process.wait() == 0, text
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", text))


@pytest.mark.parametrize(("command", "width"), [("train", 120), ("sweep", 80)])
def test_it_tells_phase_share_speed_time_l0_and_loss(
    small_run: dict[str, Any], tmp_path: Path, command: str, width: int
) -> None:
    if command == "sweep":
        curves = [{"label": name, "architecture": name} for name in ("gated", "relu")]
        small_run["sweep"] = {"curves": curves, "eval_tokens": 2048}
    (tmp_path / "config.yaml").write_text(json.dumps(small_run))
    lines = in_terminal(
        width, tmp_path / "log", command, tmp_path / "config.yaml", "--output", tmp_path / "out"
    )
    assert lines[0] == "loading …"
    phases = [line.split(" ")[0] for line in lines if "%|" in line]
    order = list(dict.fromkeys(phases))
    assert [phase for phase in order if phase in ("reading", "training", "measuring")] == [
        *("reading", "training", "measuring"),
    ]
    told = [match for line in lines if (match := BAR.fullmatch(line.rstrip()))]
    assert len(told) > 1
    shares = [int(match[1]) for match in told]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    bars = [line for line in lines if "%|" in line]
    assert max(map(len, bars)) <= width
    assert any(len(line) > width - 5 for line in bars)  # it takes the room that there is
    reading = [line.rstrip() for line in bars if line.startswith("reading") and "L0" in line]
    assert reading  # with a number that is whole: what does not fit is cut at the end
    assert all(re.search(r", L0 [\d.]+(e\+\d+)?(–[\d.]+)?$", line) for line in reading)


def test_where_there_is_no_terminal_it_is_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the command line leaves tqdm there; one at a time, and none that are not wanted."""

    def lines(**environment: str) -> list[str]:
        with monkeypatch.context() as patch:
            disabled = partialmethod(tqdm.__init__, disable=True)
            patch.setattr(tqdm, "__init__", disabled)
            for name, value in environment.items():
                patch.setenv(name, value)
            trainer = make_trainer("gated")
            batches = list(planted_batches(6))
            trainer.data_provider = iter(batches)
            trainer.cfg.total_training_samples = sum(map(len, batches))
            progress = Progress(trainer)
            with progress.shown():
                trainer.fit()
                progress.reading(0.25)
        return capsys.readouterr().err.splitlines()

    assert not lines()  # a minute has not passed
    monkeypatch.setattr("sae_gated_plugin.progress.LINE_EVERY", 0.0)
    *steps, reading = lines()
    line = r"training, ([\d.]+)% done, [\d.]+k?tok/s, \d\d:\d\d left, L0 [\d.]+, loss [\d.]+"
    shares = [float(match[1]) for text in steps if (match := re.fullmatch(line, text))]
    assert shares == [16.7, 33.3, 50.0, 66.7, 83.3, 100.0]
    assert reading.startswith("reading text (25%)")
    assert not lines(TQDM_DISABLE="1")
    assert not lines(WORLD_SIZE="2", RANK="1")


def test_what_measures_for_long_writes_lines_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True))
    sequences = torch.arange(40).view(10, 4)

    def measured() -> list[str]:
        batches = token_batches(iter(sequences), 30, numbers_per_token=4_000_000)
        assert sum(len(tokens_BP) for tokens_BP, _ in batches) == 8
        assert list(counted("abcd", "probing", "set")) == list("abcd")
        return [line.split("%")[0] for line in capsys.readouterr().err.splitlines()]

    assert not measured()
    monkeypatch.setattr("sae_gated_plugin.progress.LINE_EVERY", 0.0)
    lines = measured()
    assert lines[-4:] == [f"probing, {share}.0" for share in (25, 50, 75, 100)]
    shares = [float(line.removeprefix("measuring, ")) for line in lines[:-4]]
    assert len(shares) > 1
    assert shares == sorted(shares)
    assert shares[-1] == 100


@pytest.mark.parametrize("begun", [0, 2])
def test_it_ends_where_the_training_ends_after_resuming_too(
    begun: int, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer("gated")
    batches = list(planted_batches(6))
    trainer.n_training_samples = begun * len(batches[0])
    trainer.data_provider = iter(batches[begun:])
    trainer.cfg.total_training_samples = sum(map(len, batches)) - 7  # no whole number of batches
    progress = Progress(trainer)
    with progress.shown():
        trainer.fit()
    assert progress._bar.n == progress._bar.total
    shares = [int(share) for share in re.findall(r"(\d+)%", capsys.readouterr().err)]
    assert min(shares) == round(100 * begun / 6)
    assert max(shares) <= 100
