"""The coherence metrics against formulas written out here."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoders import LargestTensor, cosine, decoder
from torch import Tensor

from sae_gated_plugin.errors import UndefinedMetric
from sae_gated_plugin.measure.evaluate import evaluate
from sae_gated_plugin.metrics.decoder import coherence
from sae_gated_plugin.model.hook_point import HookPoint
from sae_gated_plugin.saes.load import load_sae


def brute_force(W_dec: Tensor, k: int) -> dict[str, float]:
    """Tropp's definition of the Babel function: over all sets of k latents and one outside."""
    n = len(W_dec)
    similar = [[abs(cosine(W_dec, i, j).item()) for j in range(n)] for i in range(n)]
    nearest = sorted(max(row[j] for j in range(n) if j != i) for i, row in enumerate(similar))
    top = nearest[-math.ceil(n / 100) :]
    babel = max(
        sum(similar[i][j] for j in others)
        for others in itertools.combinations(range(n), k)
        for i in set(range(n)) - set(others)
    )
    return {"coherence": nearest[-1], "coherence_top": sum(top) / len(top), "babel": babel}


@pytest.mark.parametrize("k", [1, 2, 3])
def test_metrics_against_brute_force(k: int) -> None:
    W_dec = decoder(10, 4)
    assert coherence(W_dec, k) == pytest.approx(brute_force(W_dec, k), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    d_sae=st.integers(2, 230), block=st.integers(1, 300), k=st.integers(1, 40), seed=st.integers(0)
)
def test_blocks_are_the_full_matrix(d_sae: int, block: int, k: int, seed: int) -> None:
    W_dec = decoder(d_sae, 5, seed % 2**31)
    similar = torch.nn.functional.cosine_similarity(W_dec[:, None], W_dec[None], dim=-1).abs()
    similar.fill_diagonal_(0.0)
    nearest = similar.max(1).values.sort().values
    expected = {
        "coherence": nearest[-1].item(),
        "coherence_top": nearest[-math.ceil(d_sae / 100) :].mean().item(),
        "babel": similar.sort(descending=True).values[:, :k].sum(1).max().item(),
    }
    assert coherence(W_dec, k, block) == pytest.approx(expected, rel=1e-9)


def test_metrics_of_decoders_that_are_known() -> None:
    orthogonal = coherence(3.0 * torch.eye(8), k=4)
    assert orthogonal == {"coherence": 0.0, "coherence_top": 0.0, "babel": 0.0}
    # 200 orthogonal rows and one twin, opposite: the top 1 % are 3 rows, 2 of them twins.
    twins = coherence(torch.cat([torch.eye(200), -torch.eye(200)[:1]]))
    assert twins == pytest.approx({"coherence": 1.0, "coherence_top": 2 / 3, "babel": 1.0})
    with_zero = coherence(torch.cat([torch.eye(3), torch.zeros(1, 3)]))
    assert with_zero["coherence"] == 0.0
    assert coherence(decoder(50).bfloat16()) == pytest.approx(coherence(decoder(50)), rel=0.02)


def test_metrics_without_a_value_say_why() -> None:
    with pytest.raises(UndefinedMetric, match="single row has nothing to be similar to"):
        coherence(torch.ones(1, 4))
    with pytest.raises(UndefinedMetric, match="hold NaN or infinity"):
        coherence(torch.tensor([[1.0, math.nan], [0.0, 1.0]]))


def test_memory_grows_with_the_block_and_not_with_the_square() -> None:
    with LargestTensor() as watched:
        coherence(torch.randn(3000, 8), block=100)
    assert watched.numel == 100 * 3000


def test_results_hold_them(hook_point: HookPoint, trained_run: Any) -> None:
    sae = load_sae(trained_run)
    results = evaluate(sae, model=hook_point.model, tokens=1000)
    expected = coherence(sae.W_dec)
    assert {name: results[name] for name in expected} == expected
    with torch.no_grad():
        sae.W_dec[3, 0] = math.nan
    results = evaluate(sae, model=hook_point.model, tokens=1000)
    for name in expected:
        assert results[name] is None
        assert "NaN" in results["undefined"][name]
