"""Comparing Pareto curves at equal loss recovered."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import numpy.typing as npt
from scipy import special

from .reading import Point

Array = npt.NDArray[np.float64]
Curve = tuple[Array, Array]
Seed = int | None


@dataclass(frozen=True)
class Comparison:
    """How many active latents one label needs relative to another, at equal loss recovered.

    ratio, low, high: dimensionless; None where there is none, and `note` then says why. interval:
    "t" (95 %, Student's t over seeds), "range" (lowest to highest pair of seeds), "bound" (all that
    is known is that the ratio lies below `high`, or above `low`) or None.
    loss_recovered_range: (low, high), fractions, over which log L0 was averaged.
    """

    label: str
    reference: str
    note: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    interval: str | None = None
    loss_recovered_range: tuple[float, float] | None = None

    @property
    def share(self) -> str:
        """The result in a cell of a table."""
        return self._share() or "none"

    @property
    def claim(self) -> str:
        """The result in one sentence."""
        share = self._share()
        if not share:
            return f"No ratio can be given for {self.label} against {self.reference}."
        return (
            f"At equal loss recovered, {self.label} needs {share} of {self.reference}’s "
            "active latents."
        )

    def _share(self) -> str:
        low, ratio, high = (
            f"{100 * value:.1f}" if value else "" for value in (self.low, self.ratio, self.high)
        )
        if self.interval == "bound":
            return f"less than {high} %" if high else f"more than {low} %"
        return f"{ratio} % [{low}–{high} %]" if ratio and low else f"{ratio} %" if ratio else ""


def frontier(l0: Sequence[float], loss_recovered: Sequence[float]) -> Curve:
    """Return a curve's frontier: (log L0, loss recovered), each (k,), both strictly growing.

    l0, loss_recovered: (n,), one SAE each, in any order; l0 > 0. An SAE is left out if another one
    recovers as much or more with no more active latents. 1 <= k <= n, and k = 0 for n = 0.
    """
    kept: list[tuple[float, float]] = []
    for active, recovered in sorted(zip(l0, loss_recovered), key=lambda pair: (pair[0], -pair[1])):
        if not kept or recovered > kept[-1][1]:
            kept.append((math.log(active), recovered))
    array = np.array(kept, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def mean_log_l0(curve: Curve, low: float, high: float) -> float:
    """Return the mean of log L0 over loss recovered from `low` to `high`, on a frontier.

    curve: (log L0, loss recovered) as `frontier` returns it, k >= 1, reaching from `low` to `high`,
    which may be equal. Exact for the piecewise linear interpolation. Raises ValueError outside the
    curve's range.
    """
    log_l0, recovered = curve
    if not recovered[0] <= low <= high <= recovered[-1]:
        raise ValueError(
            f"[{low}, {high}] is not a range within the curve's, "
            f"[{recovered[0]}, {recovered[-1]}]; nothing is extrapolated"
        )
    if low == high:
        return float(np.interp(low, recovered, log_l0))
    inner = recovered[(recovered > low) & (recovered < high)]
    knots = np.concatenate([[low], inner, [high]])
    values = np.interp(knots, recovered, log_l0)
    return float((np.diff(knots) * (values[1:] + values[:-1]) / 2).sum() / (high - low))


def compare(
    label: str,
    curves: Mapping[Seed, Curve],
    reference: str,
    reference_curves: Mapping[Seed, Curve],
) -> Comparison:
    """Return label's L0 over reference's at equal loss recovered, with an interval over seeds.

    curves, reference_curves: seed → frontier. Of a label with curves, seeds of one SAE are left
    out, and the logarithm of the ratio is averaged over the range of loss recovered that is common
    to all curves of both labels. A label whose seeds all have one SAE is compared at what each
    recovers. Three or more seeds in common: mean and Student's t interval (95 %) over the ratios of
    equal seeds. Fewer: mean and range over all pairs of seeds.
    """
    result = partial(Comparison, label, reference)
    sides = {name: dict(own) for name, own in ((label, curves), (reference, reference_curves))}
    left_out, single = "", list[str]()
    for name, side in sides.items():
        short = [seed for seed, curve in side.items() if len(curve[0]) < 2]
        if len(short) == len(side):
            single.append(name)
        elif short:
            for seed in short:
                del side[seed]
            seeds = ", ".join("unknown" if seed is None else str(seed) for seed in short)
            left_out += f" Left out, with fewer than two SAEs to join: {name}, seed {seeds}."
    if len(single) == 2 or not all(sides.values()):
        return result(
            "A curve needs at least two SAEs of one seed, of which the one with more active "
            f"latents recovers more of the loss; {' and '.join(single)} "
            f"{'have' if len(single) == 2 else 'has'} none."
        )
    ours, theirs = sides.values()
    spans = {pair: _common([ours[pair[0]], theirs[pair[1]]]) for pair in product(ours, theirs)}
    if not single:
        spans = dict.fromkeys(spans, _common([*ours.values(), *theirs.values()]))
    if any(low > high for low, high in spans.values()):
        return _without_overlap(sides, result)
    of_pair = {
        pair: mean_log_l0(ours[pair[0]], *span) - mean_log_l0(theirs[pair[1]], *span)
        for pair, span in spans.items()
    }
    common = [seed for seed in ours if seed in theirs]
    if len(common) >= 3:
        logs = np.array([of_pair[seed, seed] for seed in common])
        quantile = float(special.stdtrit(len(logs) - 1, 0.975))
        half = quantile * float(logs.std(ddof=1)) / math.sqrt(len(logs))
        bounds, interval = (logs.mean() - half, logs.mean() + half), "t"
        seeds = f"95 % interval by Student’s t over {len(common)} pairs of equal seeds"
    else:
        logs = np.array([*of_pair.values()])
        bounds, interval = (logs.min(), logs.max()), "range" if len(logs) > 1 else None
        seeds = "one seed each, so no interval"
        if interval:
            seeds = (
                f"in brackets the range over all {len(logs)} pairs of seeds, not a confidence "
                "interval"
            )
    low, high = min(low for low, _ in spans.values()), max(high for _, high in spans.values())
    where = f"Averaged over loss recovered from {_percent_range(low, high)}"
    if single:
        where = f"At what {single[0]}’s one SAE per seed recovers, {_percent_range(low, high)}"
    return result(
        f"{where}; {seeds}.{left_out}",
        ratio=float(np.exp(logs.mean())),
        low=float(np.exp(bounds[0])) if interval else None,
        high=float(np.exp(bounds[1])) if interval else None,
        interval=interval,
        loss_recovered_range=(low, high),
    )


def _without_overlap(
    sides: dict[str, dict[Seed, Curve]], result: Callable[..., Comparison]
) -> Comparison:
    """The bound that may be known where no loss recovered is common. sides: the label's first."""
    label = next(iter(sides))
    ranges = "; ".join(
        f"{name}: {', '.join(_percent_range(c[1][0], c[1][-1]) for c in side.values())}"
        for name, side in sides.items()
    )
    note = (
        "No range of loss recovered is common to all their curves, and nothing is "
        f"extrapolated ({ranges})."
    )
    for (better, own), (worse, others) in zip(sides.items(), reversed(sides.items())):
        if bound := _bound(list(own.values()), list(others.values())):
            note += f" {better}’s sparsest SAEs recover more than {worse}’s densest."
            if better == label:
                return result(note, high=bound, interval="bound")
            return result(note, low=1 / bound, interval="bound")
    return result(note)


