"""The CUDA form of the sparse core against torch's.

Without a GPU the kernels run in Triton's interpreter on the CPU (see conftest.py), which says
nothing about how fast they are; that they compile for GPUs is a test of its own. The interpreter
takes milliseconds per program: parts and samples are made small, so that small problems have some.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_prefixes import assert_forms_agree
from test_screening import cancelling
from test_sparse import gradients, problem
from torch import Tensor

from sae_gated_plugin.core import choice, cuda, finding
from sae_gated_plugin.core.active import Active, Backend, decode_both, encode_active
from sae_gated_plugin.core.gradients import latent_rows
from sae_gated_plugin.core.support import Support

pytestmark = pytest.mark.usefixtures("kernels_everywhere")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(p: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().to(DEVICE).requires_grad_(v.requires_grad) for k, v in p.items()}


def cuda_support(support: Support | None) -> cuda.CudaSupport:
    assert isinstance(support, cuda.CudaSupport)
    return support


# --- a step ---------------------------------------------------------------------------------------


def both_losses(p: dict[str, Tensor], backend: Backend, frozen: bool, tangent: bool) -> Tensor:
    """A loss with two decodes of one support, as the Gated SAE's, on unit decoder rows."""
    active = encode_active(p["x"], p["W_enc"], p["threshold"], p["b_dec"], backend)
    acts = active.keep(active.per_latent(p["scale"].exp()) * active.values.square())
    outs = decode_both(active, acts, active.keep(active.values), p["W_dec"], tangent, frozen)
    return sum(((out - p["target"]).square().sum() for out in outs), acts.sum())


shapes = st.fixed_dictionaries(
    {
        "n": st.integers(1, 9),
        "d_in": st.integers(1, 40),
        "d_sae": st.integers(1, 70),
        "threshold": st.sampled_from([-50.0, 0.7, 1.5, 2.0, 50.0]),
        "seed": st.integers(0, 10**6),
    }
)


@settings(max_examples=10, deadline=None)
@given(shape=shapes, dtype=st.sampled_from([torch.float32, torch.float64]), two=st.booleans())
@example({"n": 3, "d_in": 8, "d_sae": 33, "threshold": 50.0, "seed": 0}, torch.float32, True)
@example({"n": 4, "d_in": 5, "d_sae": 33, "threshold": -50.0, "seed": 0}, torch.float32, False)
@example({"n": 9, "d_in": 17, "d_sae": 70, "threshold": 0.7, "seed": 1}, torch.float32, True)
def test_a_step_is_the_dense_forms(shape: dict[str, float], dtype: torch.dtype, two: bool) -> None:
    # -50: every latent is active; 50: none is.
    p = problem(**shape, dtype=dtype)  # type: ignore[arg-type]
    p["W_dec"].data = torch.nn.functional.normalize(p["W_dec"].data, dim=1)
    p = on_device(p)
    names = ["x", "W_enc", "b_dec", "W_dec", "scale"]
    expected, found = (
        [loss, *torch.autograd.grad(loss, [p[name] for name in names])]
        for backend in ("dense", "sparse")
        for loss in [both_losses(p, backend, frozen=two, tangent=True)]
    )
    for name, one, other in zip(["loss", *names], found, expected):
        assert (one - other).norm() <= 1e-5 * other.norm().clamp_min(1e-4), name


@pytest.mark.parametrize("threshold", [-50.0, 1.0, 50.0])
def test_prefixes_are_the_dense_forms(threshold: float) -> None:
    """Also where a slice, or every one, has no entries."""
    p = on_device(problem(3, 5, 70, threshold))
    support = encode_active(p["x"], p["W_enc"], p["threshold"], None, "sparse").support
    (part,) = cuda_support(support).slices([slice(0, 9), slice(9, 70)])
    cut = cuda_support(part.support)
    assert torch.equal(cut.row, cuda_support(support).row * 2 + (cut.col >= 9))
    assert torch.equal(cut.crow.diff(), torch.bincount(cut.row, minlength=6))
    for one, other in zip(cut.by_latent, cut.sorted_by_latent()):
        assert torch.equal(one, other)
    case = {"n": 3, "d_in": 5, "widths": [1, 2, 40], "threshold": threshold, "seed": 0}
    assert_forms_agree({**case, "two": True, "scaled": True})


