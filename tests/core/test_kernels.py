"""The CUDA form of the sparse core against torch's.

Without a GPU the kernels run in Triton's interpreter on the CPU (see conftest.py), which says
nothing about how fast they are; that they compile for GPUs is a test of its own. The interpreter
takes milliseconds per program: parts and samples are made small, so that small problems have some.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sae_lens.saes.sae import TrainStepInput
from test_sparse import gradients, problem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sae_gated_plugin.architectures.gated import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_gated_plugin.architectures.mlp_encoder import (
    MLPEncoderTrainingSAE,
    MLPEncoderTrainingSAEConfig,
)
from sae_gated_plugin.architectures.prolu import ProLUTrainingSAE, ProLUTrainingSAEConfig
from sae_gated_plugin.architectures.relu import ReLUTrainingSAE, ReLUTrainingSAEConfig
from sae_gated_plugin.core import choice, cost, finding
from sae_gated_plugin.core.active import Active, Backend, decode_both, encode_active
from sae_gated_plugin.core.gradients import latent_rows
from sae_gated_plugin.core.support import Support
from sae_gated_plugin.errors import ConfigError, TrainingDiverged

pytest.importorskip("triton")
from sae_gated_plugin.core import cuda
from sae_gated_plugin.core.kernels import screening

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True, scope="module")
def kernels_everywhere() -> Iterator[pytest.MonkeyPatch]:
    """The kernels are used on whatever there is, on parts of 8 entries and samples of 8 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "KERNEL_DEVICES", {DEVICE})
        patch.setattr(cuda, "PART", 8)
        patch.setattr(screening, "SAMPLE", 8)
        if DEVICE == "cpu":
            patch.setattr(choice, "_tried", lambda *_: True)
            patch.setattr(cost, "_properties", lambda _: ((9, 0), 132))
        yield patch


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
        "n": st.integers(1, 12),
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
@example({"n": 12, "d_in": 17, "d_sae": 70, "threshold": 0.7, "seed": 1}, torch.float32, True)
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


def test_one_decode_is_the_dense_forms_too() -> None:
    p = on_device(problem(10, 20, 50, 0.6))
    assert encode_active(p["x"], p["W_enc"], p["threshold"], None, "sparse").support.fused
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
    coo = found.coo(found.values.detach())
    torch.testing.assert_close(coo.to_dense(), dense.dense(dense.values.detach()))
    firing = coo.bool().float().sum(0)
    assert torch.equal(firing.to_dense(), (dense.mask != 0).float().sum(0))


def test_the_same_input_gives_the_same_bits() -> None:
    p = on_device(problem(12, 20, 65, 1.2))
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
    n=st.integers(1, 20),
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
    x, W = x[None].repeat(4, 1), (sign * w)[:, None].repeat(1, 40)
    exact = (x[:1].double() @ W.double())[0]
    rounded = x[:1].half().double() @ W.half().double()
    assert d_in < 3 or (exact - rounded).abs().min() > 2.0**-12 * exact.abs().max()
    # Thresholds just below the exact products.
    thresholds = exact - exact.abs() * 2.0**-22 * torch.rand(40, generator=generator)
    assert_nothing_is_missed(x, W, thresholds.float())


def test_nothing_is_missed_at_ties_and_under_cancellation() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 64, generator=generator)
    W = torch.randn(64, 40, generator=generator)
    W[32:] = -W[:32]
    x[:, 32:] = x[:, :32] * (1 + 1e-4 * torch.randn(9, 32, generator=generator))
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
    x, W = torch.randn(32, 512), torch.nn.functional.normalize(torch.randn(512, 512), dim=0)
    found, active = candidates(x, W, torch.full((512,), 2.2))
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
    x, W = torch.randn(40, 16, device=DEVICE), torch.randn(40, 16, device=DEVICE)
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


# --- choosing -------------------------------------------------------------------------------------


def kind(p: dict[str, Tensor]) -> str:
    support = encode_active(p["x"], p["W_enc"], p["threshold"], None).support
    return "dense" if support is None else type(support).__name__


