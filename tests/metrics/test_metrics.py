"""Streaming metrics: against brute force, in any batching, and where they have no value."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.training._interruption import InterruptedException
from scipy.optimize import minimize_scalar
from torch import Tensor

from sae_gated_plugin.errors import UndefinedMetric
from sae_gated_plugin.metrics import reconstruction as metrics
from sae_gated_plugin.metrics.batch import Batch, Metric
from sae_gated_plugin.metrics.firing import L0, DeadShare, LatentDensity
from sae_gated_plugin.metrics.reconstruction import FVU, Gamma, GammaCentered, gamma
from sae_gated_plugin.metrics.registered import Isolated, training_metrics

SCALARS: list[Callable[[], Metric]] = [Gamma, GammaCentered, FVU, L0, DeadShare]


def random_batch(n: int = 120, d_in: int = 6, d_sae: int = 20, seed: int = 0) -> Batch:
    """Shrunk, noisy reconstructions of activations with a mean, from 7 unequal sequences."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(n, d_in) * 2 + normal(d_in) * 3
    return Batch(
        x=x,
        x_hat=0.8 * x + 0.5 * normal(n, d_in),
        feature_acts=(normal(n, d_sae) - 2).relu(),
        sequence=torch.randint(0, 7, (n,), generator=generator).square(),
    )


def part(batch: Batch, rows: Tensor | slice) -> Batch:
    assert batch.feature_acts is not None
    assert batch.sequence is not None
    return Batch(batch.x[rows], batch.x_hat[rows], batch.feature_acts[rows], batch.sequence[rows])


