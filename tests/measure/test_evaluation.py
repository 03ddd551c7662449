from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import EvalConfig, get_recons_loss, run_evals
from sae_lens.registry import get_sae_class
from sae_lens.training.activation_scaler import ActivationScaler
from support.models import CONTEXT, TEXT, linear_sae, transformer
from support.runs import D_IN, HOOK_NAME, QUICKSTART

from sae_gated_plugin.errors import ArtifactError, ConfigError
from sae_gated_plugin.measure.evaluate import _histograms, evaluate, evaluate_all
from sae_gated_plugin.measure.options import EvalOptions
from sae_gated_plugin.metrics.firing import LatentDensity
from sae_gated_plugin.model.hook_point import HookPoint
from sae_gated_plugin.model.text import open_text
from sae_gated_plugin.plugins.bridge import registry


def text_tokens(point: HookPoint, sae: SAE, n_sequences: int) -> torch.Tensor:
    """The first held-out sequences, (n_sequences, CONTEXT), as SAELens cuts them."""
    text, _ = open_text(TEXT, "validation")
    return ActivationsStore.from_sae(point.model, sae, text).get_batch_tokens(n_sequences)


# --- several SAEs at once -------------------------------------------------------------------------


def test_saes_for_other_tokens_are_not_measured_together(trained_run: Path) -> None:
    one, other = SAE.load_from_disk(trained_run), SAE.load_from_disk(trained_run)
    other.cfg.metadata.context_size = 32
    with pytest.raises(
        ConfigError, match=r"different context_size \(32 and 64\) cannot be measured"
    ):
        evaluate_all({"one": one, "other": other})


def test_together_the_model_runs_twice_and_once_per_sae(
    hook_point: HookPoint, trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saes = {name: SAE.load_from_disk(trained_run) for name in "abc"}
    passes: list[torch.Size] = []
    run = HookPoint.run

    def counted(self: HookPoint, tokens: torch.Tensor, *rest: Any) -> Any:
        passes.append(tokens.shape)
        return run(self, tokens, *rest)

    monkeypatch.setattr(HookPoint, "run", counted)
    results = evaluate_all(saes, model=hook_point.model, tokens=10 * CONTEXT)
    # As it is, ablated, three SAEs; and once to see whether earlier blocks may be left out.
    assert len([shape for shape in passes if shape[0] == 10]) == 6
    for name in ("l0", "gamma_ci", "loss_recovered", "kl"):
        assert results["a"][name] == results["b"][name] == results["c"][name]


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("gated", {"b_gate", "b_mag", "r_mag"}),
        ("prolu", {"b_enc"}),
        ("mlp_encoder", {"b_gate", "b_mag", "r_mag"}),
        ("standard", {"b_enc"}),
        ("jumprelu", {"b_enc", "threshold"}),
    ],
)
def test_histograms_of_a_square_sae_that_nothing_was_measured_of(
    architecture: str, expected: set[str]
) -> None:
    """b_dec has as many entries as there are latents, and is not per latent."""
    sae_class, config_class = get_sae_class(architecture)
    sae = sae_class(config_class(d_in=8, d_sae=8))
    histograms = _histograms(sae, LatentDensity())
    assert set(histograms) == expected
    assert {sum(histogram["counts"]) for histogram in histograms.values()} == {8}


def test_histograms_count_every_latent(trained_run: Path, hook_point: HookPoint) -> None:
    results = evaluate(SAE.load_from_disk(trained_run), model=hook_point.model, tokens=20 * CONTEXT)
    histograms, d_sae = results["histograms"], results["d_sae"]
    assert set(histograms) == {"log10_latent_density", "b_gate", "b_mag", "r_mag"}
    for name, histogram in histograms.items():
        assert len(histogram["edges"]) == len(histogram["counts"]) + 1
        dead = results["dead_share"] * d_sae if name == "log10_latent_density" else 0
        assert sum(histogram["counts"]) == round(d_sae - dead), name


# --- against SAELens's own evaluation -------------------------------------------------------------


@pytest.fixture(scope="module")
def everywhere(trained_run: Path) -> SAE:
    """The trained SAE, told to measure every position, as SAELens's evaluation always does."""
    sae = SAE.load_from_disk(trained_run)
    sae.cfg.metadata.seqpos_slice = None
    return sae


def saelens_losses(sae: SAE, model: Any, tokens: torch.Tensor) -> dict[str, float]:
    found = get_recons_loss(
        sae, model, ActivationScaler(), tokens, compute_kl=True, compute_ce_loss=True
    )
    mean = {name: value.double().mean().item() for name, value in found.items()}
    lost = mean["ce_loss_with_sae"] - mean["ce_loss_without_sae"]
    at_stake = mean["ce_loss_with_ablation"] - mean["ce_loss_without_sae"]
    return {
        "nats_lost": lost,
        "loss_recovered": 1 - lost / at_stake,
        "kl": mean["kl_div_with_sae"],
    }


