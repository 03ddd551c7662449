"""SAEs on synthetic data as a sweep: one stream, resuming, failures, the benchmark's measures."""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.test_cli import assert_refused, call
from sae_lens.registry import get_sae_training_class
from sae_lens.synthetic import SyntheticModel, SyntheticModelConfig, eval_sae_on_synthetic_data
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from support.local_hub import LocalHub
from training.test_fused_adam import fused_in_steps

from sae_gated_plugin.config.yaml import to_yaml
from sae_gated_plugin.errors import ConfigError, Interrupted, SaeGatedError
from sae_gated_plugin.saes.load import load_sae
from sae_gated_plugin.synthetic import model as synthetic_model
from sae_gated_plugin.synthetic.config import load_toy
from sae_gated_plugin.synthetic.experiment import run_toy
from sae_gated_plugin.synthetic.measure import measure_toy
from sae_gated_plugin.synthetic.model import open_model
from sae_gated_plugin.synthetic.stream import SyntheticStream

SMALL: dict[str, Any] = {
    "training_samples": 2048,
    "batch_size": 128,
    "eval_samples": 500,
    "lr": 2e-3,
    "synthetic_model": {
        "num_features": 24,
        "hidden_dim": 12,
        "firing_probability": 0.1,
        "std_firing_magnitudes": 0.2,
        "hierarchy": {"total_root_nodes": 2, "branching_factor": 3, "max_depth": 1},
        "correlation": {"rank": 2},
        "orthogonalization": {"num_steps": 2},
    },
    "sae": {"d_sae": 8},
    "sweep": {
        "seeds": [0, 1],
        "curves": [
            {"label": "ours", "architecture": "gated", "l1_coefficient": [0.1, 0.3]},
            {"architecture": "topk", "k": 2, "seeds": [0]},
        ],
    },
}
NAMES = [
    *("ours-l1_coefficient=0.1-seed0", "ours-l1_coefficient=0.1-seed1"),
    *("ours-l1_coefficient=0.3-seed0", "ours-l1_coefficient=0.3-seed1", "topk-seed0"),
]


@pytest.fixture
def small() -> dict[str, Any]:
    """Five SAEs, sixteen steps."""
    return copy.deepcopy(SMALL)


def found(output: Path) -> dict[str, Any]:
    """Results and weights, without what differs between two runs."""
    points: dict[str, Any] = {}
    for folder in (output / "saes").glob("[!.]*"):
        results = json.loads((folder / "results.json").read_text())
        for name in ("seconds", "path"):
            del results[name]
        weights = (folder / "sae_weights.safetensors").read_bytes()
        points[folder.name] = results, weights
    return points


def count_steps(monkeypatch: pytest.MonkeyPatch, stop_after: int = 0) -> list[int]:
    """Count batches drawn; after so many of them send SIGTERM."""
    counted: list[int] = []
    fit = MultiSAETrainer.fit

    def counting(self: MultiSAETrainer) -> Any:
        draw = self.data_provider
        self.data_provider = iter(counted_batches(draw))
        return fit(self)

    def counted_batches(draw: Any) -> Any:
        for batch in draw:
            counted.append(1)
            if len(counted) == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(MultiSAETrainer, "fit", counting)
    return counted


# --- the grid and the stream ----------------------------------------------------------------------