def _common(curves: Sequence[Curve]) -> tuple[float, float]:
    """The loss recovered that all of them reach, from lowest to highest; empty if that is lower."""
    return (
        max(float(recovered[0]) for _, recovered in curves),
        min(float(recovered[-1]) for _, recovered in curves),
    )


def _bound(better: Sequence[Curve], worse: Sequence[Curve]) -> float | None:
    """What the ratio of L0 lies below, if even the sparsest SAEs of `better` recover more.

    What the densest of `worse` recover takes `better` fewer latents still. Frontiers; None where
    the curves do not lie so, or the bound would be no news.
    """
    recovered = min(curve[1][0] for curve in better) >= max(curve[1][-1] for curve in worse)
    log_ratio = max(curve[0][0] for curve in better) - min(curve[0][-1] for curve in worse)
    return math.exp(log_ratio) if recovered and log_ratio < 0 else None


def _percent_range(low: float, high: float) -> str:
    ends = (f"{100 * low:.2f}", f"{100 * high:.2f}")
    return f"{' to '.join(dict.fromkeys(ends))} %"


def comparisons(points: Sequence[Point], labels: Sequence[str]) -> list[Comparison]:
    """Compare the first of `labels` with each other one; 'standard' is always the reference.

    The fairest comes first: plain ReLU codes, the paper's baseline, before others, and of each kind
    the one that the first label has the least advantage over.
    """
    saes: dict[str, dict[Seed, list[tuple[float, float]]]] = {label: {} for label in labels}
    for point in sorted(points, key=lambda point: (point["seed"] is None, point["seed"] or 0)):
        if point["l0"] and point["loss_recovered"] is not None:
            of_seed = saes[point["label"]].setdefault(point["seed"], [])
            of_seed.append((point["l0"], point["loss_recovered"]))
    curves = {
        label: {seed: frontier(*zip(*pairs)) for seed, pairs in of_label.items()}
        for label, of_label in saes.items()
    }
    first, others = labels[0], labels[1:]
    pairs = [(other, first) if first == "standard" else (first, other) for other in others]
    found = [compare(one, curves[one], other, curves[other]) for one, other in pairs]
    baselines = {"standard"} | {p["label"] for p in points if p["architecture"] == "standard"}
    if first != "standard":
        found.sort(key=lambda c: (c.reference not in baselines, -(c.ratio or c.high or 0)))
    return found