def test_losses_agree_with_saelens(hook_point: HookPoint, everywhere: SAE) -> None:
    tokens = text_tokens(hook_point, everywhere, 20)
    results = evaluate(everywhere, model=hook_point.model, tokens=tokens.numel())
    expected = saelens_losses(everywhere, hook_point.model, tokens)
    assert results["tokens"] == tokens.numel()
    assert results["nats_lost"] == pytest.approx(expected["nats_lost"], rel=1e-4)
    assert results["loss_recovered"] == pytest.approx(expected["loss_recovered"], rel=1e-5)
    assert results["kl"] == pytest.approx(expected["kl"], rel=1e-4)
    assert 0.2 < results["loss_recovered"] < 1


def test_reconstruction_agrees_with_saelens(hook_point: HookPoint, everywhere: SAE) -> None:
    n_sequences = 16
    results = evaluate(everywhere, model=hook_point.model, tokens=n_sequences * CONTEXT)
    text, _ = open_text(TEXT, "validation")
    store = ActivationsStore.from_sae(hook_point.model, everywhere, text)
    oracle, _ = run_evals(
        everywhere,
        store,
        hook_point.model,
        ActivationScaler(),
        EvalConfig(
            batch_size_prompts=n_sequences,
            n_eval_sparsity_variance_batches=1,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
        ),
        exclude_special_tokens=False,
    )
    quality = oracle["reconstruction_quality"]
    assert results["l0"] == pytest.approx(oracle["sparsity"]["l0"], rel=1e-5)
    assert results["fvu"] == pytest.approx(1 - quality["explained_variance"], rel=1e-4)
    assert results["gamma"] == pytest.approx(
        oracle["shrinkage"]["relative_reconstruction_bias"], rel=1e-4
    )


@pytest.mark.parametrize("head", [None, 2])
def test_attention_heads_agree_with_saelens(head: int | None) -> None:
    model = transformer(n_layers=2)
    width = 16 if head is None else 4
    torch.manual_seed(1)
    sae = linear_sae(
        0.5 * torch.randn(width, width),
        hook_name="blocks.0.attn.hook_z",
        hook_head_index=head,
        context_size=32,
    )
    if head is None:
        sae.turn_on_forward_pass_hook_z_reshaping()
    tokens = torch.randint(0, 50, (12, 32))
    results = evaluate(
        sae,
        model=model,
        dataset=Dataset.from_dict({"tokens": tokens.tolist()}),
        tokens=tokens.numel(),
    )
    assert sae.hook_z_reshaping_mode == (head is None)
    sae.turn_off_forward_pass_hook_z_reshaping()
    expected = saelens_losses(sae, model, tokens)
    assert results["tokens"] == tokens.numel()
    assert results["nats_lost"] == pytest.approx(expected["nats_lost"], rel=1e-3)
    assert results["kl"] == pytest.approx(expected["kl"], rel=1e-3)


# --- against what must be so ----------------------------------------------------------------------


@pytest.mark.parametrize("positions", [None, [1, None], [5, -5], [0, 64, 2]])
def test_perfect_reconstruction_loses_nothing(hook_point: HookPoint, positions: Any) -> None:
    sae = linear_sae(torch.eye(D_IN), seqpos_slice=positions)
    results = evaluate(sae, model=hook_point.model, tokens=8 * CONTEXT)
    measured = len(range(CONTEXT)[slice(*(positions or [None]))])
    assert results["tokens"] == 8 * measured
    assert results["loss_recovered"] == pytest.approx(1, abs=1e-5)
    assert results["nats_lost"] == pytest.approx(0, abs=1e-5)
    assert results["kl"] == pytest.approx(0, abs=1e-6)
    assert results["gamma"] == pytest.approx(1, abs=1e-6)
    assert results["gamma_ci"] == pytest.approx([1, 1], abs=1e-6)
    assert results["fvu"] == pytest.approx(0, abs=1e-9)
    assert results["l0"] == pytest.approx(D_IN, rel=1e-3)
    assert results["undefined"] == {}


def test_gamma_is_the_scale_of_the_reconstruction(hook_point: HookPoint) -> None:
    results = evaluate(linear_sae(0.6 * torch.eye(D_IN)), model=hook_point.model, tokens=500)
    assert results["gamma"] == pytest.approx(0.6, rel=1e-5)
    assert results["gamma_centered"] == pytest.approx(0.6, abs=0.2)


