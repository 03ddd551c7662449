"""SAELens's training classes, runners, evals and hooked models with ours and with its own SAEs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens import SAE, ActivationsStore, HookedSAETransformer
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.load_model import load_model
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from sae_lens.training.activation_scaler import ActivationScaler
from support.oracle import (
    D_IN,
    D_SAE,
    EDITS,
    N,
    Pair,
    computed,
    data,
    each,
    oracle,
    pair,
    same,
    same_error,
)
from support.runs import D_IN as MODEL_D_IN
from support.runs import QUICKSTART
from torch import Tensor
from transformer_lens import HookedTransformerConfig

from sae_gated_plugin.architectures.gated import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_gated_plugin.architectures.prolu import ProLUSAE, ProLUSAEConfig

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


@pytest.mark.parametrize("architecture", ["relu", "expanded"])
@pytest.mark.parametrize("edit", EDITS)
def test_hooks_may_edit_relu_codes_in_training(architecture: str, edit: str) -> None:
    """Where a hook raises a pre-activation above 0 the latent is on, as in SAELens's `standard`."""
    sae_class, config_class = get_sae_training_class(architecture)
    ours = sae_class(config_class(d_in=D_IN, d_sae=D_SAE))
    theirs = sae_lens.StandardTrainingSAE(
        sae_lens.StandardTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE)
    )
    with torch.no_grad():
        ours.b_enc.copy_(data(D_SAE) - 1)
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "log_t"})

    def edited(sae: Any) -> tuple[Tensor, ...]:
        with sae.hooks(fwd_hooks=[("hook_sae_acts_pre", EDITS[edit])]):
            step = sae.training_forward_pass(TrainStepInput(data(), {"l1": 1.0}, None, 0, False))
            return step.feature_acts.detach(), step.sae_out, *computed(sae, data())

    same((ours, theirs), edited)


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
