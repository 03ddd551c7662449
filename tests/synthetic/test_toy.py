"""Toy models: what is found in data whose true features are known."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml
from cli.test_cli import assert_refused, call
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.registry import get_sae_training_class
from sae_lens.synthetic import ConstantFiringProbabilityConfig

from sae_gated_plugin.config.yaml import read_yaml
from sae_gated_plugin.errors import ConfigError, SaeGatedError
from sae_gated_plugin.synthetic.config import load_toy
from sae_gated_plugin.synthetic.experiment import run_toy
from sae_gated_plugin.synthetic.heatmap import cosine_heatmap
from sae_gated_plugin.synthetic.measure import _drawn_order, match_features, measure_toy
from sae_gated_plugin.synthetic.model import open_model

CONFIGS = Path(__file__).parents[2] / "configs"
PAIRS = [[0, 1], [2, 3]]

SMALL: dict[str, Any] = {
    "training_samples": 1024,
    "batch_size": 256,
    "eval_samples": 1000,
    "synthetic_model": {
        "num_features": 4,
        "hidden_dim": 8,
        "firing_probability": 0.2,
        "bias": 0.0,
        "orthogonalization": {},
    },
    "saes": [{"architecture": "gated", "d_sae": 4, "l1_coefficient": 0.5}],
}


@pytest.fixture
def small() -> dict[str, Any]:
    """Trains for four steps."""
    return copy.deepcopy(SMALL)


def opened(mapping: dict[str, Any], overrides: Sequence[str] = ()) -> SimpleNamespace:
    """A loaded toy, with the model that its SAEs see."""
    toy = load_toy(mapping, overrides)
    model, members = open_model(toy.points[0].config)
    saes = {point.label: point.config.runner.sae for point in toy.points}
    return SimpleNamespace(model=model, members=members, saes=saes, mapping=toy.mapping)


def planted(rows: Any, loaded: SimpleNamespace) -> Any:
    """A standard SAE, d_sae = len(rows), whose latents are these mixtures (latents, features)."""
    sae_class, config_class = get_sae_training_class("standard")
    sae = sae_class(config_class(d_in=loaded.model.cfg.hidden_dim, d_sae=len(rows)))
    directions = torch.tensor(rows, dtype=torch.float32) @ loaded.model.feature_dict.feature_vectors
    sae.W_dec.data = torch.nn.functional.normalize(directions, dim=1).detach()
    sae.W_enc.data = sae.W_dec.data.T.contiguous()
    sae.b_enc.data.fill_(-0.1)  # above what is left of other features where they are orthogonal
    sae.b_dec.data.zero_()
    return sae


# --- matching -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_matching_is_the_best_of_all_permutations(rows: int, columns: int, seed: int) -> None:
    cosines = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    row_of = match_features(cosines)
    used = [row for row in row_of.tolist() if row >= 0]
    assert len(used) == len(set(used)) == min(rows, columns)
    total = sum(cosines[row, column].item() for column, row in enumerate(row_of) if row >= 0)
    square = torch.zeros(max(rows, columns), max(rows, columns))
    square[:rows, :columns] = cosines
    best = max(
        sum(square[row, column].item() for column, row in enumerate(permutation))
        for permutation in itertools.permutations(range(len(square)))
    )
    assert total == pytest.approx(best, abs=1e-5)


def test_rows_are_drawn_by_match_then_by_nearest_column() -> None:
    cosines = torch.tensor([[0.1, 0.8], [0.0, 0.9], [0.7, 0.2], [0.6, 0.1]])
    assert _drawn_order(cosines) == [2, 1, 3, 0]


# --- numbers by hand ------------------------------------------------------------------------------


def test_a_perfect_sae(small: dict[str, Any]) -> None:
    loaded = opened(small)
    measured = measure_toy(
        planted(np.eye(4)[[2, 0, 3, 1]], loaded), loaded.model, loaded.members, 1000, 300
    )
    assert measured["matches"]["latent"] == [1, 3, 0, 2]
    assert measured["heatmap"]["latents"] == [1, 3, 0, 2]
    for name in (
        *("mmcs_features", "mmcs_latents", "features_found", "feature_precision"),
        *("firing_precision", "firing_recall"),
    ):
        assert measured[name] == pytest.approx(1, abs=1e-3), name
    assert measured["l0"] == measured["true_l0"] == pytest.approx(0.8, abs=0.1)
    assert measured["gamma"] == pytest.approx(0.9, abs=1e-3)  # a threshold of 0.1 shrinks
    assert measured["composites_found"] is None
    assert measured["undefined"] == {"composites_found": "There are no composites."}


def test_a_latent_for_two_features_one_for_none_and_one_that_is_dead(small: dict[str, Any]) -> None:
    """Features 0 and 1 share a latent, -2 has one of the wrong sign, 3 has one that never fires."""
    loaded = opened({**small, "composites": {"groups": PAIRS[:1], "probability": 0.0}})
    sae = planted([[1, 1, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]], loaded)
    sae.b_enc.data[2] = -10
    measured = measure_toy(sae, loaded.model, loaded.members, 4000, 1000)
    half = 0.5**0.5
    assert measured["composites_found"] == 1
    assert measured["features_found"] == 0.25  # its direction is known, though it never fires
    assert measured["feature_precision"] == 0  # of the one latent that fires
    assert sorted(measured["heatmap"]["dead"]) == [1, 2]
    assert measured["mmcs_features"] == pytest.approx((2 * half + 0 + 1) / 4, abs=2e-3)
    assert measured["mmcs_latents"] == pytest.approx((half + 0 + 1) / 3, abs=2e-3)
    matches = measured["matches"]
    assert matches["latent"][3] == 2
    assert matches["firing_precision"][3] is None
    assert matches["firing_recall"][3] == 0
    shared = matches["latent"].index(0)
    assert shared in (0, 1)
    # it fires if either of two independent features does, each with probability 0.2
    assert matches["firing_precision"][shared] == pytest.approx(0.2 / 0.36, abs=0.06)
    assert matches["firing_recall"][shared] == 1
    alone = matches["latent"].index(None)
    assert matches["cosine"][alone] is None
    assert matches["firing_recall"][alone] == 0


def test_what_is_undefined_says_why(small: dict[str, Any]) -> None:
    small["synthetic_model"]["firing_probability"] = 0
    loaded = opened(small)
    measured = measure_toy(planted(np.eye(4), loaded), loaded.model, loaded.members, 100, 100)
    for name in ("gamma", "fvu", "firing_precision", "firing_recall", "feature_precision"):
        assert measured[name] is None
        assert measured["undefined"][name].endswith(".")


# --- the data -------------------------------------------------------------------------------------


def test_composites_fire_together_beside_what_fires_alone(small: dict[str, Any]) -> None:
    small["synthetic_model"].update(firing_probability=0.1, std_firing_magnitudes=0.2)
    small["composites"] = {"groups": [[0, 1, 2]], "probability": 0.3}
    loaded = opened(small)
    torch.manual_seed(0)
    x, acts = loaded.model.sample_with_features(20_000)
    fires = (acts > 0).double()
    assert fires[:, 3].mean() == pytest.approx(0.1, abs=0.01)
    assert fires[:, :3].mean(0).tolist() == pytest.approx([1 - 0.9 * 0.7] * 3, abs=0.015)
    together = 0.3 + 0.7 * 0.1**3
    assert fires[:, :3].prod(1).mean() == pytest.approx(together, abs=0.015)
    magnitudes = acts[acts > 0]
    assert magnitudes.mean() == pytest.approx(1, abs=0.01)
    assert magnitudes.std() == pytest.approx(0.2, abs=0.01)
    assert torch.allclose(x, acts @ loaded.model.feature_dict.feature_vectors, atol=1e-5)


def test_saelens_generators_correlation_and_hierarchy_are_used(small: dict[str, Any]) -> None:
    small["synthetic_model"].update(
        num_features=12,
        firing_probability={"generator_name": "linear", "max_prob": 0.4, "min_prob": 0.1},
        mean_firing_magnitudes={"generator_name": "linear", "start": 1.0, "end": 3.0},
        correlation={"rank": 2, "correlation_scale": 0.3},
        hierarchy={"total_root_nodes": 2, "branching_factor": 3, "max_depth": 1},
    )
    small["composites"] = {"groups": PAIRS, "probability": 0.5}
    model = opened(small).model
    generator = model.activation_generator
    assert generator.firing_probabilities.aminmax() == pytest.approx((0.1, 0.4))
    assert generator.mean_firing_magnitudes.aminmax() == pytest.approx((1, 3))
    assert generator.low_rank_correlation is not None
    fires = generator.sample(2000) > 0
    assert model.hierarchy is not None
    for root in model.hierarchy.roots:
        for child in root.children:
            assert not (fires[:, child.feature_index] & ~fires[:, root.feature_index]).any()


def test_a_number_is_saelens_constant(small: dict[str, Any]) -> None:
    cfg = opened(small).model.cfg
    assert cfg.firing_probability == ConstantFiringProbabilityConfig(0.2)
    assert cfg.seed == 0


# --- what is learned ------------------------------------------------------------------------------


def run_first(recipe: str, overrides: list[str], output: Path) -> dict[str, Any]:
    """The first SAE of a recipe, in 800 short steps or fewer."""
    mapping = read_yaml(CONFIGS / recipe)
    mapping["saes"] = mapping["saes"][:1]
    short = ["batch_size=128", "lr=6e-3", "lr_decay_steps=150", "eval_samples=20_000"]
    (measured,) = run_toy(load_toy(mapping, [*short, *overrides]), output)["saes"]
    return measured


def test_gated_finds_orthogonal_features_without_shrinkage(tmp_path: Path) -> None:
    size = [f"{key}=12" for key in ("synthetic_model.num_features", "synthetic_model.hidden_dim")]
    training = ["training_samples=102_400", "synthetic_model.firing_probability=0.08"]
    overrides = [*size, *training, "sae.d_sae=12", "sae.l1_coefficient=0.8"]
    gated = run_first("toy_orthogonal.yaml", overrides, tmp_path / "toy")
    assert gated["features_found"] >= 0.95
    assert gated["gamma"] == pytest.approx(1, abs=0.01)
    assert gated["firing_recall"] > 0.95
    assert gated["firing_precision"] > 0.95


def test_composites_hide_their_features_which_alone_oftener_are_found(tmp_path: Path) -> None:
    pairs = "composites.groups=[[0, 1], [2, 3], [4, 5]]"
    size = ["synthetic_model.num_features=6", "synthetic_model.hidden_dim=8", pairs]
    size += ["training_samples=76_800"]
    often = [*size, "composites.probability=0.15", "sae.d_sae=12", "seed=1"]
    failing = run_first("toy_composite.yaml", often, tmp_path / "often")
    assert failing["features_found"] == 0
    assert failing["composites_found"] == 1
    less = [*size, "composites.probability=0.07", "synthetic_model.firing_probability=0.08"]
    less += ["sae.d_sae=6", "sae.l1_coefficient=0.5"]
    mended = run_first("toy_composite.yaml", less, tmp_path / "less")
    assert mended["features_found"] == 1
    assert mended["composites_found"] == 0


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"trainning_samples": 3}, r"Unknown key 'trainning_samples'.*'training_samples'"),
        ({"composite": {}}, r"Unknown key 'composite' in the conf.*Did you mean 'composites'"),
        ({"batch_size": 0}, "'batch_size' in the configuration must be above zero"),
        ({"lr": "fast"}, "'lr' in the configuration must be a finite number"),
        ({"saes": {}}, "'saes' in the configuration must be a list of mappings"),
        ({"saes": []}, "the configuration has no SAE: 'saes' is empty or missing"),
        ({"saes": [{"architecture": "gatd"}]}, "Unknown architecture 'gatd'.*Did you mean 'gated'"),
        ({"saes": [{"d_sae": 3}]}, "'sae.architecture' is missing"),
        ({"saes": [{"architecture": "topk"}]}, "'sae.d_sae' of architecture 'topk' is missing"),
        (
            {"saes": [{"architecture": "topk", "d_sae": 4, "kk": 3}]},
            "Unknown key 'sae.kk' of architecture 'topk'.*'sae.k'",
        ),
        (
            {"saes": [{"architecture": "topk", "d_sae": 4, "k": 2}] * 2},
            "Two of 'saes' are called 'topk'",
        ),
        ({"sae": {"d_in": 9}}, "'sae.d_in' is 9, hidden_dim 8; leave d_in out"),
        ({"synthetic_model": None}, "'synthetic_model.num_features' is missing"),
        ({"synthetic_model": 3}, "'synthetic_model' in the configuration must be a mapping"),
        ({"composites": {"groups": PAIRS}}, "'composites.probability' is missing"),
        ({"composites": {"groups": [[0, 4]], "probability": 0.1}}, r"out of 0 to 3, not \[0, 4\]"),
        ({"composites": {"groups": [[0]], "probability": 0.1}}, "two or more different features"),
        ({"composites": {"groups": [[1, 1]], "probability": 0.1}}, "two or more different"),
        ({"composites": {"groups": PAIRS, "probability": 2}}, "must lie between 0 and 1; it is 2"),
    ],
)
def test_bad_configurations_are_sentences(
    small: dict[str, Any], change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(SaeGatedError, match=sentence):
        load_toy({**small, **change})


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "hiden_dim=3",
            r"'synthetic_model.hiden_dim' in the override.*'synthetic_model.hidden_dim'",
        ),
        ("num_features=0", "num_features must be at least 1"),
        ("firing_probability=1.5", "'synthetic_model.firing_probability' must lie between 0 and 1"),
        ("firing_probability=often", "'synthetic_model.firing_probability' .* must be a mapping"),
        ("firing_probability={probability: 0.1}", "Unknown .*generator_name 'None'; known: const"),
        ("firing_probability={generator_name: zipf}", "Did you mean 'zipfian'"),
        (
            "firing_probability={generator_name: zipfian, max_probb: 1}",
            "Unknown key 'synthetic_model.firing_probability.max_probb'.*max_prob'",
        ),
        ("correlation={rankk: 2}", "'synthetic_model.correlation.rankk'.*correlation.rank'"),
        ("hierarchy={total_root_nodes: -1}", "cannot be used: total_root_nodes must be positive"),
    ],
)
def test_bad_data_is_a_sentence(small: dict[str, Any], override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_toy(small, [f"synthetic_model.{override}"])


def test_overrides_hold_for_every_sae(small: dict[str, Any]) -> None:
    small["sae"] = {"d_sae": 4, "l1_warm_up_steps": 7}
    small["saes"].append({"architecture": "topk", "k": 2})
    loaded = opened(small, ["sae.d_sae=6", "lr=1e-2", "synthetic_model.hidden_dim=5"])
    assert [config.d_sae for config in loaded.saes.values()] == [6, 6]
    assert loaded.saes["gated"].l1_warm_up_steps == 7  # shared; topk has no such field
    assert loaded.saes["topk"].d_in == 5
    assert load_toy(small, ["lr=1e-2"]).points[0].config.runner.lr == 1e-2
    assert "d_in" not in small["sae"]
    assert opened(loaded.mapping).saes == loaded.saes


# --- the folder and the command -------------------------------------------------------------------


def test_the_command(small: dict[str, Any], tmp_path: Path) -> None:
    small["composites"] = {"groups": PAIRS, "probability": 0.1}
    small["saes"].append({"label": "../top/k", "architecture": "topk", "d_sae": 3, "k": 1})
    path, output = tmp_path / "toy.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(small))
    result = call("toy", path, "seed=3", "--output", output, "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed == json.loads((output / "toy.json").read_text())
    assert (printed["num_features"], printed["composites"]) == (4, PAIRS)
    assert [sae["label"] for sae in printed["saes"]] == ["gated", "../top/k"]
    for sae, name in zip(printed["saes"], ("gated", "_top_k")):
        assert np.array(sae["heatmap"]["cosines"]).shape == (sae["d_sae"], 6)
        assert len(sae["heatmap"]["bias"]) == 6
        assert (output / sae["figure"]).read_bytes().startswith(b"\x89PNG")
        saved = SAE.load_from_disk(output / "saes" / name)
        drawn = np.array(sae["heatmap"]["cosines"])[:, :4]
        true = opened(small, ["seed=3"]).model.feature_dict.feature_vectors.detach()
        rows = torch.nn.functional.normalize(saved.W_dec.detach()[sae["heatmap"]["latents"]])
        assert drawn == pytest.approx((rows @ true.T).numpy(), abs=1e-3)
    written = read_yaml(output / "toy.yaml")
    assert written["seed"] == 3
    assert written["saes"][0] == {"label": "gated", "d_in": 8, **small["saes"][0]}

    again = call("toy", output / "toy.yaml", "--output", tmp_path / "again", "--json")
    for first, second in zip(printed["saes"], json.loads(again.stdout)["saes"]):
        for sae in (first, second):
            del sae["seconds"], sae["path"]
        assert first == second  # the same seed, the same bits
    assert_refused(call("toy", path, "--output", output), "already holds a toy; choose another")
    assert_refused(call("toy", path, "--output", path), "is a file; choose another with --output")


def test_the_command_prints_a_table(small: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(small))
    result = call("toy", path, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "4 true features in 8 dimensions, 0." in result.stdout
    assert re.search(r"│ gated +│ \d", result.stdout)
    assert f"Heatmaps and numbers: {tmp_path / 'out'}\n" in result.stdout
    assert_refused(call("toy", path, "saess=[]"), "Unknown key 'saess' in the override 'saess=[]'")
    assert_refused(call("toy", tmp_path / "none.yaml"), "does not exist")


def test_divergence_is_a_sentence(small: dict[str, Any], tmp_path: Path) -> None:
    small["saes"] = [{"architecture": "standard", "d_sae": 4, "l1_coefficient": 1.0}]
    with pytest.raises(ConfigError, match=r"No SAE could.*'standard': .*loss is not finite.*lr"):
        run_toy(load_toy(small, ["lr=1e30", "training_samples=4096"]), tmp_path / "out")


@pytest.mark.parametrize(("latents", "columns"), [(1, 1), (3, 10), (25, 15), (400, 200)])
def test_a_heatmap_of_any_size_has_every_cell(latents: int, columns: int, tmp_path: Path) -> None:
    """Read back from the picture: the diagonal is dark, and nothing else."""
    cosines = np.zeros((latents, columns))
    np.fill_diagonal(cosines, 1)
    heatmap = {"latents": list(range(latents)), "dead": [], "cosines": cosines.tolist()}
    measured = {"b_dec_norm": 0.0, "heatmap": {**heatmap, "bias": [0.0] * columns}}
    (tmp_path / "map.png").write_bytes(cosine_heatmap("x" * 200, measured, columns))
    picture = matplotlib.image.imread(tmp_path / "map.png")[..., :3]
    dark = np.abs(picture - [4 / 255, 34 / 255, 63 / 255]).max(-1) < 0.02
    ys, xs = np.nonzero(dark[:, : int(picture.shape[1] * 0.75)])  # without the colour bar
    on_diagonal = min(latents, columns)
    assert len(ys) >= on_diagonal * 4
    if on_diagonal > 1:  # a diagonal of n blocks correlates by 1 - 1/n²
        assert np.corrcoef(ys, xs)[0, 1] == pytest.approx(1 - on_diagonal**-2, abs=0.01)


@pytest.mark.parametrize(
    "path", [*CONFIGS.glob("toy_*.yaml"), *CONFIGS.glob("synth_*.yaml")], ids=str
)
def test_the_recipes_are_valid(path: Path) -> None:
    assert load_toy(path).points
