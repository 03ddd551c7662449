"""What SAELens promises of its own SAEs holds for ours: its own class is the oracle (oracle.py).

Runners and resuming are in test_saelens.py, training and hooked models in
test_promises_in_models.py.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens import SAE, JumpReLUSAE
from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
from sae_lens.registry import SAE_CLASS_REGISTRY
from support.oracle import (
    CLASSES,
    D_IN,
    D_SAE,
    EDITS,
    N,
    Pair,
    both_modes,
    computed,
    data,
    each,
    oracle,
    pair,
    same,
    same_error,
)
from torch import Tensor

from sae_gated_plugin.architectures.gated import GatedSAE
from sae_gated_plugin.core.cost import CROSSOVER_DENSITY

HOOKS = (
    "hook_sae_input",
    "hook_sae_acts_pre",
    "hook_sae_acts_post",
    "hook_sae_recons",
    "hook_sae_output",
)


@contextmanager
def builtin_gated() -> Iterator[None]:
    """Loading `gated` gives SAELens's class, as without the plugin."""
    with pytest.MonkeyPatch.context() as patch:
        plain = (sae_lens.GatedSAE, sae_lens.GatedSAEConfig)
        patch.setitem(SAE_CLASS_REGISTRY, "gated", plain)
        yield


def use_error_term(saes: Pair) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for sae in saes:
            sae.use_error_term = True


# --- numbers --------------------------------------------------------------------------------------


@each
@both_modes
def test_inputs_of_every_shape_layout_and_dtype(name: str, gradients: bool) -> None:
    saes = pair(name)
    with torch.set_grad_enabled(gradients):
        acts, _ = same(saes, lambda sae: computed(sae, data()))
        assert (acts > 0).float().mean() < CROSSOVER_DENSITY["cpu"]
        assert (acts > 0).any(0).sum() > 200
        same(saes, lambda sae: sae.decode(sae.encode(data())) - sae(data()))
        for shape in ((0, D_IN), (0, 7, D_IN), (D_IN,), (20, 30, D_IN), (4, 5, 20, D_IN)):
            same(saes, lambda sae, shape=shape: computed(sae, data(*shape)))
        for x in (data(D_IN, N).T, data(N, 2 * D_IN)[:, ::2], data(1, D_IN).expand(N, D_IN)):
            assert not x.is_contiguous()
            same(saes, lambda sae, x=x: computed(sae, x))
        for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64):
            same(saes, lambda sae, dtype=dtype: computed(sae, data().to(dtype)))
        for width in (D_IN - 1, D_IN + 1):
            same_error(saes, lambda sae, width=width: sae.encode(data(N, width)))
        same_error(saes, lambda sae: sae.decode(data(N, D_SAE - 1)))


@each
@both_modes
def test_tokens_that_are_not_finite(name: str, gradients: bool) -> None:
    """They must not come out as a code without latents, and must not touch their neighbours."""
    x = data()
    x[300], x[301, 3], x[302, 4] = torch.nan, torch.inf, -torch.inf
    with torch.set_grad_enabled(gradients):
        acts, out = same(
            pair(name), lambda sae: computed(sae, x), equal_nan=True, rtol=1e-5, atol=1e-5
        )
    assert acts[300].isnan().all()
    assert out[300:303].isfinite().logical_not().all()
    assert out[:300].isfinite().all()


@each
@both_modes
def test_sparse_tensors_are_decoded(name: str, gradients: bool) -> None:
    saes = pair(name)
    with torch.set_grad_enabled(gradients):
        acts = saes[1].encode(data()).detach()
        for form in (acts.to_sparse(), acts.to_sparse_csr(), acts, -acts, acts.expand(2, N, D_SAE)):
            same(saes, lambda sae, form=form: sae.decode(form))


