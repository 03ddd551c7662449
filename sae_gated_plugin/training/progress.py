"""The bar of a training: phase, share, tokens per second, time left, L0 and loss, in one line.

Where there is no terminal, as in a cluster's log, the same is a line a minute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepOutput

from ..progress import Lines
from ..saelens_internals import replace_bar
from .divergence import DivergenceGuard

#: tqdm's settings: the bar takes what the terminal leaves beside the numbers.
_SETTINGS: dict[str, Any] = {
    "bar_format": "{desc} {percentage:3.0f}%|{bar}| {rate_fmt}, {remaining} left{postfix}",
    "dynamic_ncols": True,
    "mininterval": 0.5,  # seconds; L0 and loss are read off the device as often
    "smoothing": 0.05,  # of the rate: texts are read in one go, for many steps
    "unit_scale": True,
}


class Progress:
    """What a trainer of SAELens's shows in place of its own bar, which tells losses alone.

    begin: what is done before the first step. unit: what a row of activations stands for. guard:
    knows the last step's L0, where a step's output does not have all latents.
    """

    def __init__(
        self,
        trainer: Any,
        begin: str = "reading text",
        unit: str = "tok",
        guard: DivergenceGuard | None = None,
    ):
        self._trainer, self._guard = trainer, guard
        self._settings = {**_SETTINGS, "desc": begin, "unit": unit}
        self._bar: Any = None
        self._lines: Any = None

    @contextlib.contextmanager
    def shown(self) -> Generator[None]:
        """Show it while the trainer's `fit` runs."""
        with replace_bar(self._trainer, self._open, self._step):
            try:
                yield
            finally:
                if self._bar is not None:
                    self._bar.close()

    def reading(self, share: float) -> None:
        """The next step waits for texts and the language model; share: of what it waits for."""
        what = f"reading text ({min(share, 1):.0%})"
        if self._bar is not None:
            self._lines.write(what, self._trainer.n_training_samples)
            l0, _, _ = (getattr(self._bar, "postfix", None) or "").partition(", loss")  # else cut
            self._bar.set_postfix_str(l0, refresh=False)
            self._bar.set_description_str(what)

    def _open(self, bar: Callable[..., Any], options: Mapping[str, Any]) -> Any:
        done = self._trainer.n_training_samples  # SAELens's for many forgets it
        self._bar = bar(**{**options, **self._settings, "initial": done})
        self._lines = Lines(self._bar, self._settings["unit"])
        return self._bar

    def _step(self, output: TrainStepOutput | Mapping[str, TrainStepOutput], bar: Any) -> None:
        done = min(self._trainer.n_training_samples, bar.total)
        self._lines.write("training", done, lambda: self._numbers(output))
        bar.desc = "training"
        shown = bar.update(done - bar.n)
        due = done == bar.total or "loss" not in str(getattr(bar, "postfix", ""))
        if shown or (due and not bar.disable):
            bar.set_postfix_str(self._numbers(output))

    def _numbers(self, output: TrainStepOutput | Mapping[str, TrainStepOutput]) -> str:
        outputs = output if isinstance(output, Mapping) else {"": output}
        numbers = [_l0_and_loss(one) for one in outputs.values()]
        if self._guard is not None:
            numbers = [(self._guard.l0, loss) for _, loss in numbers]
        texts = [_span([pair[i] for pair in numbers]) for i in range(2)]
        return f"L0 {texts[0]}, loss {texts[1]}"


@torch.no_grad()
def _l0_and_loss(output: TrainStepOutput) -> tuple[float, float]:
    active = output.feature_acts.bool().float().sum() / len(output.sae_in)
    return float(active), float(output.loss)


def _span(values: list[float]) -> str:
    """One value, or the lowest and the highest of several SAEs'."""
    return "–".join(dict.fromkeys(f"{value:.4g}" for value in (min(values), max(values))))