def value_of(metric: Metric, *batches: Batch) -> float:
    for batch in batches:
        metric.update(batch)
    return metric.compute()


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factory", [Gamma, GammaCentered])
def test_gamma_is_the_best_rescaling(factory: Callable[[], Metric], seed: int) -> None:
    batch = random_batch(seed=seed)
    x, x_hat = batch.x.double(), batch.x_hat.double()
    origin = x.mean(0) if factory is GammaCentered else torch.zeros(())
    best = minimize_scalar(
        lambda g: ((x_hat - origin) / g - (x - origin)).square().sum().item(),
        bounds=(0.1, 10),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert value_of(factory(), batch) == pytest.approx(best.x, abs=1e-6)
    assert abs(value_of(Gamma(), batch) - value_of(GammaCentered(), batch)) > 0.01


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
def test_gamma_reads_off_a_known_scale(scale: float) -> None:
    x = random_batch().x.double()
    mean = x.mean(0)
    assert value_of(Gamma(), Batch(x, scale * x)) == pytest.approx(scale, rel=1e-12)
    about_mean = Batch(x, mean + scale * (x - mean))
    assert value_of(GammaCentered(), about_mean) == pytest.approx(scale, rel=1e-12)


def test_pooled_gamma_is_not_the_average_of_ratios() -> None:
    """One batch of large, halved activations and one of small, exact ones."""
    large, small = torch.full((4, 3), 3.0), torch.full((4, 3), 1.0)
    batches = [Batch(large, large / 2), Batch(small, small)]
    average_of_ratios = sum(value_of(Gamma(), batch) for batch in batches) / 2
    assert average_of_ratios == pytest.approx(0.75)
    assert value_of(Gamma(), *batches) == pytest.approx((9 / 4 + 1) / (9 / 2 + 1))


def test_fvu_is_one_minus_saelens_explained_variance() -> None:
    batches = [random_batch(n=n, seed=3) for n in (30, 5, 200)]
    theirs = ExplainedVarianceCalculator()
    for batch in batches:
        theirs.add_batch(batch.x_hat, batch.x)
    assert value_of(FVU(), *batches) == pytest.approx(1 - theirs.compute(), rel=1e-5)


def test_fvu_of_the_mean_is_one_and_of_the_truth_zero() -> None:
    x = random_batch().x.double()
    assert value_of(FVU(), Batch(x, x)) == 0
    assert value_of(FVU(), Batch(x, x.mean(0).expand_as(x))) == pytest.approx(1, rel=1e-12)


def test_a_mean_far_larger_than_the_variation_costs_no_digits() -> None:
    x = torch.randn(500, 4, dtype=torch.float64) * 0.01 + 1e6
    mean = x.mean(0)
    x_hat = mean + 0.9 * (x - mean)
    batches = [Batch(x[i : i + 50], x_hat[i : i + 50]) for i in range(0, 500, 50)]
    assert value_of(GammaCentered(), *batches) == pytest.approx(0.9, rel=1e-5)
    assert value_of(FVU(), *batches) == pytest.approx(0.01, rel=1e-5)


def test_l0_dead_share_and_density() -> None:
    acts = torch.tensor([[1.0, 0, 2, 0], [0, 0, 3, 0], [-1, 0, 0, 0]])
    batch = Batch(torch.ones(3, 2), torch.ones(3, 2), acts)
    assert value_of(L0(), batch) == pytest.approx(4 / 3)
    assert value_of(DeadShare(), batch) == 0.5
    density = LatentDensity()
    density.update(batch)
    assert density.compute().tolist() == pytest.approx([2 / 3, 0, 2 / 3, 0])
    everything_silent = Batch(torch.ones(3, 2), torch.ones(3, 2), torch.zeros(3, 4))
    assert value_of(L0(), everything_silent) == 0
    assert value_of(DeadShare(), everything_silent) == 1


def sparse_forms(dense: Tensor) -> dict[str, Tensor]:
    """The same activations as sparse tensors, awkward ones included."""
    rows, columns = dense.nonzero(as_tuple=True)
    halves = torch.stack([rows.repeat(2), columns.repeat(2)])
    cancelling = torch.tensor([[0, 0], [1, 1]])
    values = torch.cat([dense[rows, columns] / 2] * 2)
    return {
        "coo": dense.to_sparse_coo(),
        "csr": dense.to_sparse_csr(),
        "explicit zeros": torch.sparse_coo_tensor(
            torch.ones_like(dense).nonzero().T,
            dense.flatten(),
            dense.shape,
            check_invariants=True,
        ),
        "duplicates": torch.sparse_coo_tensor(
            torch.cat([halves, cancelling], 1),
            torch.cat([values, torch.tensor([1.0, -1.0])]),
            dense.shape,
            check_invariants=True,
        ),
    }


@pytest.mark.parametrize("form", ["coo", "csr", "explicit zeros", "duplicates"])
@pytest.mark.parametrize("factory", [L0, DeadShare])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_activations_count_like_dense_ones(form: str, factory: Callable[[], Metric]) -> None:
    batch = random_batch()
    assert batch.feature_acts is not None
    dense = batch.feature_acts.clone()
    dense[0, 1] = 0
    dense[:, 3] = 0
    expected = value_of(factory(), Batch(batch.x, batch.x_hat, dense))
    found = value_of(factory(), Batch(batch.x, batch.x_hat, sparse_forms(dense)[form]))
    assert found == expected


def test_sparse_activations_without_an_entry() -> None:
    batch = Batch(torch.ones(3, 2), torch.ones(3, 2), torch.zeros(3, 4).to_sparse_coo())
    assert (value_of(L0(), batch), value_of(DeadShare(), batch)) == (0, 1)


@pytest.mark.parametrize("factory", SCALARS)
def test_half_precision_is_summed_in_fp64(factory: Callable[[], Metric]) -> None:
    batch = random_batch(n=4000)
    assert batch.feature_acts is not None
    half = Batch(
        batch.x.bfloat16() * 300, batch.x_hat.bfloat16() * 300, batch.feature_acts.bfloat16()
    )
    assert half.feature_acts is not None
    wide = Batch(half.x.double(), half.x_hat.double(), half.feature_acts.double())
    assert value_of(factory(), half) == pytest.approx(value_of(factory(), wide), rel=1e-12)


def test_metrics_keep_no_graph() -> None:
    batch = random_batch()
    x_hat = batch.x_hat.requires_grad_()
    metric = Gamma()
    metric.update(Batch(batch.x, x_hat, sequence=batch.sequence))
    assert not metric.sums.requires_grad
    assert metric.interval()[0] < metric.compute()


# --- the same for any batching --------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    cuts=st.lists(st.integers(0, 120), max_size=8),
    order=st.permutations(range(120)),
)
def test_values_do_not_depend_on_batch_split_or_order(
    seed: int, cuts: list[int], order: list[int]
) -> None:
    whole = random_batch(seed=seed)
    shuffled = part(whole, torch.tensor(order))
    bounds = [0, *sorted(cuts), 120]
    parts = [part(shuffled, slice(a, b)) for a, b in pairwise(bounds)]
    for factory in SCALARS:
        assert value_of(factory(), *parts) == pytest.approx(value_of(factory(), whole), rel=1e-9)
    pieces, one = Gamma(), Gamma()
    value_of(pieces, *parts)
    value_of(one, whole)
    assert pieces.interval() == pytest.approx(one.interval(), rel=1e-9)