def test_curves_and_seeds_share_one_stream_and_do_not_change_each_other(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = count_steps(monkeypatch)
    together = run_toy(load_toy(small), tmp_path / "together")
    assert len(steps) == 2048 // 128  # for all five
    assert [sae["name"] for sae in together["saes"]] == NAMES
    for name, curve in (("ours", 0), ("topk", 1)):
        small["sweep"]["curves"] = [SMALL["sweep"]["curves"][curve]]
        run_toy(load_toy(small), tmp_path / name)
    alone = {**found(tmp_path / "ours"), **found(tmp_path / "topk")}
    assert found(tmp_path / "together") == alone  # whatever the others drew for themselves
    first, second = (load_sae(sae["path"]).W_dec for sae in together["saes"][:2])
    assert not torch.equal(first, second)  # seeds are of the weights


def test_learning_rates_may_differ_within_a_stream(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small["sweep"] = {"curves": [{"architecture": "gated", "lr": [2e-3, 1e-9]}]}
    steps = count_steps(monkeypatch)
    saes = run_toy(load_toy(small), tmp_path)["saes"]
    assert len(steps) == 16
    assert [(sae["lr"], sae["settings"]) for sae in saes] == [
        (2e-3, {"lr": 2e-3}),
        (1e-9, {"lr": 1e-9}),
    ]
    moved, still = (load_sae(sae["path"]).W_dec for sae in saes)
    torch.manual_seed(0)
    point = load_toy(small).points[1]
    untrained = get_sae_training_class("gated")[0](point.config.runner.sae).W_dec
    assert torch.allclose(still, untrained, atol=1e-5)
    assert (moved - untrained).abs().max() > 1e-3


def test_interrupted_it_goes_on_as_if_nothing_had_happened(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small["sae"]["normalize_activations"] = "expected_average_only_in"
    small["n_batches_for_norm_estimate"] = 2
    run_toy(load_toy(small), tmp_path / "whole")
    expected = found(tmp_path / "whole")
    assert sorted(expected) == sorted(NAMES)
    with monkeypatch.context() as patch:
        steps = count_steps(patch, stop_after=2 + 7)
        with pytest.raises(Interrupted, match="the same command goes on"):
            run_toy(load_toy(small), tmp_path / "stopped")
    assert len(steps) == 2 + 7
    steps = count_steps(monkeypatch)
    run_toy(load_toy(small), tmp_path / "stopped")
    assert len(steps) == 16 - 7
    assert found(tmp_path / "stopped") == expected
    assert not list((tmp_path / "stopped" / "streams").glob("*/*"))
    monkeypatch.setattr(SyntheticStream, "run", lambda self: pytest.fail("trained again"))
    again = run_toy(load_toy(small), tmp_path / "stopped")
    assert [sae["name"] for sae in again["saes"]] == NAMES


def test_one_that_fails_stops_no_other(small: dict[str, Any], tmp_path: Path) -> None:
    bad = {"label": "bad", "architecture": "gated", "l1_coefficient": 1e38}
    small["sweep"]["curves"].append(bad)
    result = run_toy(load_toy(small), tmp_path)
    assert ["error" in sae for sae in result["saes"]] == [False] * 5 + [True] * 2
    assert "Training stopped before step 0" in result["saes"][-1]["error"]
    del small["sweep"]["curves"][-1]
    run_toy(load_toy(small), tmp_path / "without")
    good = {sae["name"]: sae["f1"] for sae in result["saes"][:5]}
    assert good == {
        name: results["f1"] for name, (results, _) in found(tmp_path / "without").items()
    }


ANY = [
    {"architecture": "batchtopk", "k": 2},
    {"architecture": "matryoshka_batchtopk", "k": 2, "matryoshka_widths": [[4, 8]]},
    {"architecture": "jumprelu", "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 2},
    {"architecture": "standard"},
    {"architecture": "prolu", "target_l0": 2},
    {"architecture": "relu", "target_l0": 2},
]


def test_any_registered_architecture(small: dict[str, Any], tmp_path: Path) -> None:
    small["sweep"] = {"curves": ANY}
    saes = run_toy(load_toy(small), tmp_path)["saes"]
    assert [sae["architecture"] for sae in saes] == [curve["architecture"] for curve in ANY]
    for sae in saes:
        assert 0 <= sae["mcc"] <= 1, sae
        assert load_sae(sae["path"]).cfg.d_in == 12


# --- what is measured -----------------------------------------------------------------------------


def test_the_benchmarks_measures_are_saelenss_own(small: dict[str, Any], tmp_path: Path) -> None:
    toy = load_toy(small)
    sae = load_sae(run_toy(toy, tmp_path)["saes"][4]["path"])
    model, members = open_model(toy.points[0].config)
    torch.manual_seed(7)
    expected = eval_sae_on_synthetic_data(
        sae, model.feature_dict, model.activation_generator, 500, 100
    )
    torch.manual_seed(7)
    measured = measure_toy(sae, model, members, 500, 100)
    for name, value in (
        *(("f1", expected.classification.f1_score), ("recall", expected.classification.recall)),
        *(("precision", expected.classification.precision), ("mcc", expected.mcc)),
        *(("uniqueness", expected.uniqueness), ("shrinkage", expected.shrinkage)),
        *(("explained_variance", expected.explained_variance), ("true_l0", expected.true_l0)),
    ):
        assert measured[name] == value, name
    # On the same samples, so what both count is the same.
    assert measured["l0"] == pytest.approx(expected.sae_l0)
    assert measured["dead_share"] == expected.dead_latents / 8
    assert measured["fvu"] == pytest.approx(1 - expected.explained_variance, rel=0.05)


def test_many_latents_are_measured_without_a_heatmap(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_gated_plugin.synthetic.measure.MOST_DRAWN", 8 * 24 - 1)
    sae = run_toy(load_toy(small), tmp_path)["saes"][0]
    assert "f1" in sae
    assert "heatmap" not in sae
    assert not list(tmp_path.glob("*.png"))


# --- the synthetic model --------------------------------------------------------------------------


def test_a_costly_model_is_built_once(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic_model, "COSTLY", 0)
    small["model_folder"] = str(tmp_path)
    config = load_toy(small).points[0].config
    first, _ = open_model(config)
    (kept,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert {file.suffix for file in kept.iterdir()} == {".json", ".safetensors"}
    small["synthetic_model"]["seed"] = 1
    other, _ = open_model(load_toy(small).points[0].config)
    assert not torch.equal(other.feature_dict.feature_vectors, first.feature_dict.feature_vectors)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2

    monkeypatch.setattr(synthetic_model, "_build", lambda *_, **__: pytest.fail("built again"))
    again, _ = open_model(config)
    small["synthetic_model"] = str(kept)
    given, _ = open_model(load_toy(small).points[0].config)
    for model in (first, again, given):
        torch.manual_seed(0)
        samples = model.sample(50)
        torch.manual_seed(0)
        assert torch.equal(samples, first.sample(50))


def test_a_model_from_the_hub(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, _ = open_model(load_toy(small).points[0].config)
    built.save(tmp_path / "model")
    with LocalHub() as hub:
        api = hub.patch_client(monkeypatch, tmp_path / "home")
        api.create_repo("tester/synthetic")
        for file in (tmp_path / "model").iterdir():
            api.upload_file(
                path_or_fileobj=file.read_bytes(),
                path_in_repo=f"inner/{file.name}",
                repo_id="tester/synthetic",
            )
        small["synthetic_model"] = "tester/synthetic:inner"
        config = load_toy(small).points[0].config
        model, _ = open_model(config)
        small["synthetic_model"] = "tester/synthetic:outer"
        with pytest.raises(ConfigError, match=r"'tester/synthetic:outer' cannot be read: .*Give a"):
            load_toy(small)
    assert config.runner.sae.d_in == 12
    torch.manual_seed(0)
    samples = model.sample(50)
    torch.manual_seed(0)
    assert torch.equal(samples, built.sample(50))


def test_the_model_is_what_saelens_makes_of_the_configuration(small: dict[str, Any]) -> None:
    config = load_toy(small).points[0].config
    ours, _ = open_model(config)
    theirs = SyntheticModel(SyntheticModelConfig.from_dict(config.features.to_dict()))
    torch.manual_seed(0)
    samples = ours.sample(50)
    torch.manual_seed(0)
    assert torch.equal(samples, theirs.sample(50))
    assert config.features.seed == 0  # whatever the SAEs' own: they share one model
    assert load_toy(small).points[1].config.training.seed == 1


# --- bad input and the command --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("sae.target_l0=9", "'sae.target_l0' in .* is 9.0, more than d_sae = 8"),
        ("sae.d_in=13", "'sae.d_in' is 13, hidden_dim 12; leave d_in out"),
        (
            "synthetic_model=./nowhere",
            "Synthetic model './nowhere' does not exist: .* Give a",
        ),
        ("synthetic_model=owner/nowhere", "Synthetic model 'owner/nowhere' cannot be read: .*Give"),
        ("sweep.eval_tokens=100", "counts tokens of text; give 'eval_samples'"),
        ("training_sample=3", "Unknown key 'training_sample'.*'training_samples'"),
        ("saes=[]", "has both 'saes' and 'sweep'"),
        ("device=gpu", "'device' in .* must be a device of PyTorch"),
    ],
)
def test_bad_configurations(small: dict[str, Any], override: str, sentence: str) -> None:
    small["sweep"]["curves"] = [{"architecture": "gated"}]
    with pytest.raises(SaeGatedError, match=sentence):
        load_toy(small, [override])


def test_a_saved_model_of_another_width_or_a_damaged_one(
    small: dict[str, Any], tmp_path: Path
) -> None:
    open_model(load_toy(small).points[0].config)[0].save(tmp_path / "model")
    small["synthetic_model"] = str(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"'sae.d_in' is 13, hidden_dim 12; leave d_in out"):
        load_toy(small, ["sae.d_in=13"])
    config = load_toy(small).points[0].config
    weights = tmp_path / "model" / "synthetic_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"The synthetic model cannot be made: .*"):
        open_model(config)
    (tmp_path / "empty").mkdir()
    small["synthetic_model"] = str(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"cannot be read: .*synthetic_model_config.json"):
        load_toy(small)


def test_the_command(small: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "synth.yaml").write_text(to_yaml(small))
    arguments = [tmp_path / "synth.yaml", "--output", tmp_path / "out"]
    result = call("synth", *arguments, "--only", "topk")
    assert result.exit_code == 0, result.stderr
    assert "24 true features in 12 dimensions" in result.stdout
    assert [path.name for path in (tmp_path / "out" / "saes").iterdir()] == ["topk-seed0"]
    result = call("synth", *arguments, "--json")
    assert [sae["name"] for sae in json.loads(result.stdout)["saes"]] == NAMES
    fused = ("--output", tmp_path / "fused", "--fused-adam")
    seen = fused_in_steps(lambda: call("synth", arguments[0], *fused))
    assert seen == {True, None}  # None: the optimizer that makes the features orthogonal
    assert_refused(call("synth", *arguments, "--only", "topq"), "Unknown label 'topq'; known: ours")
    assert_refused(
        call("synth", arguments[0], "lr=1", *arguments[1:]), "already holds a toy; choose"
    )
    assert_refused(call("train", arguments[0]), "start it with: sae-gated synth")
    assert_refused(call("synth", tmp_path / "none.yaml"), "does not exist")
