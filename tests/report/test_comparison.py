"""Ratios of active latents against hand-computed ones."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from support.results_files import result

from sae_gated_plugin.report.comparison import compare, comparisons, frontier, mean_log_l0
from sae_gated_plugin.report.figures import by_setting
from sae_gated_plugin.report.style import SIZE, log_axis

NUMBERS = st.floats(0.1, 1000)
CURVES = st.lists(st.tuples(NUMBERS, st.floats(0.5, 1)), min_size=1, max_size=9)


@given(CURVES)
def test_the_frontier_grows_and_no_sae_beats_it(curve: list[tuple[float, float]]):
    log_l0, recovered = frontier(*zip(*curve))
    assert (np.diff(recovered) > 0).all()
    assert (np.diff(log_l0) >= 0).all()  # neighbouring floats may have one logarithm
    for l0, value in curve:
        better = (log_l0 <= math.log(l0)) & (recovered >= value)
        assert better.any()


def test_frontier_by_hand():
    # 20 recovers less than 10 does; of the two at 40 the better stays; 50 adds nothing.
    log_l0, recovered = frontier([40, 10, 20, 40, 50], [0.96, 0.9, 0.8, 0.97, 0.97])
    assert np.exp(log_l0) == pytest.approx([10, 40])
    assert recovered.tolist() == [0.9, 0.97]
    assert frontier([], [])[0].shape == (0,)


def test_mean_log_l0_by_hand():
    # Slope 10 below 0.9, 30 above: half of each, means 0.5 and 1 + 1.5.
    curve = np.array([0.0, 1.0, 4.0]), np.array([0.8, 0.9, 1.0])
    assert mean_log_l0(curve, 0.8, 1.0) == pytest.approx(1.5)
    assert mean_log_l0(curve, 0.85, 0.95) == pytest.approx((0.75 + 1.75) / 2)
    with pytest.raises(ValueError, match="nothing is extrapolated"):
        mean_log_l0(curve, 0.7, 0.9)


@settings(deadline=None)
@given(CURVES, st.floats(0.05, 20))
def test_a_planted_ratio_is_found(curve: list[tuple[float, float]], ratio: float):
    plain = frontier(*zip(*curve))
    scaled = plain[0] + math.log(ratio), plain[1]
    found = compare("ours", {0: scaled}, "theirs", {0: plain})
    if len(plain[0]) < 2:
        assert found.ratio is None
        assert "at least two SAEs" in found.note
    else:
        assert found.ratio == pytest.approx(ratio, rel=1e-9)
        assert found.loss_recovered_range == (plain[1][0], plain[1][-1])
        assert "one seed each, so no interval" in found.note
        backwards = compare("theirs", {0: plain}, "ours", {0: scaled})
        assert backwards.ratio == pytest.approx(1 / ratio, rel=1e-9)


def line(ratio: float, low: float = 0.9, high: float = 0.98, points: int = 4):
    """SAEs on log L0 = 20 · loss recovered, scaled."""
    recovered = np.linspace(low, high, points)
    return frontier((ratio * np.exp(20 * recovered)).tolist(), recovered.tolist())


def test_a_ratio_of_a_half_from_saes_at_other_places():
    found = compare("gated", {0: line(0.5, 0.89, 0.97, 7)}, "standard", {0: line(1)})
    assert found.ratio == pytest.approx(0.5, abs=1e-9)
    assert found.loss_recovered_range == (0.9, 0.97)
    assert found.interval is found.low is found.high is None
    assert found.claim == (
        "At equal loss recovered, gated needs 50.0 % of standard’s active latents."
    )


def test_identical_curves_have_ratio_1():
    same = {seed: line(1 + seed) for seed in range(3)}
    found = compare("a", same, "b", same)
    assert (found.ratio, found.low, found.high) == (1, 1, 1)


def test_a_ratio_that_varies_is_averaged_in_the_logarithm():
    ours = frontier([10, 100], [0.9, 0.98])
    theirs = frontier([20, 100], [0.9, 0.98])
    assert compare("a", {0: ours}, "b", {0: theirs}).ratio == pytest.approx(math.sqrt(0.5))


def test_three_seeds_give_students_t_over_equal_seeds():
    # Seeds differ tenfold; pairing equal ones removes that. t(0.975, 2) from a printed table.
    ratios = [0.5, 0.6, 0.7]
    ours = {seed: line(10**seed * ratio) for seed, ratio in enumerate(ratios)}
    theirs = {seed: line(10**seed) for seed in (2, 1, 0)}
    logs = np.log(ratios)
    half = 4.302653 * logs.std(ddof=1) / math.sqrt(3)
    found = compare("a", ours, "b", theirs)
    assert found.interval == "t"
    assert found.ratio == pytest.approx(math.exp(logs.mean()))
    assert found.low == pytest.approx(math.exp(logs.mean() - half), rel=1e-5)
    assert found.high == pytest.approx(math.exp(logs.mean() + half), rel=1e-5)
    assert re.search(r"\[\d+\.\d–\d+\.\d %\]", found.claim)
    assert "Student’s t over 3 pairs of equal seeds" in found.note


@pytest.mark.parametrize(("our_seeds", "pairs"), [((0, 1), 4), ((7, 8, 9), 6), ((5,), 2)])
def test_fewer_seeds_in_common_give_the_range_over_pairs(our_seeds: tuple[int, ...], pairs: int):
    ours = {seed: line(0.5 + 0.1 * i) for i, seed in enumerate(our_seeds)}
    found = compare("a", ours, "b", {0: line(1.0), 1: line(1.25)})
    assert found.interval == "range"
    assert found.low == pytest.approx(0.5 / 1.25)
    assert found.high == pytest.approx(0.5 + 0.1 * (len(our_seeds) - 1))
    assert f"range over all {pairs} pairs of seeds, not a confidence interval" in found.note


def test_no_overlap_is_said_and_not_extrapolated():
    found = compare("a", {0: line(1, 0.9, 0.94)}, "b", {0: line(1, 0.95, 0.98)})
    assert found.ratio is found.loss_recovered_range is None
    assert "nothing is extrapolated (a: 90.00 to 94.00 %; b: 95.00 to 98.00 %)" in found.note
    assert found.claim == "No ratio can be given for a against b."


def test_without_overlap_a_bound_may_be_known():
    """0.3 of the L0 at 0.95 recovered: even more than the other's at 0.94, which so takes less."""
    better, worse = {0: line(0.3, 0.95, 0.98), 1: line(0.2, 0.95, 0.98)}, {0: line(1, 0.9, 0.94)}
    bound = 0.3 * math.exp(20 * 0.01)
    found = compare("a", better, "b", worse)
    assert (found.ratio, found.low, found.interval) == (None, None, "bound")
    assert found.high == pytest.approx(bound)
    assert found.claim == (
        f"At equal loss recovered, a needs less than {100 * bound:.1f} % of b’s active latents."
    )
    assert "a’s sparsest SAEs recover more than b’s densest" in found.note
    backwards = compare("b", worse, "a", better)
    assert (backwards.ratio, backwards.high, backwards.interval) == (None, None, "bound")
    assert backwards.low == pytest.approx(1 / bound)
    assert "needs more than" in backwards.claim