def test_zero_reconstruction_recovers_nothing(hook_point: HookPoint) -> None:
    sae = linear_sae(torch.zeros(D_IN, D_IN), seqpos_slice=[3, -3])
    results = evaluate(sae, model=hook_point.model, tokens=8 * CONTEXT)
    # The ablation touches the measured positions only, so here it is the same as the SAE.
    assert results["loss_recovered"] == pytest.approx(0, abs=1e-6)
    assert results["nats_lost"] > 0.1
    assert results["gamma"] is None
    assert results["gamma_ci"] is None
    assert "no rescaling" in results["undefined"]["gamma"]


def test_excluded_tokens_are_neither_measured_nor_replaced(hook_point: HookPoint) -> None:
    sae = linear_sae(torch.zeros(D_IN, D_IN), torch.full((D_IN,), 3.0))
    tokens = text_tokens(hook_point, sae, 6)
    common = tokens.flatten().mode().values.item()
    sae.cfg.metadata.exclude_special_tokens = [common]
    results = evaluate(sae, model=hook_point.model, tokens=tokens.numel())
    kept = tokens != common
    assert results["tokens"] == int(kept.sum()) < tokens.numel()

    _, acts = hook_point.run(tokens)
    assert results["fvu"] == pytest.approx(
        float((acts[kept] - 3).double().square().sum())
        / float((acts[kept] - acts[kept].mean(0)).double().square().sum()),
        rel=1e-4,
    )
    spliced, _ = hook_point.run(tokens, lambda x: torch.where(kept[..., None], 3.0, x))
    clean, _ = hook_point.run(tokens)
    after, here = tokens[:, 1:], kept[:, :-1]
    losses = [
        torch.nn.functional.cross_entropy(logits[:, :-1][here].double(), after[here]).item()
        for logits in (spliced, clean)
    ]
    assert results["nats_lost"] == pytest.approx(losses[0] - losses[1], rel=1e-4)


def test_special_tokens_of_the_tokenizer_are_excluded(hook_point: HookPoint) -> None:
    sae = linear_sae(torch.eye(D_IN), prepend_bos=True, exclude_special_tokens=True)
    tokens = text_tokens(hook_point, sae, 10)
    special = hook_point.model.tokenizer.bos_token_id
    assert (tokens[:, 0] == special).all()
    results = evaluate(sae, model=hook_point.model, tokens=tokens.numel())
    assert results["tokens"] == int((tokens != special).sum()) <= 10 * (CONTEXT - 1)


def test_reading_stops_at_the_end_of_the_text(hook_point: HookPoint, tmp_path: Path) -> None:
    words = "It was the best of times, it was the worst of times. " * 60
    Dataset.from_dict({"text": [words]}).to_parquet(str(tmp_path / "train.parquet"))
    sae = linear_sae(torch.eye(D_IN), dataset_path=str(tmp_path))
    results = evaluate(sae, model=hook_point.model, tokens=10**9)
    whole = len(hook_point.model.tokenizer(words)["input_ids"]) // CONTEXT
    assert results["tokens"] == whole * CONTEXT
    assert results["split"] == "train"  # there is no held-out split, and the result says so


def test_held_out_text_is_preferred(hook_point: HookPoint) -> None:
    sae = linear_sae(torch.eye(D_IN))
    held_out = evaluate(sae, model=hook_point.model, tokens=256)
    trained_on = evaluate(sae, model=hook_point.model, tokens=256, split="train")
    assert (held_out["split"], trained_on["split"]) == ("validation", "train")