@each
def test_gradients_of_inputs_and_parameters(name: str) -> None:
    """Of an inference SAE: derivatives of what it computes, no straight-through estimates."""
    saes = pair(name)
    weights = data(N, D_IN).flip(0)

    def gradients(sae: Any) -> list[Tensor]:
        x = data().requires_grad_()
        names = [n for n, _ in sae.named_parameters() if n not in ("b_enc", "threshold")]
        leaves = [x, *(getattr(sae, n) for n in names)]
        loss = (sae(x) * weights).sum()
        options = {"create_graph": True, "materialize_grads": True}  # a gate receives none
        found = torch.autograd.grad(loss, leaves, **options)
        (second,) = torch.autograd.grad(found[0].square().sum(), sae.W_dec)
        return [*found, second]

    # Sums over hundreds of tokens: absolute errors are those of numbers in the hundreds.
    same(saes, gradients, rtol=1e-5, atol=1e-3)
    same(saes, lambda sae: torch.func.jacrev(sae.encode)(data(D_IN)))
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted):
            same(saes, lambda sae: torch.func.vmap(sae)(data()))


# --- hooks ----------------------------------------------------------------------------------------


@each
@both_modes
def test_hooks_see_the_same(name: str, gradients: bool) -> None:
    def seen(sae: Any) -> dict[str, Tensor]:
        with torch.set_grad_enabled(gradients):
            return dict(sae.run_with_cache(data())[1].items())

    cache = same(pair(name), seen)
    assert set(HOOKS) <= set(cache)
    assert cache["hook_sae_acts_pre"].shape == (N, D_SAE)


@each
@both_modes
@pytest.mark.parametrize("edit", EDITS)
def test_hooks_may_edit(name: str, gradients: bool, edit: str) -> None:
    """Latents that were off too: steering sets them."""
    saes = pair(name)

    def edited(sae: Any, point: str, error_term: bool) -> Any:
        with sae.hooks(fwd_hooks=[(point, EDITS[edit])]), torch.set_grad_enabled(gradients):
            return sae(data()) if error_term else computed(sae, data())

    for point in HOOKS:
        same(saes, lambda sae, point=point: edited(sae, point, False))
    use_error_term(saes)
    for point in HOOKS[1:]:
        same(saes, lambda sae, point=point: edited(sae, point, True))