def test_a_seed_of_one_sae_is_left_out_and_named():
    ours = {0: line(0.5), 3: line(0.5, points=1)}
    found = compare("a", ours, "b", {0: line(1)})
    assert found.ratio == pytest.approx(0.5)
    assert "Left out, with fewer than two SAEs to join: a, seed 3." in found.note


def test_a_single_sae_is_compared_at_what_it_recovers():
    """By hand: half way up from 10 to 40 in the logarithm is 20, against its 30."""
    curve = {0: frontier([10, 40], [0.9, 0.98])}
    found = compare("a", curve, "b", {0: frontier([30], [0.94])})
    assert found.ratio == pytest.approx(20 / 30)
    assert found.loss_recovered_range == (0.94, 0.94)
    assert (
        found.note
        == "At what b’s one SAE per seed recovers, 94.00 %; one seed each, so no interval."
    )
    assert compare("b", {0: frontier([30], [0.94])}, "a", curve).ratio == pytest.approx(30 / 20)
    two = compare("a", curve, "b", {0: frontier([30], [0.94]), 1: frontier([80], [0.98])})
    assert (two.low, two.high, two.interval) == (*map(pytest.approx, (1 / 2, 2 / 3)), "range")
    assert "b’s one SAE per seed recovers, 94.00 to 98.00 %" in two.note

    outside = compare("a", curve, "b", {0: frontier([30], [0.89])})
    assert (outside.ratio, outside.interval) == (None, "bound")
    assert outside.high == pytest.approx(10 / 30)  # a's sparsest, which recovers more
    above = compare("a", curve, "b", {0: frontier([30], [0.99])})
    assert (above.ratio, above.low) == (None, pytest.approx(40 / 30))
    assert "nothing is extrapolated (a: 90.00 to 98.00 %; b: 99.00 %)" in above.note


def test_who_is_compared_with_whom():
    def pairs(*labels: str) -> list[tuple[str, str]]:
        return [(c.label, c.reference) for c in comparisons([], labels)]

    assert pairs("gated", "standard", "a") == [("gated", "standard"), ("gated", "a")]
    assert pairs("standard", "a", "b") == [("a", "standard"), ("b", "standard")]
    assert pairs("a") == []


@settings(deadline=None, max_examples=50)
@given(st.floats(0.1, 1e4), st.floats(1, 1e5))
def test_two_ticks_or_more_lie_within_the_axis(low: float, factor: float):
    axes = Figure(SIZE).subplots()
    log_axis(axes, [low, low * factor])
    left, right = axes.get_xlim()
    ticks = [tick for tick in axes.xaxis.get_majorticklocs() if left <= tick <= right]
    assert 2 <= len(ticks) <= 10


def test_settings_group_seeds():
    both = [result(seed=s, settings={"a": 1, "b": 2}) for s in (0, 1)]
    turned = result(seed=2, settings={"b": 2, "a": 1})
    assert list(map(len, by_setting([*both, turned]))) == [3]
    bare = [result(l0=9, settings={}, target_l0=t, l1_coefficient=None) for t in (16, 16, 32, None)]
    assert sorted(map(len, by_setting([*bare, bare[-1]]))) == [1, 1, 1, 2]


def test_the_fairest_comparison_leads() -> None:
    """Of the baselines the strongest, not the one that flatters most; then what is no baseline."""
    l0 = {"gated": 10, "standard": 50, "relu + L1": 20, "other": 12}
    points = [
        result(label, 0, factor * l0[label], loss_recovered=0.9 + factor / 100)
        | {"architecture": "gated" if label in ("gated", "other") else "standard"}
        for label in l0
        for factor in (1, 2)
    ]
    found = comparisons(list(points), list(l0))
    assert [c.reference for c in found] == ["relu + L1", "standard", "other"]
    assert found[0].ratio == pytest.approx(0.5)
