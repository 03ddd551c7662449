"""What SAELens promises of its own classes holds for ours: its own class is the oracle.

For `gated` that is the built-in `sae_lens.GatedSAE` with the same state dict and config. SAELens
has no `prolu`; there it is its own JumpReLU SAE, exactly converted. Loading, runners and resuming
are in test_saelens.py, the built-in's loss in test_gated.py.
"""

from __future__ import annotations

import copy
import dataclasses
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
from conftest import D_IN as MODEL_D_IN
from conftest import HOOK_NAME, QUICKSTART
from sae_lens import SAE, ActivationsStore, HookedSAETransformer, JumpReLUSAE
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.load_model import load_model
from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor
from transformer_lens import HookedTransformerConfig

from sae_gated_plugin.architectures.gated import (
    GatedSAE,
    GatedSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
)
from sae_gated_plugin.architectures.prolu import ProLUSAE, ProLUSAEConfig
from sae_gated_plugin.convert import to_jumprelu
from sae_gated_plugin.sparse import CROSSOVER_DENSITY, MIN_TOKENS

Pair = tuple[Any, Any]
D_IN, D_SAE, N = 32, 512, 2 * MIN_TOKENS
CLASSES: Any = {"gated": (GatedSAE, GatedSAEConfig), "prolu": (ProLUSAE, ProLUSAEConfig)}
HOOKS = (
    "hook_sae_input",
    "hook_sae_acts_pre",
    "hook_sae_acts_post",
    "hook_sae_recons",
    "hook_sae_output",
)

each = pytest.mark.parametrize("name", CLASSES)
#: With gradients ours runs dense operations, without them on the active latents alone.
both_modes = pytest.mark.parametrize("gradients", [True, False])


def oracle(ours: Any) -> Any:
    """SAELens's own class with the parameters and the config of ours."""
    if isinstance(ours, ProLUSAE):
        return to_jumprelu(ours)
    options = {f.name: getattr(ours.cfg, f.name) for f in dataclasses.fields(ours.cfg)}
    options["metadata"] = copy.deepcopy(ours.cfg.metadata)
    theirs = sae_lens.GatedSAE(sae_lens.GatedSAEConfig(**options))
    theirs.load_state_dict(ours.state_dict())
    return theirs


def pair(name: str, d_in: int = D_IN, bias: float = -4.0, **options: Any) -> Pair:
    """Ours and SAELens's, no parameter at a special value, sparse enough for the sparse form."""
    generator = torch.Generator().manual_seed(0)
    sae_class, config_class = CLASSES[name]
    ours = sae_class(config_class(d_in=d_in, d_sae=D_SAE, **options))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        ours.W_dec.mul_(torch.rand(D_SAE, 1, generator=generator) / 2)
        (ours.b_gate if name == "gated" else ours.b_enc).add_(bias)
    return ours, oracle(ours)


def data(*shape: int) -> Tensor:
    return 1.5 * torch.randn(shape or (N, D_IN), generator=torch.Generator().manual_seed(1))


def same(saes: Pair, compute: Callable[[Any], Any], **tolerance: Any) -> Any:
    """Assert that both give the same, also in dtype and shape; returns SAELens's."""
    ours, theirs = compute(saes[0]), compute(saes[1])
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours, theirs, **tolerance)
    return theirs


def same_error(saes: Pair, compute: Callable[[Any], Any]) -> None:
    raised = []
    for sae in saes:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            compute(sae)
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]