@pytest.fixture
def few_active(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    monkeypatch.setattr(cost, "MIN_TOKENS", 4)
    monkeypatch.setattr(cost, "break_even", lambda *_: 0.2)
    return on_device(problem(12, 16, 64, 2.5))


def test_density_chooses_the_form(
    few_active: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kind(few_active) == "CudaSupport"
    few_active["threshold"].fill_(0.0)
    assert kind(few_active) == "dense"
    few_active["threshold"].fill_(2.5)
    monkeypatch.setattr(cost, "break_even", lambda *_: 0.0)
    monkeypatch.setattr(cuda, "launch", None)  # nothing is looked at where dense always wins
    assert kind(few_active) == "dense"


@pytest.mark.parametrize(
    ("value", "expected"), [("triton", "CudaSupport"), ("torch", "Support"), ("dense", "dense")]
)
def test_the_switch(
    few_active: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, value: str, expected: str
) -> None:
    monkeypatch.setenv(choice.SWITCH, value)
    assert kind(few_active) == expected


def test_an_unknown_value_of_the_switch(
    few_active: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(choice.SWITCH, "on")
    with pytest.raises(ConfigError, match="SAE_GATED_CUDA is 'on'; allowed: triton, torch, dense"):
        kind(few_active)


def test_kernels_that_fail_are_not_used_and_the_log_says_why(
    few_active: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.undo()  # of `few_active`'s doing too
    monkeypatch.setattr(cost, "MIN_TOKENS", 4)
    tried = _uncached_trial()
    monkeypatch.setattr(choice, "_tried", tried)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of resource:\n  shared memory")

    monkeypatch.setattr(cuda, "launch", broken)
    assert kind(few_active) == "Support"
    assert "are not used for torch.float32 of width 16" in caplog.text
    assert "out of resource: shared memory. SAE_GATED_CUDA=dense" in caplog.text


def _uncached_trial() -> object:
    import importlib.util

    spec = importlib.util.find_spec("sae_gated_plugin.core.choice")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._tried


def test_kernels_that_disagree_are_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nothing(kernel: object, programs: int, *arguments: object, **_: object) -> None:
        for tensor in arguments:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim == 1:
                tensor.zero_()

    monkeypatch.setattr(cuda, "launch", nothing)
    with pytest.raises(ArithmeticError):
        cuda.check(torch.device(DEVICE), torch.float32, 16)


H200 = ((9, 0), 132)


@pytest.mark.parametrize(
    ("d_in", "d_sae", "half", "l0", "sparse_wins"),
    [
        # Measured: ours dense 19 ms, sparse 2.7; under autocast 7 and 2.7.
        (768, 16384, False, 49, True),
        (768, 16384, True, 49, True),
        # 181 and 33 ms against 7.8 and 13.5.
        (2304, 65536, False, 65, True),
        (2304, 65536, True, 65, True),
        (2304, 65536, False, 196, True),
        (2304, 65536, True, 196, True),
        (768, 32768, False, 65, True),
        (768, 32768, True, 65, True),
        # Bound by launches: under autocast the dense form has fewer.
        (576, 4608, False, 46, True),
        (576, 4608, True, 46, False),
        (128, 2048, False, 20, False),
        # Half of all latents, as in the first steps.
        (768, 16384, False, 8192, False),
        (2304, 65536, False, 32768, False),
        (2304, 65536, True, 32768, False),
    ],
)
def test_the_model_of_cost_agrees_with_what_was_measured(
    d_in: int, d_sae: int, half: bool, l0: float, sparse_wins: bool
) -> None:
    shape = cost.Shape(4096, d_in, d_sae, itemsize=4, half=half)
    assert (l0 / d_sae < cost.break_even(shape, *H200)) == sparse_wins


def test_the_model_of_cost_is_monotone_and_knows_every_card() -> None:
    shape = cost.Shape(4096, 768, 16384, itemsize=4, half=False)
    for capability in [(6, 1), (7, 5), *cost.CARDS, (8, 9), (13, 0)]:
        single = cost.break_even(shape, capability, 100)
        assert 0 < single < 1
        # Autocast makes the dense form cheaper, never dearer.
        assert cost.break_even(shape._replace(half=True), capability, 100) < single


# --- without a GPU --------------------------------------------------------------------------------


@pytest.mark.parametrize(("capability", "width"), [(80, 768), (89, 2304), (90, 4096)])
def test_every_kernel_compiles_for_gpus(capability: int, width: int, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "support" / "compile_kernels.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(script), str(width), str(capability)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    names = {"round_rows", "screen", "fill", "sum_parts", "sum_segments", "dot_products"}
    assert {row["kernel"] for row in rows} == {*names, "sum_entries"}
    most = {80: 166_912, 89: 101_376, 90: 232_448}[capability]
    for row in rows:
        assert row["stack"] <= 16, row  # bytes that registers could not hold: next to none
        assert row["shared"] <= most, row


ARCHITECTURES = {
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig),
    "prolu": (ProLUTrainingSAE, ProLUTrainingSAEConfig),
    "relu": (ReLUTrainingSAE, ReLUTrainingSAEConfig),
    "mlp_encoder": (MLPEncoderTrainingSAE, MLPEncoderTrainingSAEConfig),
}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what the host waits for; kernels do nothing, and find an entry per token."""
    sizes: list[int] = []

    def read(numbers: Tensor) -> list[float]:
        sizes.append(numbers.numel())
        return [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 128.0, 4096.0]

    monkeypatch.setattr(cuda, "read", read)
    monkeypatch.setattr(cuda, "launch", lambda *_, **__: None)
    monkeypatch.setattr(cost, "_properties", lambda _: ((9, 0), 132))
    return sizes


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_waits_for_the_gpu_once(
    name: str, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors without data, where an operation whose size or result depends on them raises."""
    sae_class, config_class = ARCHITECTURES[name]
    # Builds of torch without CUDA have no gradients on a pretended GPU; there a CPU is one.
    device = "cuda" if torch.version.cuda else "cpu"
    monkeypatch.setattr(choice, "KERNEL_DEVICES", {device})
    monkeypatch.setattr(choice, "_tried", lambda *_: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        sae = sae_class(config_class(d_in=768, d_sae=16384, device=device))
        sae.loss_is_guarded = device == "cuda"  # what is pretended has no events
        x = torch.randn(4096, 768, device=device)
        output = sae.training_forward_pass(TrainStepInput(x, {"l1": 0.3}, None, 0, False))
        output.loss.backward()
        assert output.feature_acts.is_sparse
        assert output.feature_acts.shape == (4096, 16384)
        for parameter in sae.parameters():
            assert parameter.grad is not None
            assert parameter.grad.shape == parameter.shape
    assert reads == [8]


def test_such_a_count_would_see_a_second_wait(reads: list[int]) -> None:
    with FakeTensorMode():
        x = torch.randn(8)
        for waiting in (x.nonzero, lambda: x.sum().item(), lambda: bool(x.sum() > 0)):
            with pytest.raises(RuntimeError):
                waiting()
    assert not reads


def test_a_loss_that_is_not_finite_is_found_a_step_later_on_a_gpu() -> None:
    torch.manual_seed(0)
    sae = GatedTrainingSAE(GatedTrainingSAEConfig(d_in=8, d_sae=16, device=DEVICE))
    x = torch.randn(9, 8, device=DEVICE)
    steps = [TrainStepInput(x, {"l1": value}, None, n, False) for n, value in enumerate((1, 1, 1))]
    bad = TrainStepInput(x, {"l1": torch.inf}, None, 1, False)
    sae.training_forward_pass(steps[0])
    sae.training_forward_pass(bad)
    with pytest.raises(TrainingDiverged, match=r"before step 1: the loss is not finite \(l1_loss"):
        sae.training_forward_pass(steps[2])
    sae.training_forward_pass(steps[2])
    copy.deepcopy(sae).training_forward_pass(steps[2])
    sae.loss_is_guarded = True  # as training's DivergenceGuard says, which looks itself
    for step in (bad, steps[2]):
        sae.training_forward_pass(step)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_torch_counts_no_second_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sae_class, config_class = ARCHITECTURES[name]
    sae = sae_class(config_class(d_in=768, d_sae=16384, device="cuda"))
    for parameter in ("b_gate", "b_enc"):
        if hasattr(sae, parameter):
            getattr(sae, parameter).data.fill_(-3.0)
    step_input = TrainStepInput(torch.randn(4096, 768, device="cuda"), {"l1": 1.0}, None, 0, False)
    sae.training_forward_pass(step_input).loss.backward()
    read, counted = cuda.read, 0

    def once(numbers: Tensor) -> list[float]:
        nonlocal counted
        counted += 1
        torch.cuda.set_sync_debug_mode("default")
        found = read(numbers)
        torch.cuda.set_sync_debug_mode("error")
        return found

    monkeypatch.setattr(cuda, "read", once)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = sae.training_forward_pass(step_input)
        output.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert output.feature_acts.is_sparse
    assert counted == 1


def test_screening_finds_what_the_product_does_on_float64() -> None:
    p = on_device(problem(6, 12, 40, 0.5, dtype=torch.float64))
    centred = p["x"].detach() - p["b_dec"].detach()
    found = cuda.find(centred, latent_rows(p["W_enc"].detach()), p["threshold"], 1.0)
    assert found is not None
    support, values, active = found
    expected, products = finding.find_support(centred, p["W_enc"].detach(), p["threshold"])
    assert torch.equal(support.flat[active.bool()], expected.flat)
    torch.testing.assert_close(values[active.bool()], products, rtol=1e-13, atol=1e-13)
