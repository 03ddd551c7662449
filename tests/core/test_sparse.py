"""The sparse core against its dense form and against plain autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.interpreter import Interpreter
from torch import Tensor

from sae_gated_plugin.core import choice, products
from sae_gated_plugin.core.active import (
    Active,
    Backend,
    decode_active,
    decode_both,
    decode_matrix,
    encode_active,
)
from sae_gated_plugin.core.support import WIDE
from sae_gated_plugin.core.support_tensor import SupportTensor

FORMS = ("dense", "sparse")


def problem(
    n: int,
    d_in: int,
    d_sae: int,
    threshold: float,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return {
        "x": normal(n, d_in).requires_grad_(),
        "target": normal(n, d_in),
        "W_frozen": normal(d_sae, d_in),
        "W_enc": (normal(d_in, d_sae) / d_in**0.5).requires_grad_(),
        "b_dec": (0.1 * normal(d_in)).requires_grad_(),
        "W_dec": normal(d_sae, d_in).requires_grad_(),
        "scale": normal(d_sae).requires_grad_(),
        "threshold": torch.full((d_sae,), threshold, dtype=dtype) + 0.1 * normal(d_sae),
    }


def loss_of(p: dict[str, Tensor], backend: Backend, **changes: Tensor) -> Tensor:
    """What an architecture does: two decodes of one support, one of them with W_dec frozen."""
    p = {**p, **changes}
    active = encode_active(p["x"], p["W_enc"], p["threshold"], p["b_dec"], backend)
    acts = active.keep(active.per_latent(p["scale"].exp()) * active.values.square())
    out = decode_active(active, acts, p["W_dec"]) + p["b_dec"]
    frozen = decode_active(active, active.keep(active.values), p["W_frozen"])
    return (out - p["target"]).square().sum() + (frozen * 0.3).sum() + acts.sum()


def gradients(p: dict[str, Tensor], backend: Backend) -> tuple[float, dict[str, Tensor]]:
    names = ["x", "W_enc", "b_dec", "W_dec", "scale"]
    loss = loss_of(p, backend)
    return loss.item(), dict(zip(names, torch.autograd.grad(loss, [p[name] for name in names])))


def assert_same(p: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    dense_loss, dense = gradients(p, "dense")
    sparse_loss, found = gradients(p, "sparse")
    assert sparse_loss == pytest.approx(dense_loss, rel=tolerance, abs=1e-6)
    for name, expected in dense.items():
        error = (found[name] - expected).norm() / expected.norm().clamp_min(1e-6)
        assert error < tolerance, (name, error)


@settings(max_examples=60, deadline=None)
@example(n=20, d_in=1, d_sae=42, threshold=-50.0, seed=20)
@given(
    n=st.integers(1, 40),
    d_in=st.integers(1, 24),
    d_sae=st.integers(1, 70),
    threshold=st.sampled_from([-50.0, -0.5, 0.0, 0.7, 2.0, 50.0]),
    seed=st.integers(0, 10**6),
)
def test_both_forms_agree(n: int, d_in: int, d_sae: int, threshold: float, seed: int) -> None:
    # -50: every latent is active; 50: none is. float64, for b_dec's gradient may all but cancel.
    assert_same(problem(n, d_in, d_sae, threshold, seed, torch.float64), 1e-10)


@pytest.mark.parametrize("backend", FORMS)
def test_gradcheck(backend: Backend) -> None:
    p = problem(6, 4, 21, 0.4, dtype=torch.float64)
    names = ["x", "W_enc", "b_dec", "W_dec", "scale"]

    def function(*tensors: Tensor) -> Tensor:
        return loss_of(p, backend, **dict(zip(names, tensors)))

    assert torch.autograd.gradcheck(function, [p[name] for name in names])


def test_second_derivatives_of_the_dense_form() -> None:
    p = problem(3, 3, 7, 0.2, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda x, w, b: encode_active(x, w, p["threshold"], b, "dense").values,
        (p["x"], p["W_enc"], p["b_dec"]),
    )


def test_a_token_with_no_active_latent_and_one_with_all() -> None:
    p = problem(5, 8, 33, 0.5)
    with torch.no_grad():
        p["x"][1] = p["b_dec"]  # m = 0 everywhere, below the threshold
        p["threshold"].fill_(0.5)
        p["W_enc"][:, :] = p["W_enc"].abs()
        p["x"][3] = p["b_dec"] + 10
    support = encode_active(p["x"], p["W_enc"], p["threshold"], p["b_dec"], "sparse").support
    assert support is not None
    counts = support.crow.diff()
    assert counts[1] == 0
    assert counts[3] == 33
    assert_same(p)


def test_three_dimensions_and_strides() -> None:
    p = problem(24, 6, 40, 0.4)
    flat = encode_active(p["x"], p["W_enc"], p["threshold"], p["b_dec"], "sparse")
    expected = decode_active(flat, flat.values, p["W_dec"])
    strided = p["x"].detach().repeat_interleave(2, dim=1)[:, ::2].view_as(p["x"])
    assert not strided.is_contiguous()
    for backend in FORMS:
        active = encode_active(
            strided.unflatten(0, (4, 6)), p["W_enc"], p["threshold"], p["b_dec"], backend
        )
        out = decode_active(active, active.keep(active.values), p["W_dec"])
        assert out.shape == (4, 6, 6)
        assert active.dense(active.values).shape == (4, 6, 40)
        torch.testing.assert_close(out.flatten(0, 1), expected)
        torch.testing.assert_close(
            active.dense(active.values).flatten(0, 1), flat.dense(flat.values)
        )


def test_layout_of_the_encoder_does_not_matter_and_is_kept() -> None:
    p = problem(12, 6, 40, 0.4)
    columns = p["W_enc"].detach().T.contiguous().T.requires_grad_()
    expected = torch.autograd.grad(loss_of(p, "sparse"), p["W_enc"])[0]
    grad = torch.autograd.grad(loss_of(p, "sparse", W_enc=columns), columns)[0]
    torch.testing.assert_close(grad, expected)
    assert grad.stride() == columns.stride()


def test_values_are_the_matmul_and_the_threshold_is_strict() -> None:
    x, W = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.5]])
    for backend in FORMS:
        active = encode_active(x, W, torch.tensor([1.0, 1.0]), None, backend)
        assert active.dense(active.values).tolist() == [[0.0, 2.0]]


def test_no_gradient_where_none_is_wanted() -> None:
    p = problem(12, 6, 40, 0.4)
    p["W_dec"].requires_grad_(False)
    active = encode_active(p["x"].detach(), p["W_enc"], p["threshold"], p["b_dec"], "sparse")
    decode_active(active, active.values, p["W_dec"]).sum().backward()
    assert p["W_dec"].grad is None
    assert p["x"].grad is None
    assert p["b_dec"].grad is not None


def test_projection_with_a_second_encoder() -> None:
    p = problem(12, 6, 40, 0.4, dtype=torch.float64)
    other = torch.randn(6, 40, dtype=torch.float64, requires_grad=True)

    def total(backend: Backend) -> Tensor:
        active = encode_active(p["x"], p["W_enc"], p["threshold"], p["b_dec"], backend)
        return active.keep(active.project(other).tanh() * active.values).sum()

    wanted = [p["x"], p["W_enc"], p["b_dec"], other]
    for found, expected in zip(
        torch.autograd.grad(total("sparse"), wanted), torch.autograd.grad(total("dense"), wanted)
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("d_in", "sparse"), [(128, True), (640, False)])
def test_under_autocast_the_dense_form_pays_earlier(
    monkeypatch: pytest.MonkeyPatch, d_in: int, sparse: bool
) -> None:
    """A tenth of the latents is active. At a narrow hook point the sparse form is still faster."""
    monkeypatch.setattr(choice, "fast_bfloat16", lambda device: device == "cpu")
    p = problem(256, d_in, 1024, 1.28)
    x, W_enc, threshold = p["x"], p["W_enc"].detach(), p["threshold"]
    assert encode_active(x, W_enc, threshold).support is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (encode_active(x, W_enc, threshold).support is not None) is sparse


@pytest.mark.parametrize("backend", FORMS)
def test_autocast_gives_the_same_to_bfloat16(backend: Backend) -> None:
    p = problem(40, 32, 64, 1.0)
    expected, reference = gradients(p, "dense")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(p, backend)
    assert loss.item() == pytest.approx(expected, rel=2e-2)
    grad = torch.autograd.grad(loss, p["W_dec"])[0]
    assert grad.dtype == torch.float32
    assert (grad - reference["W_dec"]).norm() < 3e-2 * reference["W_dec"].norm()
    if backend == "sparse":  # the sparse form's numbers stay float32's
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_without_sampled_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of torch that refuses CSR products (no MKL) gives the same numbers."""
    p = problem(30, 8, 50, 0.5)
    expected_loss, expected = gradients(p, "sparse")
    monkeypatch.setattr(products, "has_sampled_addmm", lambda: False)
    loss, found = gradients(p, "sparse")
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("device", "module"), [("cpu", ""), ("cuda", "sae_gated_plugin")])
def test_no_beta_warning_reaches_the_user(
    device: str, module: str, interpreter: Interpreter
) -> None:
    """On a GPU none from our modules; what Triton says while it compiles is its own affair."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    code = (
        "import torch, warnings\n"
        "from sae_gated_plugin.core.active import decode_active, encode_active\n"
        f"warnings.filterwarnings('error', module='{module}')\n"
        "before = list(warnings.filters)\n"
        f"torch.set_default_device('{device}')\n"
        "x, W = torch.randn(8, 4, requires_grad=True), torch.randn(4, 16, requires_grad=True)\n"
        "a = encode_active(x, W, torch.zeros(16), None, 'sparse')\n"
        "decode_active(a, a.values, W.T.contiguous()).sum().backward()\n"
        "a.matrix(a.values).bool().float().sum(0)\n"
        "assert list(warnings.filters) == before\n"
    )
    done = interpreter.run(code)
    assert done.returncode == 0, done.stderr
    assert "beta" not in done.stderr


@pytest.mark.parametrize("threshold", [1.5, 50.0])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("width", [8, WIDE])
def test_two_codes_at_once_are_one_after_the_other(
    width: int, frozen: bool, threshold: float
) -> None:
    p = problem(20, width, WIDE, threshold)
    p["W_dec"].data = torch.nn.functional.normalize(p["W_dec"].data, dim=1)
    active = encode_active(p["x"], p["W_enc"], p["threshold"], p["b_dec"], "sparse")
    second = active.keep(active.per_latent(p["scale"].exp()) * active.values)
    W_second = p["W_dec"].detach() if frozen else p["W_dec"]
    together = tuple(decode_both(active, active.values, second, p["W_dec"], True, frozen))
    apart = (
        decode_active(active, active.values, p["W_dec"], tangent=True),
        decode_active(active, second, W_second, tangent=True),
    )
    names = ["x", "W_enc", "b_dec", "W_dec", "scale"]
    found, expected = (
        torch.autograd.grad(
            sum((out - p["target"]).pow(n + 2).sum() for n, out in enumerate(outs)),
            [p[name] for name in names],
            retain_graph=True,
        )
        for outs in (together, apart)
    )
    assert torch.equal(torch.stack(together), torch.stack(apart))
    for name, one, other in zip(names, found, expected):
        torch.testing.assert_close(one, other, msg=name)


# --- choosing and helpers -------------------------------------------------------------------------


def test_density_chooses_the_form() -> None:
    p = problem(512, 16, 256, 0.0)
    assert encode_active(p["x"], p["W_enc"], p["threshold"], None).support is None
    sparse_threshold = p["threshold"] + 3.0
    assert encode_active(p["x"], p["W_enc"], sparse_threshold, None).support is not None


def test_decoding_a_matrix_by_its_nonzero_entries() -> None:
    acts = torch.randn(4, 80, 200) * (torch.rand(4, 80, 200) < 0.02)  # negative ones too
    W_dec = torch.randn(200, 7)
    with torch.no_grad():
        torch.testing.assert_close(decode_matrix(acts, W_dec), acts @ W_dec)
    W_dec.requires_grad_()
    out = decode_matrix(acts, W_dec)
    expected = acts.sum((0, 1))[:, None].expand(200, 7)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), W_dec)[0], expected)


def test_gathering_helpers_on_both_forms() -> None:
    p = problem(300, 8, 64, 0.5)
    parameter = torch.randn(64)
    dense, found = (
        encode_active(p["x"], p["W_enc"], p["threshold"], None, backend) for backend in FORMS
    )

    def shifted(active: Active) -> Tensor:
        return active.dense(active.values + active.per_latent(parameter))

    torch.testing.assert_close(shifted(found), shifted(dense))
    matrix = found.matrix(found.values)
    assert isinstance(matrix, SupportTensor)
    torch.testing.assert_close(matrix.to_dense(), dense.keep(dense.values).detach())
