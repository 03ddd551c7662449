"""Finding the support, screened by bfloat16 and not: nothing is missed, and little too much."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_gated_plugin.core import finding


def reference_support(x: Tensor, W: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """The float64 product, and how far float32 rounding may move it."""
    exact = x.double() @ W.double()
    slack = x.shape[1] * 2.0**-23 * x.double().norm(dim=1)[:, None] * W.double().norm(dim=0)
    return exact - threshold.double(), slack + x.shape[1] * 2.0**-148


def assert_support_is_float32s(x: Tensor, W: Tensor, threshold: Tensor) -> None:
    support, values = finding.find_support(x, W, threshold, screen=True)
    found = torch.zeros(x.shape[0] * W.shape[1], dtype=torch.bool)
    found[support.flat] = True
    margin, slack = reference_support(x, W, threshold)
    wrong = found.view_as(margin) != (margin > 0)
    assert not (wrong & (margin.abs() > slack)).any()
    exact = (x.double() @ W.double()).view(-1)[support.flat]
    assert ((values.double() - exact).abs() <= slack.view(-1)[support.flat]).all()


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 700),
    d_in=st.integers(1, 80),
    d_sae=st.integers(1, 130),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-42, 1e-30, 1e-3, 1.0, 1e4, 1e17]),
    threshold=st.sampled_from([-1.0, 0.0, 0.5, 2.5]),
)
def test_screening_finds_float32s_support(
    n: int, d_in: int, d_sae: int, seed: int, scale: float, threshold: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_in, generator=generator) * scale
    x *= torch.randn(n, 1, generator=generator).exp() ** 2  # norms over orders of magnitude
    W = torch.randn(d_in, d_sae, generator=generator) / d_in**0.5
    limits = torch.full((d_sae,), threshold * scale) * torch.rand(d_sae, generator=generator)
    assert_support_is_float32s(x, W, limits)


def cancelling(n: int, d_sae: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """x (n, 64) and W (64, d_sae) whose products are small sums of large terms."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 64, generator=generator)
    W = torch.randn(64, d_sae, generator=generator)
    W[32:] = -W[:32]
    x[:, 32:] = x[:, :32] * (1 + 1e-4 * torch.randn(n, 32, generator=generator))
    return x, W, generator


def test_screening_near_ties_and_cancellation() -> None:
    x, W, generator = cancelling(300, 128)
    assert_support_is_float32s(x, W, torch.zeros(128))
    # Thresholds laid within a bfloat16 ulp of actual products, on both sides.
    ties = (x @ W)[0] * (1 + 2.0**-9 * torch.randn(128, generator=generator))
    assert_support_is_float32s(x, W, ties)
    # Within a float32 ulp, of products of either sign.
    assert_support_is_float32s(
        x, W, (x @ W)[1] * (1 + 2.0**-23 * torch.randn(128, generator=generator))
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e12])
def test_screening_misses_nothing_where_all_rounding_goes_one_way(sign: int, scale: float) -> None:
    """Each factor at the middle of two bfloat16 numbers, on the worse side; thresholds below m."""
    away = 1 + 2.0**-8 * (1 - sign * 1e-3)  # from 0 where m is negative
    x, W = torch.full((300, 384), scale * away), torch.full((384, 400), sign * away)
    threshold = (x[:1] @ W)[0] * (1 - sign * 1e-4)
    threshold[::2] = threshold[::2].abs() * 2  # most are far off, or screening gives up
    threshold[1::4] = threshold[::2][0]
    candidates = finding.screened(x, W, threshold)
    assert candidates is not None
    expected = (x @ W > threshold).view(-1).nonzero().squeeze(1)
    assert expected.numel() == 300 * 100
    assert torch.equal(candidates.flat, expected)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 3e38])