def test_a_metric_of_a_stranger_is_reported(
    hook_point: HookPoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LargestError:
        largest = 0.0

        def update(self, batch: Any) -> None:
            self.largest = max(self.largest, float((batch.x - batch.x_hat).abs().max()))

        def compute(self) -> float:
            return self.largest

    monkeypatch.setitem(registry().metrics, "largest_error", LargestError)
    b_dec = torch.zeros(D_IN)
    b_dec[3] = -2.0
    results = evaluate(linear_sae(torch.eye(D_IN), b_dec), model=hook_point.model, tokens=256)
    assert results["largest_error"] == pytest.approx(2, rel=1e-4)


def test_run_folder(trained_run: Path) -> None:
    results = evaluate(trained_run, EvalOptions(tokens=1024))
    assert results["architecture"] == "gated"
    assert results["model_name"] == results["dataset"] == "quickstart"
    assert (results["l1_coefficient"], results["target_l0"]) == (0.3, None)
    assert (results["d_in"], results["d_sae"], results["hook_name"]) == (D_IN, 256, HOOK_NAME)
    assert results["path"] == str(trained_run)
    assert results["training_tokens"] == 40_960
    assert results["tokens"] == 1024 // CONTEXT * (CONTEXT - 1)  # position 0 is left out
    low, high = results["gamma_ci"]
    assert low < results["gamma"] < high
    assert 0 <= results["dead_share"] < 1
    assert set(results["versions"]) >= {"sae-gated-plugin", "sae-lens", "torch", "python"}
    assert all(value is None or value == value for value in results.values())
    json.dumps(results, allow_nan=False)


# --- model and text that do not fit ---------------------------------------------------------------


def test_model_that_is_not_there(trained_run: Path) -> None:
    with pytest.raises(ConfigError, match=r"model_name './none' does not exist"):
        evaluate(trained_run, model_name="./none")
    with pytest.raises(ConfigError, match=r"Model 'nobody/none' .* cannot be loaded: OSError"):
        evaluate(trained_run, model_name="nobody/none")


@pytest.mark.parametrize("trust", [False, True])
def test_a_strangers_sae_cannot_have_code_run_unless_it_is_allowed(
    trust: bool, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(QUICKSTART / "model", model)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "theirs.Model"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "theirs.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Model: pass\n")
    sae = SAE.load_from_disk(trained_run)
    sae.cfg.metadata.model_name = str(model)
    sae.cfg.metadata.model_from_pretrained_kwargs = {"trust_remote_code": True}
    if trust:
        with pytest.raises(ConfigError, match="cannot be loaded"):  # it is no model
            evaluate(sae, tokens=512, trust_model_options=True)
    else:
        with pytest.raises(ArtifactError, match=r"loaded with trust_remote_code, which may run"):
            evaluate(sae, tokens=512)
    assert ran.exists() == trust


def test_text_that_is_not_there(hook_point: HookPoint, tmp_path: Path) -> None:
    def measure(**options: Any) -> None:
        evaluate(linear_sae(torch.eye(D_IN)), model=hook_point.model, **options)

    with pytest.raises(ConfigError, match=r"dataset_path './none' does not exist"):
        measure(dataset="./none")
    with pytest.raises(ConfigError, match="Dataset 'nobody/none' cannot be opened: Conn"):
        measure(dataset="nobody/none")
    with pytest.raises(ConfigError, match=r"cannot be opened: EmptyDatasetError"):
        measure(dataset=str(tmp_path))
    with pytest.raises(ConfigError, match=r"Unknown split of dataset .* 'tset'; known: train, val"):
        measure(split="tset")
    with pytest.raises(ConfigError, match="does not fit this SAE: Dataset must have a 'tokens'"):
        measure(dataset=Dataset.from_dict({"label": [1]}))
    with pytest.raises(ConfigError, match="There is nothing to measure"):
        measure(dataset=Dataset.from_dict({"text": ["too short"]}))


@pytest.mark.parametrize(
    ("metadata", "error", "sentence"),
    [
        ({"hook_name": None}, ArtifactError, "no hook_name"),
        ({"hook_name_out": "model.layers.3"}, ArtifactError, "This is a transcoder"),
        ({"dataset_path": None}, ConfigError, "names no dataset"),
        ({"prepend_bos": None}, ConfigError, "prepend_bos is required"),
        ({"context_size": None}, ConfigError, "context_size is required"),
        ({"normalize": True}, ArtifactError, "neither folded into its weights nor stored"),
        ({"d_in": 64}, ConfigError, f"d_in is 64, but hook point '{HOOK_NAME}' is {D_IN}"),
    ],
)
def test_saes_that_cannot_be_evaluated(
    hook_point: HookPoint, metadata: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    sae = linear_sae(torch.eye(metadata.get("d_in", D_IN)), **metadata)
    if metadata.get("normalize"):
        sae.cfg.normalize_activations = "expected_average_only_in"
    with pytest.raises(error, match=sentence):
        evaluate(sae, model=hook_point.model)


def test_options_are_checked(hook_point: HookPoint) -> None:
    with pytest.raises(ConfigError, match="names no model"):
        evaluate(linear_sae(torch.eye(D_IN), model_name=None))
    with pytest.raises(TypeError, match="'tokns'"):
        evaluate(linear_sae(torch.eye(D_IN)), model=hook_point.model, tokns=5)


def test_activations_that_are_not_finite_give_no_numbers(hook_point: HookPoint) -> None:
    results = evaluate(
        linear_sae(math.nan * torch.eye(D_IN)), model=hook_point.model, tokens=2 * CONTEXT
    )
    for name in ("gamma", "fvu", "loss_recovered", "nats_lost", "kl"):
        assert results[name] is None
        assert "NaN" in results["undefined"][name]
    json.dumps(results, allow_nan=False)
