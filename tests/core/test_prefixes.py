"""Nested prefixes: the sparse form against the dense one; for the kernels see test_kernels.py."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_sparse import problem
from torch import Tensor

from sae_gated_plugin.core.active import Backend, encode_active
from sae_gated_plugin.core.prefixes import Prefixes
from sae_gated_plugin.core.support import Support

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

cases = st.fixed_dictionaries(
    {
        "n": st.integers(1, 12),
        "d_in": st.integers(1, 40),
        "widths": st.lists(st.integers(1, 69), min_size=1, max_size=5, unique=True),
        "threshold": st.sampled_from([-50.0, 0.7, 1.5, 50.0]),
        "seed": st.integers(0, 10**6),
        "two": st.booleans(),
        "scaled": st.booleans(),
    }
)
# No entry in a slice, in any, in all of them; a slice of one latent.
edges = [
    {"n": 4, "d_in": 5, "widths": [1, 2], "threshold": 50.0, "seed": 0},
    {"n": 4, "d_in": 5, "widths": [1, 2, 69], "threshold": -50.0, "seed": 0},
    {"n": 1, "d_in": 3, "widths": [2, 3], "threshold": 1.5, "seed": 1},
]


def gradients(
    p: dict[str, Tensor], backend: Backend, case: dict, summed: bool = False
) -> list[Tensor]:
    """Values of all outputs, and the gradients of a loss that weighs each differently.

    summed: the way of several ranks, of which this is the only one.
    """
    active = encode_active(p["x"], p["W_enc"], p["threshold"], p["b_dec"], backend)
    assert (active.support is None) == (backend == "dense")
    codes = [active.keep(active.per_latent(p["scale"].exp()) * active.values.square())]
    if case["two"]:
        codes.append(active.keep(active.values))
    prefixes = Prefixes(active, [*sorted(case["widths"]), 70])
    scale = p["target"][:, :1].exp() if case["scaled"] else None
    frozen, tangent = case["seed"] % 2 == 0, case["seed"] % 3 == 0
    loss = sum((part * part).sum() * 0.1 * i for i, part in enumerate(prefixes.split(codes[0])))
    outs = []
    for out, errors in prefixes.decode(
        *(codes, p["W_dec"], p["b_dec"], p["target"], scale, tangent, frozen),
        begin_sum=(lambda part: lambda: part) if summed else None,
    ):
        outs += [out, errors]
        weights = torch.arange(1, len(errors) + 1, device=errors.device)
        loss = loss + (out - p["target"]).square().sum() + (errors * weights).sum() + out.sum()
    names = ["x", "W_enc", "b_dec", "W_dec", "scale"]
    return [*outs, *torch.autograd.grad(loss, [p[name] for name in names], allow_unused=True)]


def assert_forms_agree(case: dict) -> None:
    shape = {name: case[name] for name in ("n", "d_in", "threshold", "seed")}
    p = problem(d_sae=70, dtype=torch.float64, **shape)
    p["W_dec"].data = torch.nn.functional.normalize(p["W_dec"].data, dim=1)
    p = {k: v.detach().to(DEVICE).requires_grad_(v.requires_grad) for k, v in p.items()}
    dense = gradients(p, "dense", case)
    for summed in (False, True):
        for one, other in zip(gradients(p, "sparse", case, summed), dense):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def examples(test):
    for edge in edges:
        test = example({**edge, "two": True, "scaled": True})(test)
    return test


@settings(max_examples=60, deadline=None)
@given(case=cases)
@examples
def test_torchs_sparse_form_is_the_dense_one(case: dict) -> None:
    assert_forms_agree(case)


def test_slices_cover_the_support_in_order() -> None:
    p = problem(20, 6, 40, 0.5)
    support = encode_active(p["x"], p["W_enc"], p["threshold"], None, "sparse").support
    assert isinstance(support, Support)
    latents = [slice(0, 7), slice(7, 8), slice(8, 40)]
    parts = support.slices(latents)
    entries = [torch.arange(support.col.numel())[part.entries] for part in parts]
    found = torch.cat(entries)
    assert torch.equal(found.sort().values, torch.arange(support.col.numel()))
    for part, own, wanted in zip(parts, entries, latents):
        assert part.support.d_sae == wanted.stop - wanted.start
        assert torch.equal(part.support.col + wanted.start, support.col[part.entries])
        assert torch.equal(part.support.row, support.row[part.entries])
        assert own.diff().gt(0).all()


def test_each_entry_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many prefixes there are: the cost is that of one decode and errors per prefix."""
    p = problem(20, 6, 40, 0.5)
    active = encode_active(p["x"], p["W_enc"], p["threshold"], p["b_dec"], "sparse")
    read: list[int] = []
    original = Support.sums_by_token

    @functools.wraps(original)
    def counted(self: Support, values: tuple[Tensor, ...], rows: Tensor) -> list[Tensor]:
        read.append(sum(value.numel() for value in values))
        return original(self, values, rows)

    monkeypatch.setattr(Support, "sums_by_token", counted)
    prefixes = Prefixes(active, [5, 10, 20, 40])
    prefixes.decode([active.values], p["W_dec"], p["b_dec"], p["target"])
    assert sum(read) == active.values.numel() > 0