def test_screening_steps_aside_for_thresholds_that_it_cannot_sum(bad: float) -> None:
    x, W, threshold = torch.randn(600, 16), torch.randn(16, 64), torch.full((64,), 9.0)
    threshold[5] = bad
    assert finding.screened(x, W, threshold) is None
    support, _ = finding.find_support(x, W, threshold, screen=True)
    assert torch.equal(support.flat, (x @ W > threshold).view(-1).nonzero().squeeze(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_sparse_form_of_other_dtypes(dtype: torch.dtype) -> None:
    x, W = torch.randn(600, 16).to(dtype), torch.randn(16, 64).to(dtype)
    support, values = finding.find_support(x, W, torch.full((64,), 2.0, dtype=dtype))
    expected = (x @ W > 2).view(-1).nonzero().squeeze(1)
    assert torch.equal(support.flat, expected)
    assert torch.equal(values, (x @ W).view(-1)[expected])


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 3e38])
def test_screening_steps_aside_for_what_it_cannot_bound(bad: float) -> None:
    x, W = torch.randn(600, 16), torch.randn(16, 64)
    x[7, 3] = bad
    assert finding.screened(x, W, torch.ones(64)) is None
    support, _ = finding.find_support(x, W, torch.ones(64), screen=True)
    expected = (x @ W > 1).view(-1).nonzero().squeeze(1)
    assert torch.equal(support.flat, expected)


def test_screening_steps_aside_when_everything_is_near() -> None:
    x, W = torch.randn(600, 16), torch.randn(16, 64)
    assert finding.screened(x, W, torch.zeros(64)) is None  # half of all entries are active


def test_screening_rules_out_most_entries() -> None:
    x = torch.randn(600, 512)
    W = torch.nn.functional.normalize(torch.randn(512, 2048), dim=0)
    threshold = torch.full((2048,), 2.7)
    candidates = finding.screened(x, W, threshold)
    assert candidates is not None
    active = int((x @ W > threshold).sum())
    assert active <= candidates.col.numel() < 2 * active


@pytest.mark.slow
@pytest.mark.skipif(not finding.fast_bfloat16("cpu"), reason="screening is off on this CPU")
def test_screening_on_a_billion_entries() -> None:
    """The float32 matmul's support, but for entries within float32 rounding of the threshold.

    Plain, large norms, near-ties, cancellation, heavy tails: 15 problems of 4096 x 16384 entries.
    """
    n, d_in, d_sae = 4096, 768, 16384
    entries = different = candidates = active = 0
    for seed in range(15):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, d_in, generator=generator)
        W = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1).T
        threshold = torch.full((d_sae,), 2.75)
        kind = seed % 5
        if kind == 1:
            x, threshold = x * 1e6, threshold * 1e6
        elif kind == 2:  # thresholds on actual products
            threshold = (x[:1] @ W).abs()[0].clamp_min(2.5)
        elif kind == 3:  # large terms that cancel
            half = 100 * torch.randn(n, d_in // 2, generator=generator)
            x = x + torch.cat([half, -half], dim=1)
            W = W + torch.cat([W[: d_in // 2], W[: d_in // 2]]) * 0.1
            threshold = threshold * 40
        elif kind == 4:  # norms over four orders of magnitude
            x *= (2 * torch.randn(n, 1, generator=generator)).exp()
            threshold = threshold * 50
        screened = finding.screened(x, W, threshold)
        assert screened is not None, kind
        found, _ = finding.find_support(x, W, threshold, screen=True)
        expected, _ = finding.find_support(x, W, threshold, screen=False)
        both = torch.cat([found.flat, expected.flat])
        values, counts = both.unique(return_counts=True)
        for flat in values[counts == 1].tolist():
            row, col = divmod(flat, d_sae)
            exact = x[row].double() @ W[:, col].double() - threshold[col].double()
            slack = d_in * 2.0**-23 * x[row].double().norm() * W[:, col].double().norm()
            assert abs(exact) < slack, (kind, row, col)
            different += 1
        entries += n * d_sae
        candidates += screened.col.numel()
        active += expected.col.numel()
    print(
        f"{entries:.2e} entries, {active} active, {candidates} candidates, {different} at rounding"
    )
    assert entries > 1e9
    assert active > 1e6