@each
def test_hooks_capture_gradients(name: str) -> None:
    saes = pair(name)

    def captured(sae: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def keep(gradient: Tensor, hook: Any) -> None:
            found[hook.name] = gradient.detach().clone()

        with sae.hooks(bwd_hooks=[(point, keep) for point in HOOKS]):
            sae(data().requires_grad_()).square().sum().backward()
        return found

    assert set(same(saes, captured, rtol=1e-5, atol=1e-4)) == set(HOOKS)


@each
def test_error_term(name: str) -> None:
    saes = pair(name)
    use_error_term(saes)

    def with_gradients(sae: Any) -> tuple[Tensor, ...]:
        x = data().requires_grad_()
        out = sae(x)
        names = ("W_enc", "W_dec", "b_dec")
        return out, *torch.autograd.grad(out.square().sum(), [x, *(getattr(sae, n) for n in names)])

    out, *_ = same(saes, with_gradients, rtol=1e-5, atol=2e-3)
    torch.testing.assert_close(out, data(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        same(saes, lambda sae: sae.run_with_cache(data())[1]["hook_sae_error"])


@each
@both_modes
def test_hook_z_reshaping(name: str, gradients: bool) -> None:
    saes = pair(name, reshape_activations="hook_z")
    heads, flat = data(20, 30, 4, D_IN // 4), data(20, 30, D_IN)
    with torch.set_grad_enabled(gradients):
        acts, out = same(saes, lambda sae: computed(sae, heads))
        assert (acts.shape, out.shape) == ((20, 30, D_SAE), heads.shape)
        for sae in saes:
            sae.turn_off_forward_pass_hook_z_reshaping()
        same(saes, lambda sae: computed(sae, flat))
        for sae in saes:
            sae.turn_on_forward_pass_hook_z_reshaping()
        same(saes, lambda sae: computed(sae, heads))


# --- folding and loading --------------------------------------------------------------------------


@each
@both_modes
@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_normalisation_per_token(name: str, normalization: str, gradients: bool) -> None:
    saes = pair(name, normalize_activations=normalization, bias=-2.0)
    with torch.set_grad_enabled(gradients):
        same(saes, lambda sae: sae(2 * data() + 1))
        same(saes, lambda sae: sae(data(5, 100, D_IN)))


FOLDS: dict[str, Callable[[Any], Any]] = {
    "W_dec_norm": lambda sae: sae.fold_W_dec_norm(),
    "scaling_factor": lambda sae: sae.fold_activation_norm_scaling_factor(0.7),
    "whitening": lambda sae: sae.fold_activation_whitening(
        data(D_IN), whitening := torch.eye(D_IN) + 0.05 * data(D_IN, D_IN), whitening.inverse()
    ),
}


@each
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_folding(name: str, fold: str, apply_b_dec: bool) -> None:
    if fold == "whitening" and not hasattr(SAE, "fold_activation_whitening"):
        pytest.skip("this SAELens has no fold_activation_whitening")
    if (name, fold, apply_b_dec) == ("prolu", "whitening", False):
        pytest.skip("refused with a sentence, for ProLU has no bias to absorb the mean: test_prolu")
    saes = pair(name, apply_b_dec_to_input=apply_b_dec)
    before = saes[1](data())
    for sae in saes:
        FOLDS[fold](sae)
    _, after = same(saes, lambda sae: computed(sae, data()))
    assert torch.allclose(after, before, atol=1e-4) == (fold == "W_dec_norm")
    folded = dict(saes[1].named_parameters())
    for parameter, tensor in oracle(saes[0]).named_parameters():
        torch.testing.assert_close(tensor, folded[parameter], rtol=1e-5, atol=1e-5)
    assert saes[0].cfg.normalize_activations == saes[1].cfg.normalize_activations


@each
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_loading_with_options(name: str, fold: bool, dtype: str, tmp_path: Path) -> None:
    if fold and "fold_W_dec_norm" not in inspect.signature(SAE.load_from_disk).parameters:
        pytest.skip("this SAELens folds on loading not yet")
    options: Any = {"dtype": dtype, **({"fold_W_dec_norm": True} if fold else {})}

    def loaded(folder: Path) -> list[Any]:
        def from_folder(**known: Any) -> Any:
            overrides = known.get("cfg_overrides")
            return *sae_lens_disk_loader(folder, "cpu", cfg_overrides=overrides), None

        return [
            SAE.load_from_disk(folder, **options),
            SAE.from_pretrained("some/repository", "some_sae", converter=from_folder, **options),
        ]

    for sae, folder in zip(pair(name), ("ours", "theirs")):
        sae.save_model(tmp_path / folder)
    ours = loaded(tmp_path / "ours")
    with builtin_gated():
        theirs = loaded(tmp_path / "theirs")
    for saes in zip(ours, theirs):
        assert type(saes[0]) is CLASSES[name][0]
        assert type(saes[1]) in (sae_lens.GatedSAE, JumpReLUSAE)
        assert saes[0].W_enc.is_contiguous()
        assert saes[0].cfg.dtype == saes[1].cfg.dtype == dtype
        # In bfloat16 exp(r_mag) multiplies what was rounded in SAELens, and here before that.
        tolerance = {"rtol": 0.02, "atol": 0.1} if dtype == "bfloat16" else {}
        same(saes, lambda sae: computed(sae, data()), **tolerance)


# --- what modules do ------------------------------------------------------------------------------


def attributes(sae: Any) -> dict[str, Any]:
    options = {k: v for k, v in sae.cfg.to_dict().items() if k not in ("metadata", "hybrid")}
    return {
        "config": {**options, "architecture": None},
        "dtype": sae.dtype,
        "device": sae.device,
        "tensors": {(p.dtype, p.device, p.requires_grad) for p in sae.parameters()},
        "training": sae.training,
        "name": sae.get_name(),
    }


@each
def test_moves_and_switches(name: str) -> None:
    saes = pair(name)
    for move in (
        lambda sae: sae.to(torch.float64),
        lambda sae: sae.to(dtype=torch.bfloat16, device="cpu"),
        lambda sae: sae.to(torch.zeros(1, dtype=torch.float16)),
        lambda sae: sae.half().float(),
        lambda sae: sae.eval().requires_grad_(False),
        lambda sae: sae.train().requires_grad_(True),
        lambda sae: sae.to("meta"),
        lambda sae: sae.to(torch.device("meta"), torch.float32),
    ):
        moved = [move(copy.deepcopy(sae)) for sae in saes]
        assert attributes(moved[0]) == attributes(moved[1])
        assert type(moved[0]) is type(saes[0])
        if moved[1].device.type == "cpu":
            # Half precisions: the one matmul of ours is scaled after its rounding, not before.
            loose = moved[1].W_enc.dtype.itemsize < 4
            tolerance = {"rtol": 0.02, "atol": 0.1} if loose else {}
            for wanted in (True, False):
                with torch.set_grad_enabled(wanted):
                    same(tuple(moved), lambda sae: computed(sae, data()), **tolerance)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@each
def test_an_sae_on_another_device_than_its_input(name: str) -> None:
    saes = pair(name)
    for sae in saes:
        sae.to("cuda:1")
    same_error(saes, lambda sae: sae(data().to("cuda:0")))
    same(saes, lambda sae: computed(sae, data().to("cuda:1")), rtol=1e-4, atol=1e-4)


@each
def test_copies_states_and_pickles(name: str) -> None:
    ours, theirs = saes = pair(name)
    copies = tuple(copy.deepcopy(sae) for sae in saes)
    same(copies, lambda sae: computed(sae, data()))
    assert type(copies[0]) is type(ours)
    assert copies[0].W_enc.data_ptr() != ours.W_enc.data_ptr()
    assert copies[0].cfg == ours.cfg
    assert copies[0].cfg is not ours.cfg

    assert list(ours.named_buffers()) == list(theirs.named_buffers()) == []
    if name == "gated":  # what either writes the other reads
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        assert repr(ours).replace("\n", "") == repr(theirs).replace("\n", "")
    for sae in saes:
        file = io.BytesIO()
        torch.save(sae.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        fresh = type(sae)(copy.deepcopy(sae.cfg)).share_memory()
        assert fresh.W_enc.is_shared()
        fresh.load_state_dict(state, strict=True)
        assert torch.equal(fresh(data()), sae(data()))
        with pytest.raises(RuntimeError, match="Missing key"):
            fresh.load_state_dict({k: v for k, v in state.items() if k != "b_dec"})
        assert pickle.loads(pickle.dumps(sae.cfg)) == sae.cfg
    # SAELens's constructor keeps local functions: no SAE can be pickled, so none of ours either.
    same_error(saes, pickle.dumps)


def in_another_process(config: dict[str, Any], state: dict[str, Tensor], answers: Any) -> None:
    sae = SAE.from_dict(config)
    sae.load_state_dict(state)
    with torch.no_grad():
        answers.put((type(sae).__module__, sae(data()).numpy()))


def test_spawned_processes_share_the_weights() -> None:
    """An SAE cannot be pickled, its config and its shared weights can."""
    ours, theirs = pair("gated")
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    state = ours.share_memory().state_dict()
    child = context.Process(
        target=in_another_process, args=(ours.cfg.to_dict(), state, answers), daemon=True
    )
    child.start()
    module, out = answers.get(timeout=120)
    child.join(60)
    assert child.exitcode == 0
    assert module == GatedSAE.__module__
    torch.testing.assert_close(torch.from_numpy(out), theirs(data()), rtol=1e-5, atol=1e-5)


@each
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_compiles_as_one_graph(name: str, mode: Any) -> None:
    torch._dynamo.reset()
    saes = pair(name)

    def compiled(sae: Any) -> Any:
        with mode():
            forward = torch.compile(sae, backend="aot_eager", fullgraph=True)
            encode = torch.compile(sae.encode, backend="aot_eager", fullgraph=True)
            return encode(data()), forward(data())

    same(saes, compiled)


@each
@both_modes
def test_autocast(name: str, gradients: bool) -> None:
    """Same dtypes; as near to full precision as SAELens's, or nearer."""
    saes = pair(name)
    exact = computed(saes[1], data())
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
        found = [computed(sae, data()) for sae in saes]
    for ours, theirs, truth in zip(*found, exact):
        assert ours.dtype == theirs.dtype
        assert (ours - truth).norm() < 1.02 * (theirs - truth).norm() < 0.1 * truth.norm()


@each
def test_configs_have_the_same_keys(name: str) -> None:
    ours, theirs = (sae.cfg for sae in pair(name))
    if name == "gated":
        assert ours.to_dict() == theirs.to_dict()
    else:
        assert set(ours.to_dict()) - {"hybrid"} == set(theirs.to_dict())
