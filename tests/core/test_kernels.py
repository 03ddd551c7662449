"""The Triton kernels, and how one implementation is chosen.

Without a GPU the kernels run in Triton's interpreter on the CPU (see conftest.py), which says
nothing about how they compile or how fast they are.
"""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from sae_gated_plugin.core import kernels

pytest.importorskip("triton")
from sae_gated_plugin.core.finding import find_support
from sae_gated_plugin.core.kernels import triton_kernels
from sae_gated_plugin.core.products import _sampled_by_gather, gather_rows, gather_sum_by_latent


def problem(n: int, d: int, d_sae: int, threshold: float, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    x, W = torch.randn(n, d, dtype=dtype), torch.randn(d, d_sae, dtype=dtype)
    support, values = find_support(x, W, torch.full((d_sae,), threshold * d**0.5, dtype=dtype))
    return {"x": x, "rows": W.T.contiguous(), "values": values, "support": support}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "d", "d_sae", "threshold"), [(7, 5, 33, 0.5), (40, 130, 64, 1.0), (3, 16, 20, -9.0)]
)
def test_products_are_torchs(
    n: int, d: int, d_sae: int, threshold: float, dtype: torch.dtype
) -> None:
    p = problem(n, d, d_sae, threshold, dtype)
    s = p["support"]
    assert s.col.numel()
    found = triton_kernels.sampled(p["x"], p["rows"], s.row, s.col)
    torch.testing.assert_close(found, _sampled_by_gather(p["x"], p["rows"], s))
    out = triton_kernels.gather_sum(s.col, p["rows"], s.crow, p["values"])
    torch.testing.assert_close(out, gather_rows(s, p["values"], p["rows"]))
    offsets, order, tokens = s.by_latent
    by_latent = triton_kernels.gather_sum(tokens, p["x"], offsets, p["values"][order])
    torch.testing.assert_close(by_latent, gather_sum_by_latent(s, p["values"], p["x"]))


def test_bfloat16_accumulates_in_float32() -> None:
    p = problem(6, 512, 12, -9.0, torch.float32)
    s = p["support"]
    low = {name: p[name].bfloat16() for name in ("x", "rows", "values")}
    found = triton_kernels.sampled(low["x"], low["rows"], s.row, s.col)
    exact = _sampled_by_gather(low["x"].double(), low["rows"].double(), s)
    assert found.dtype == torch.bfloat16
    # One rounding of the result (the interpreter truncates); a bfloat16 sum would be far worse.
    assert ((found.double() - exact).abs() <= 2.0**-7 * exact.abs() + 1e-3).all()


def test_operators_have_shapes_for_compilation() -> None:
    from torch.library import opcheck

    p = problem(5, 8, 12, 0.5, torch.float32)
    s = p["support"]
    arguments = (s.col, p["rows"], s.crow, p["values"])
    opcheck(torch.ops.sae_gated.gather_sum.default, arguments, test_utils=["test_faketensor"])
    arguments = (p["x"], p["rows"], s.row, s.col)
    opcheck(torch.ops.sae_gated.sampled.default, arguments, test_utils=["test_faketensor"])


# --- choosing -------------------------------------------------------------------------------------


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> dict[object, str]:
    fresh: dict[object, str] = {}
    monkeypatch.setattr("sae_gated_plugin.core.kernels.chosen", fresh)
    return fresh


def right() -> Tensor:
    return torch.ones(3)


def slow() -> Tensor:
    time.sleep(0.02)
    return right()


def test_the_fastest_is_chosen_once_and_logged(
    chosen: dict[object, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "sae_gated_plugin"):
        for _ in range(3):
            assert torch.equal(kernels.fastest("op", {"torch": slow, "triton": right}), right())
    assert chosen == {"op": "triton"}
    assert len(caplog.records) == 1
    assert "op: triton from now on (torch " in caplog.text
    kernels.fastest("other", {"torch": right, "triton": slow})
    assert chosen["other"] == "torch"


def test_what_is_wrong_or_broken_is_never_used_and_says_why(
    chosen: dict[object, str], caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Tensor:
        raise RuntimeError("no compiler")

    candidates = {"torch": slow, "wrong": lambda: 2 * right(), "broken": broken}
    assert torch.equal(kernels.fastest("op", candidates), right())
    assert chosen == {"op": "torch"}
    assert "wrong is not used: differs from torch by 1.0e+00" in caplog.text
    assert "broken is not used: no compiler" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu_both_forms_agree(autocast: bool) -> None:
    from test_sparse import gradients, problem

    p = {
        k: v.detach().cuda().requires_grad_(v.requires_grad)
        for k, v in problem(600, 64, 512, 2.2).items()
    }
    loss, dense = gradients(p, "dense")
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        sparse_loss, found = gradients(p, "sparse")
    assert sparse_loss == pytest.approx(loss, rel=1e-4)
    for name, expected in dense.items():
        assert (found[name] - expected).norm() < 1e-3 * expected.norm()