def computed(sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return sae.encode(x), sae(x)


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


EDITS: dict[str, Callable[..., Tensor]] = {
    "raise all": lambda x, hook: x + 1.0,
    "lower all": lambda x, hook: x - 1.0,
    "negate": lambda x, hook: -x,
    "set one latent": lambda x, hook: x.index_fill(1, torch.tensor([3]), 10.0),
    "ablate": lambda x, hook: x * 0,
}


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


# --- training -------------------------------------------------------------------------------------


def training_pair() -> Pair:
    """The built-in training class, and ours with its loss and its weights."""
    torch.manual_seed(0)
    shape: Any = {"d_in": MODEL_D_IN, "d_sae": D_SAE, "l1_coefficient": 2.0}
    theirs = sae_lens.GatedTrainingSAE(sae_lens.GatedTrainingSAEConfig(**shape))
    own_loss: Any = {"decoder": "norm_weighted", "aux_decoder": "trainable"}
    ours = GatedTrainingSAE(GatedTrainingSAEConfig(**shape, **own_loss))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def test_training_class() -> None:
    ours, theirs = saes = training_pair()
    x = data(N, MODEL_D_IN)
    same(saes, lambda sae: {k: v.contiguous() for k, v in sae.state_dict().items()})
    assert not ours.W_enc.is_contiguous()  # latents are columns, and each lies in one piece
    assert ours.W_enc.stride() == (1, MODEL_D_IN)
    assert copy.deepcopy(ours).W_enc.stride() == (1, MODEL_D_IN)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert theirs.W_enc.is_contiguous()
    same(saes, lambda sae: [*computed(sae, x), *sae.encode_with_hidden_pre(x)])
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    same_error(saes, lambda sae: type(sae)(sae.cfg, use_error_term=True))

    def hooked_step(sae: Any) -> dict[str, Tensor]:
        edit = [
            ("hook_sae_acts_post", EDITS["set one latent"]),
            ("hook_sae_acts_pre", EDITS["raise all"]),
        ]
        with sae.hooks(fwd_hooks=edit):
            output = sae.training_forward_pass(TrainStepInput(x, {"l1": 2.0}, None, 0, False))
        return {**output.losses, "out": output.sae_out, "acts": output.feature_acts}

    same(saes, hooked_step, rtol=1e-4, atol=1e-4)


def test_training_from_cached_activations(tmp_path: Path) -> None:
    shared: Any = {
        "model_name": str(QUICKSTART / "model"),
        "model_class_name": "AutoModelForCausalLM",
        "dataset_path": str(QUICKSTART / "text"),
        "hook_name": HOOK_NAME,
        "context_size": 64,
        "prepend_bos": False,
        "training_tokens": 12_800,
    }
    cache = sae_lens.CacheActivationsRunnerConfig(
        **shared,
        d_in=MODEL_D_IN,
        model_batch_size=10,
        new_cached_activations_path=str(tmp_path / "cache"),
        buffer_size_gb=0.0033,  # SAELens fills its buffers: two of 6400 tokens
        device="cpu",
    )
    sae_lens.CacheActivationsRunner(cache).run()

    def trained(sae: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        cfg = sae_lens.LanguageModelSAERunnerConfig(
            **shared,
            sae=sae.cfg,
            is_dataset_tokenized=False,
            use_cached_activations=True,
            cached_activations_path=str(tmp_path / "cache"),
            train_batch_size_tokens=512,
            store_batch_size_prompts=10,
            n_batches_in_buffer=8,
            n_eval_batches=1,
            lr=1e-3,
            output_path=None,
            checkpoint_path=None,
            logger=sae_lens.LoggingConfig(log_to_wandb=False),
        )
        before = sae.W_dec.detach().clone()
        sae = sae_lens.LanguageModelSAETrainingRunner(cfg, override_sae=sae).run()
        assert (sae.W_dec - before).abs().max() > 0.01
        return sae.W_dec.detach(), sae(data(N, MODEL_D_IN)).detach()

    # Adam divides by the size of gradients: entries that hardly have one differ more than float32.
    same(training_pair(), trained, rtol=1e-2, atol=1e-3)


# --- models ---------------------------------------------------------------------------------------


def on_the_packaged_model(name: str, folder: Path) -> Pair:
    """Trained weights for the packaged model; ProLU takes the Gated SAE's for its own."""
    ours = SAE.load_from_disk(folder)
    if name == "prolu":
        gated = ours
        options = {k: getattr(gated.cfg, k) for k in ("d_in", "d_sae", "metadata")}
        ours = ProLUSAE(ProLUSAEConfig(**options))
        with torch.no_grad():
            for parameter, source in (
                ("b_enc", "b_gate"),
                *((n, n) for n in ("W_enc", "W_dec", "b_dec")),
            ):
                getattr(ours, parameter).copy_(getattr(gated, source))
    return ours, oracle(ours)


@each
def test_evals_and_activation_stores(name: str, trained_run: Path) -> None:
    saes = on_the_packaged_model(name, trained_run)
    model = load_model("AutoModelForCausalLM", str(QUICKSTART / "model"), "cpu")

    def evaluated(sae: Any) -> Any:
        torch.manual_seed(0)
        store = ActivationsStore.from_sae(
            model,
            sae,
            str(QUICKSTART / "text"),
            streaming=False,
            store_batch_size_prompts=8,
            n_batches_in_buffer=16,
            train_batch_size_tokens=256,
        )
        batch = store.next_batch()
        metrics, per_latent = run_evals(
            sae,
            store,
            model,
            ActivationScaler(),
            get_eval_everything_config(batch_size_prompts=8, n_eval_reconstruction_batches=2),
            exclude_special_tokens=False,
        )
        per_latent.pop("encoder_bias", None)  # SAELens's JumpReLU has one, all zeros
        return metrics, per_latent, batch, sae.encode(batch)

    metrics, *_ = same(saes, evaluated, rtol=1e-4, atol=1e-5)
    assert metrics["sparsity"]["l0"] > 3
    assert metrics["model_performance_preservation"]["ce_loss_score"] > 0.3


def exercise(model: Any, tokens: Tensor, saes: list[Any]) -> list[Any]:
    """Everything that a hooked model does with SAEs; the numbers it gives."""
    points = [sae.cfg.metadata.hook_name for sae in saes]
    first = model.get_sae_hook_name(saes[0]) if hasattr(model, "get_sae_hook_name") else None
    post = first or f"{points[0]}.hook_sae_acts_post"
    clean = model(tokens)
    found: list[Any] = [model.run_with_saes(tokens, saes=saes)]
    logits, cache = model.run_with_cache_with_saes(tokens, saes=saes)
    found += [logits, {k: v for k, v in cache.items() if "hook_sae_" in k}]
    assert len(found[-1]) >= 5 * len(saes)
    found.append(model.run_with_saes(tokens, saes=saes, use_error_term=True))
    torch.testing.assert_close(found[-1], clean, rtol=1e-4, atol=1e-4)
    edits = [(post, lambda acts, hook: acts + 1.0)]
    found.append(model.run_with_hooks_with_saes(tokens, saes=saes, fwd_hooks=edits))
    with torch.no_grad():
        found.append(model.run_with_hooks_with_saes(tokens, saes=saes, fwd_hooks=edits))
        torch.testing.assert_close(found[-1], found[-2], rtol=1e-4, atol=1e-4)
        for sae in saes:
            model.add_sae(sae)
        found.append(model(tokens))
        model.reset_saes(points[0])
        found.append(model(tokens))
        with model.saes(saes=saes[:1]):
            assert list(model.acts_to_saes) == points[::-1]
            found.append(model(tokens))
        model.reset_saes()
        assert not model.acts_to_saes
        assert torch.equal(model(tokens), clean)
    assert all((logits - clean).abs().max() > 1e-2 for logits in (found[0], *found[4:]))
    return found


@each
def test_hooked_sae_transformer(name: str) -> None:
    torch.manual_seed(0)
    shape: Any = {"n_layers": 2, "d_model": D_IN, "n_ctx": 64, "d_head": 16, "n_heads": 2}
    model = HookedSAETransformer(
        HookedTransformerConfig(**shape, d_vocab=50, act_fn="relu", seed=0)
    )
    tokens = torch.randint(0, 50, (8, 60))
    names = ("blocks.0.hook_resid_post", "blocks.1.attn.hook_z")
    reshaping = ("none", "hook_z")
    pairs = [
        pair(name, bias=-1.0, reshape_activations=how, metadata=SAEMetadata(hook_name=point))
        for point, how in zip(names, reshaping)
    ]
    ours, theirs = (exercise(model, tokens, list(saes)) for saes in zip(*pairs))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    getattr(sae_lens, "SAETransformerBridge", None) is None,
    reason="SAETransformerBridge came with TransformerLens 3",
)
@each
def test_transformer_bridge(name: str, trained_run: Path) -> None:
    bridge = sae_lens.SAETransformerBridge.boot_transformers(
        str(QUICKSTART / "model"), device="cpu"
    )
    tokens = torch.randint(0, 2000, (8, 60), generator=torch.Generator().manual_seed(0))
    pairs = []
    for layer in (1, 2):
        ours, _ = on_the_packaged_model(name, trained_run)
        ours.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
        pairs.append((ours, oracle(ours)))
    ours, theirs = (exercise(bridge, tokens, list(saes)) for saes in zip(*pairs))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@each
def test_neuronpedia(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    neuronpedia = pytest.importorskip("sae_lens.analysis.neuronpedia_integration")
    opened: list[str] = []
    monkeypatch.setattr(neuronpedia.webbrowser, "open", opened.append)
    metadata = SAEMetadata(model_name="gpt2-small", neuronpedia_id="gpt2-small/6-res-jb")
    for sae in pair(name, metadata=metadata):
        neuronpedia.open_neuronpedia_feature_dashboard(sae, 7)
        neuronpedia.get_neuronpedia_quick_list(sae, [3, 14], name="two latents")
    assert opened[:2] == opened[2:]
    assert opened[0] == "https://neuronpedia.org/gpt2-small/6-res-jb/7"
    assert "two%20latents" in opened[1]