def test_one_decode_is_the_dense_forms_too() -> None:
    p = on_device(problem(10, 20, 50, 0.6))
    support = encode_active(p["x"], p["W_enc"], p["threshold"], None, "sparse").support
    assert isinstance(support, cuda.CudaSupport)
    loss, dense = gradients(p, "dense")
    sparse_loss, found = gradients(p, "sparse")
    assert sparse_loss == pytest.approx(loss, rel=1e-5)
    for name, expected in dense.items():
        assert (found[name] - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("tangent", [True, False])
def test_the_second_code_trains_the_decoder_unless_frozen(frozen: bool, tangent: bool) -> None:
    p = on_device(problem(8, 10, 40, 0.5))
    p["W_dec"].data = torch.nn.functional.normalize(p["W_dec"].data, dim=1)
    expected, found = (
        torch.autograd.grad(both_losses(p, backend, frozen, tangent), p["W_dec"])[0]
        for backend in ("dense", "sparse")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    along = (found * p["W_dec"]).sum(1).norm() / found.norm()
    assert (along < 1e-5) == tangent


def test_a_token_with_no_latent_and_a_latent_on_every_token() -> None:
    p = on_device(problem(10, 8, 65, 0.5))
    with torch.no_grad():
        p["x"][1] = p["b_dec"]  # m = 0, below every threshold but one
        p["threshold"].fill_(0.5)
        p["threshold"][3] = -torch.inf
        p["threshold"][4] = torch.inf
    active = encode_active(p["x"], p["W_enc"], p["threshold"], p["b_dec"], "sparse")
    support = cuda_support(active.support)
    assert active.mask is not None
    kept = support.flat[active.mask.bool()]
    dense = encode_active(p["x"], p["W_enc"], p["threshold"], p["b_dec"], "dense")
    assert torch.equal(kept, dense.mask.view(-1).nonzero().squeeze(1))
    assert (kept[kept // 65 == 1] % 65).tolist() == [3]
    assert (kept % 65 == 3).sum() == 10
    for backend in ("dense", "sparse"):
        grads = torch.autograd.grad(both_losses(p, backend, True, False), [p["W_enc"], p["W_dec"]])
        assert not grads[1][4].any()
        assert grads[1][3].any()


def test_values_outside_the_support_are_zero_in_every_view() -> None:
    p = on_device(problem(10, 8, 65, 0.5))
    with torch.no_grad():  # just above actual products: candidates that are not active
        p["threshold"].copy_((p["x"] - p["b_dec"])[0] @ p["W_enc"] + 1e-5)
    dense, found = (
        encode_active(p["x"], p["W_enc"], p["threshold"], p["b_dec"], backend)
        for backend in ("dense", "sparse")
    )
    assert found.mask is not None
    assert 0 < int((found.mask == 0).sum()) < found.mask.numel()

    def view(active: Active) -> Tensor:
        return active.dense(active.values + active.per_latent(p["scale"]))

    torch.testing.assert_close(view(found), view(dense), rtol=1e-4, atol=1e-5)
    matrix = found.matrix(found.values)
    assert torch.equal(matrix.bool().float().sum(0), (dense.mask != 0).float().sum(0))
    torch.testing.assert_close(matrix.to_dense(), dense.dense(dense.values.detach()))


def test_the_same_input_gives_the_same_bits() -> None:
    p = on_device(problem(9, 20, 65, 1.2))
    p["threshold"][5] = -torch.inf
    first, second = (gradients(p, "sparse") for _ in range(2))
    assert first[0] == second[0]
    for name, grad in first[1].items():
        assert torch.equal(grad, second[1][name]), name


def test_the_check_before_the_first_use_passes() -> None:
    cuda.check(torch.device(DEVICE), torch.float32, 24)


# --- the bound ------------------------------------------------------------------------------------


def candidates(x: Tensor, W: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Of the screening: which entries are candidates, and which are active, both (N, d_sae)."""
    x, W, threshold = (tensor.to(DEVICE) for tensor in (x, W, threshold))
    found = cuda.find(x, latent_rows(W), threshold, 1.0)
    assert found is not None
    support, _, active = found
    out = torch.zeros(2, x.shape[0] * W.shape[1], dtype=torch.bool)
    out[0, support.flat.cpu()] = True
    out[1, support.flat[active.bool()].cpu()] = True
    assert (support.flat.diff() > 0).all()
    assert torch.equal(support.crow.diff().cpu(), out[0].view(len(x), -1).sum(1))
    return out[0].view(len(x), -1), out[1].view(len(x), -1)


def assert_nothing_is_missed(x: Tensor, W: Tensor, threshold: Tensor) -> None:
    """Every exact product above its threshold is a candidate; the active ones are float32's."""
    found, active = candidates(x, W, threshold)
    margin = x.double() @ W.double() - threshold.double()
    assert not ((margin > 0) & ~found).any()
    slack = x.shape[1] * 2.0**-23 * x.double().norm(dim=1)[:, None] * W.double().norm(dim=0)
    assert not ((active != (margin > 0)) & (margin.abs() > slack + 1e-44)).any()


@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(1, 9),  # one more than a sample
    d_in=st.integers(1, 80),
    d_sae=st.integers(1, 70),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-42, 1e-30, 1e-20, 1.0, 1e7, 1e17]),
    weights=st.sampled_from([1e-20, 1.0, 1e7]),
    threshold=st.sampled_from([-1.0, 0.0, 0.5, 2.5]),
)
def test_nothing_is_missed_at_any_scale(
    n: int, d_in: int, d_sae: int, seed: int, scale: float, weights: float, threshold: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_in, generator=generator) * scale
    x *= torch.randn(n, 1, generator=generator).exp() ** 2  # norms over orders of magnitude
    W = torch.randn(d_in, d_sae, generator=generator) / d_in**0.5 * weights
    limits = threshold * scale * weights * torch.rand(d_sae, generator=generator)
    assert_nothing_is_missed(x, W, limits)


@settings(max_examples=12, deadline=None)
@given(d_in=st.integers(1, 200), seed=st.integers(0, 10**6), sign=st.sampled_from([-1, 1]))
def test_nothing_is_missed_where_all_rounding_goes_one_way(d_in: int, seed: int, sign: int) -> None:
    """Entries just short of half a float16 step above or below, all lost to the same side."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 1023, (2, d_in), generator=generator) / 1024 + 1
    half_a_step = 2.0**-11 * (1 - 2.0**-10)
    x, w = steps + sign * half_a_step
    x, W = x[None], (sign * w)[:, None].repeat(1, 33)
    exact = (x.double() @ W.double())[0]
    rounded = x.half().double() @ W.half().double()
    assert d_in < 3 or (exact - rounded).abs().min() > 2.0**-12 * exact.abs().max()
    # Thresholds just below the exact products.
    thresholds = exact - exact.abs() * 2.0**-22 * torch.rand(33, generator=generator)
    assert_nothing_is_missed(x, W, thresholds.float())


def test_nothing_is_missed_at_ties_and_under_cancellation() -> None:
    x, W, _ = cancelling(9, 40)
    assert_nothing_is_missed(x, W, torch.zeros(40))
    ties = (x.double() @ W.double())[0]
    for shift in (2.0**-24, -(2.0**-24)):
        assert_nothing_is_missed(x, W, (ties * (1 + shift)).float())


def test_nothing_is_missed_where_one_entry_dwarfs_the_others() -> None:
    """All but one entry of a row vanish in float16: the norm of what was lost says so."""
    x = torch.full((4, 65), 2e-4)
    x[:, 7] = 1e4
    W = torch.full((65, 33), 1.0)
    W[7] = 0.0
    exact = (x.double() @ W.double())[0]
    assert_nothing_is_missed(x, W, (exact * (1 - 1e-5)).float())


def test_few_candidates_are_not_active() -> None:
    torch.manual_seed(0)
    x, W = torch.randn(32, 512), torch.nn.functional.normalize(torch.randn(512, 256), dim=0)
    found, active = candidates(x, W, torch.full((256,), 2.2))
    assert active.sum() <= found.sum() < 1.15 * active.sum()


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("where", ["x", "W"])
def test_what_cannot_be_bounded_takes_another_form(bad: float, where: str) -> None:
    torch.manual_seed(0)
    p = {"x": torch.randn(9, 16, device=DEVICE), "W": torch.randn(16, 40, device=DEVICE)}
    p[where][7, 3] = bad
    threshold = torch.full((40,), 5.0, device=DEVICE)
    assert cuda.find(p["x"], latent_rows(p["W"]), threshold, 1.0) is None
    found = choice.find(p["x"], p["W"], threshold, "sparse", False)
    assert found is not None
    assert type(found.support) is Support
    assert choice.find(p["x"], p["W"], threshold, "auto", False) is None


def test_too_many_candidates_take_the_dense_form() -> None:
    torch.manual_seed(0)
    x, W = torch.randn(12, 16, device=DEVICE), torch.randn(40, 16, device=DEVICE)
    zero = torch.zeros(40, device=DEVICE)
    assert cuda.find(x, W, zero, 0.6) is not None
    assert cuda.find(x, W, zero, 0.3) is None
    rounded_x, rounded_W = cuda.rounded(x), cuda.rounded(W)
    _, counts = cuda.screen(rounded_x, rounded_W, zero, 8 * 40)
    assert counts[8:].all()
    # More than that among the first 8 tokens, and the others are not even looked at.
    _, counts = cuda.screen(rounded_x, rounded_W, zero, 50)
    assert counts[:8].all()
    assert not counts[8:].any()


def test_screening_finds_what_the_product_does_on_float64() -> None:
    p = on_device(problem(6, 12, 40, 0.5, dtype=torch.float64))
    centred = p["x"].detach() - p["b_dec"].detach()
    found = cuda.find(centred, latent_rows(p["W_enc"].detach()), p["threshold"], 1.0)
    assert found is not None
    support, values, active = found
    expected, products = finding.find_support(centred, p["W_enc"].detach(), p["threshold"])
    assert torch.equal(support.flat[active.bool()], expected.flat)
    torch.testing.assert_close(values[active.bool()], products, rtol=1e-13, atol=1e-13)
