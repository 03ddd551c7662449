"""Registered metrics, isolated from each other, in training and by name."""

from __future__ import annotations

import contextlib
import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import PluginError, UndefinedMetric
from ..plugins.hookspecs import hookimpl
from ..plugins.isolation import isolated
from .batch import Batch, Metric
from .firing import L0, DeadShare
from .reconstruction import FVU, Gamma, GammaCentered


class Isolated:
    """A registered metric that loses nobody else's hour of measuring: its failure is an
    undefined value that says why.
    """

    def __init__(self, name: str, make: Callable[[], Any]):
        self.name = name
        self._failure: str | None = None
        self._metric: Any = None
        with contextlib.suppress(UndefinedMetric):
            self._metric = self._attempt(make)
            if self._attempt(lambda: hasattr(self._metric, "interval")):
                self.interval = self._interval

    def update(self, batch: Batch) -> None:
        """Take in a batch of tokens; after a failure nothing more."""
        try:
            self._attempt(lambda: self._metric.update(batch))
        except UndefinedMetric as error:
            self._failure = str(error)

    def compute(self) -> float:
        """Return the value, a finite number, or raise UndefinedMetric."""
        return self._attempt(lambda: self._number(self._metric.compute()))

    def _interval(self) -> list[float]:
        def ends() -> list[float]:
            low, high = self._metric.interval()
            return [self._number(low), self._number(high)]

        low, high = self._attempt(ends)
        if low > high:
            raise UndefinedMetric(f"Metric '{self.name}' gave an interval from {low} to {high}.")
        return [low, high]

    def _attempt(self, action: Callable[[], Any]) -> Any:
        if self._failure is not None:
            raise UndefinedMetric(self._failure)
        try:
            with isolated(f"Metric '{self.name}'", UndefinedMetric):
                return action()
        except PluginError as error:
            self._failure = str(error)
            warnings.warn(self._failure, RuntimeWarning, stacklevel=3)
            raise UndefinedMetric(self._failure) from error

    def _number(self, value: Any) -> float:
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            kind = type(value).__name__
            raise UndefinedMetric(f"Metric '{self.name}' gave a {kind} instead of a number.")
        if not math.isfinite(value):
            raise UndefinedMetric(f"Metric '{self.name}' gave {value}.")
        return float(value)


def registered_metrics() -> dict[str, Isolated]:
    """A new metric of every registered kind, by name."""
    from ..plugins.bridge import registry

    return {name: Isolated(name, make) for name, make in registry().metrics.items()}


def training_metrics(x: Tensor, x_hat: Tensor, feature_acts: Tensor | None) -> dict[str, float]:
    """Compute every registered metric on one training batch, for `TrainStepOutput.metrics`.

    x, x_hat: (N, d_in). feature_acts: (N, d_sae), dense or sparse. A metric that is undefined on
    this batch is left out, so that a run's log shows a gap and not a NaN. That only shows once it
    is computed, hence values and no callables: call it on logging steps.
    """
    batch = Batch(x, x_hat, feature_acts)
    values: dict[str, float] = {}
    for name, metric in registered_metrics().items():
        metric.update(batch)
        with contextlib.suppress(UndefinedMetric):
            values[name] = metric.compute()
    return values


@hookimpl
def register_metrics(register: Callable[[str, Callable[[], Metric]], None]) -> None:
    """Register the built-in metrics that have a single number for a value."""
    register("gamma", Gamma)
    register("gamma_centered", GammaCentered)
    register("l0", L0)
    register("fvu", FVU)
    register("dead_share", DeadShare)