# --- the interval ---------------------------------------------------------------------------------


def clustered_sample(generator: torch.Generator, n_sequences: int = 50) -> Batch:
    """Sequences of 5 to 40 tokens, each with its own mean and its own shrinkage; d_in is 4.

    x = u_s + w_t and x̂ = c_s x + v_t, u and w standard normal, c_s = 0.9 + 0.2 z_s, v of
    standard deviation 0.3. Per dimension E x² = 2, E c² = 0.85, E v² = 0.09.
    """
    lengths = torch.randint(5, 41, (n_sequences,), generator=generator)
    sequence = torch.arange(n_sequences).repeat_interleave(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(n_sequences, 4)[sequence] + normal(len(sequence), 4)
    c = (0.9 + 0.2 * normal(n_sequences, 1))[sequence]
    return Batch(x, c * x + 0.3 * normal(len(sequence), 4), sequence=sequence)


CLUSTERED_GAMMA = (0.85 * 2 + 0.09) / (0.9 * 2)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(20240424)
    covered = covered_by_tokens = 0
    for _ in range(2000):
        sample = clustered_sample(generator)
        metric = Gamma()
        metric.update(sample)
        low, high = metric.interval()
        covered += low < CLUSTERED_GAMMA < high
        tokens = Gamma()  # the same, had each token been a sequence of its own
        tokens.update(Batch(sample.x, sample.x_hat, sequence=torch.arange(len(sample.x))))
        low, high = tokens.interval()
        covered_by_tokens += low < CLUSTERED_GAMMA < high
    print(f"coverage: by sequence {covered / 2000:.2%}, by token {covered_by_tokens / 2000:.2%}")
    assert 0.93 <= covered / 2000 <= 0.97
    assert covered_by_tokens / 2000 < 0.7


def test_the_interval_of_two_sequences_by_hand() -> None:
    # Sums (‖x̂‖², x·x̂): (1, 1) and (4, 2), so γ = 5/3; without one of them it is 2, or 1. The
    # jackknife's variance is 1/2 · (1/9 + 4/9); t at 97.5 % with one degree of freedom is 12.706.
    x = torch.tensor([[1.0], [1.0]])
    metric = Gamma()
    metric.update(Batch(x, torch.tensor([[1.0], [2.0]]), sequence=torch.tensor([7, 3])))
    low, high = metric.interval()
    half = 12.706204736432095 * math.sqrt(5 / 18)
    assert (low, high) == pytest.approx((5 / 3 - half, 5 / 3 + half), rel=1e-9)


def test_a_higher_level_gives_a_wider_interval() -> None:
    metric = Gamma()
    metric.update(random_batch())
    (low, high), (wider_low, wider_high) = metric.interval(0.8), metric.interval(0.99)
    assert wider_low < low < metric.compute() < high < wider_high
    with pytest.raises(ValueError, match="level must lie between 0 and 1; got 95"):
        metric.interval(95)


# --- undefined ------------------------------------------------------------------------------------

ONES, NAN = torch.ones(3, 2), torch.full((3, 2), math.nan)
X = random_batch().x
CONSTANT = torch.full_like(X, 0.1)
BAD_ACTS = torch.tensor([[1.0, math.nan], [0.0, 1.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("factories", "batches", "reason"),
    [
        ([Gamma], [Batch(ONES, 0 * ONES)], "Every reconstruction is zero"),
        ([Gamma], [Batch(0 * ONES, ONES)], "do not point the same way"),
        ([Gamma], [Batch(ONES, -ONES)], r"Σ x·x̂ = -6, not above 0"),
        ([Gamma], [Batch(NAN, ONES)], "NaN or infinity"),
        ([Gamma, GammaCentered], [Batch(X, X * math.inf)], "NaN or infinity"),
        ([Gamma, GammaCentered, FVU], [], "No tokens have been seen"),
        ([Gamma, GammaCentered, FVU], [Batch(X[:0], X[:0])], "No tokens have been seen"),
        ([GammaCentered], [Batch(X, CONSTANT)], "About the mean"),
        ([GammaCentered], [Batch(CONSTANT, X)], "About the mean"),
        ([GammaCentered], [Batch(CONSTANT, CONSTANT)], "About the mean"),
        ([GammaCentered], [Batch(X, 2 * X.mean(0) - X)], "do not point the same way"),
        ([FVU], [Batch(CONSTANT[:50], X[:50]), Batch(CONSTANT[50:], X[50:])], "are the same"),
        ([FVU], [Batch(X[:1], X[:1])], "All activations are the same"),
        ([FVU], [Batch(X, X * math.nan)], "NaN or infinity"),
        ([L0, DeadShare, LatentDensity], [Batch(ONES, ONES)], "No feature activations have been"),
        ([L0, DeadShare, LatentDensity], [Batch(ONES, ONES, BAD_ACTS)], "activations hold NaN"),
        (
            [L0, DeadShare, LatentDensity],
            [Batch(ONES, ONES, BAD_ACTS.to_sparse_coo())],
            "activations hold NaN",
        ),
    ],
)
def test_what_has_no_value_says_why(
    factories: list[Callable[[], Metric]], batches: list[Batch], reason: str
) -> None:
    for factory in factories:
        metric = factory()
        with pytest.raises(UndefinedMetric, match=reason):
            value_of(metric, *batches)
        if isinstance(metric, Gamma):
            with pytest.raises(UndefinedMetric, match=reason):
                metric.interval()


def test_the_function_gamma_refuses_what_has_no_value() -> None:
    assert gamma(3.0, 4.0) == 0.75
    for sums in [(1.0, 0.0), (1.0, -1.0), (0.0, 0.0), (math.nan, 1.0), (1.0, math.inf)]:
        with pytest.raises(UndefinedMetric):
            gamma(*sums)


def test_the_interval_says_why_it_is_undefined() -> None:
    x = torch.ones(4, 2)
    one_text = Batch(x, x, sequence=torch.zeros(4, dtype=torch.int64))
    one_counts = Batch(x, x * torch.eye(4)[:, :1], sequence=torch.arange(4))
    for batches, reason in (
        ([one_text, one_text], "at least two sequences; there is one"),
        ([one_counts], "Without one of its sequences"),
        ([one_text, Batch(x, x)], "which sequence each token is from"),
    ):
        metric = Gamma()
        assert value_of(metric, *batches) == 1
        with pytest.raises(UndefinedMetric, match=reason):
            metric.interval()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"x_hat": torch.ones(3, 1)}, r"both be \(N, d_in\); got \(3, 2\) and \(3, 1\)"),
        ({"x": torch.ones(1, 3, 2), "x_hat": torch.ones(1, 3, 2)}, r"both be \(N, d_in\)"),
        ({"feature_acts": torch.ones(2, 5)}, r"feature_acts must be \(3, d_sae\); got \(2, 5\)"),
        ({"sequence": torch.ones(3, 1)}, r"sequence must be \(3,\); got \(3, 1\)"),
    ],
)
def test_a_batch_of_ill_fitting_shapes_is_refused(fields: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Batch(**{"x": ONES, "x_hat": ONES, **fields})


# --- in training, and by name ---------------------------------------------------------------------


def test_training_metrics_are_those_of_the_batch() -> None:
    batch = random_batch()
    found = training_metrics(batch.x, batch.x_hat, batch.feature_acts)
    for name, factory in zip(("gamma", "gamma_centered", "fvu", "l0", "dead_share"), SCALARS):
        assert found[name] == value_of(factory(), batch)
        assert isinstance(found[name], float)
    assert set(training_metrics(X, torch.zeros_like(X), None)) == {"fvu"}  # others are undefined


class Third:
    """A metric from a plugin, whose methods do what a test tells it."""

    def __init__(self, update: Any = None, value: Any = 1.0, interval: Any = (0.5, 2)) -> None:
        self.on_update, self.value, self.ends = update, value, interval

    def update(self, batch: Batch) -> None:
        if self.on_update:
            raise self.on_update

    def compute(self) -> Any:
        return self.value

    def interval(self) -> Any:
        return self.ends


@pytest.mark.parametrize("value", [1, 1.0, torch.tensor([1.0]), np.float32(1)])
def test_a_metric_of_a_plugin_may_give_any_number(value: Any) -> None:
    metric = Isolated("third", lambda: Third(value=value))
    assert value_of(metric, random_batch()) == 1.0
    assert type(metric.compute()) is float
    assert metric.interval() == [0.5, 2.0]
    assert not hasattr(Isolated("l0", L0), "interval")


@pytest.mark.parametrize(
    ("options", "reason", "failed"),
    [
        ({"update": UndefinedMetric("Too short.")}, r"Too short\.", False),
        ({"update": ZeroDivisionError("oh")}, "Metric 'third' failed: ZeroDivisionError: oh", True),
        ({"update": SystemExit(3)}, "Metric 'third' failed: SystemExit: 3", True),
        ({"no": "such option"}, "Metric 'third' failed: TypeError", True),
        ({"value": "1"}, "gave a str instead of a number", False),
        ({"value": True}, "gave a bool instead of a number", False),
        ({"value": torch.ones(2)}, "gave a Tensor instead of a number", False),
        ({"value": math.inf}, "gave inf", False),
        ({"value": None, "interval": (2, 1)}, r"gave an interval from 2.0 to 1.0", False),
        ({"value": None, "interval": (2, 1, 3)}, "failed: ValueError: too many values", True),
    ],
)
@pytest.mark.filterwarnings("ignore:Metric 'third' failed:RuntimeWarning")
def test_a_failing_metric_of_a_plugin_is_undefined(
    options: dict[str, Any], reason: str, failed: bool
) -> None:
    metric = Isolated("third", lambda: Third(**options))
    for _ in range(2):
        metric.update(random_batch())
    for _ in range(2):
        with pytest.raises(UndefinedMetric, match=reason):
            metric.interval() if "interval" in options else metric.compute()
    assert (metric._failure is not None) == (failed or "update" in options)


def test_a_signal_that_stops_training_is_no_failure_of_a_metric(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SAELens's handler raises in whatever code is running when the signal comes."""

    def interrupted(self: object, batch: Batch) -> None:
        raise InterruptedException

    monkeypatch.setattr(metrics.Gamma, "update", interrupted)
    batch = random_batch()
    with pytest.raises(InterruptedException):
        training_metrics(batch.x, batch.x_hat, batch.feature_acts)
