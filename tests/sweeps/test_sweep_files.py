"""A sweep's file: the grid, overrides, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from support.sweeps import names

from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.errors import ConfigError, SaeGatedError
from sae_gated_plugin.sweeps.grid import load_sweep
from sae_gated_plugin.sweeps.sweep import run_sweep


def test_lists_are_alternatives_and_all_combinations_are_points(
    small_sweep: dict[str, Any],
) -> None:
    small_sweep["sweep"]["curves"] = [
        {"label": "a", "architecture": "gated", "l1_coefficient": [1, 2], "lr": [1e-3, 2e-3]},
        {"architecture": "topk", "k": 8},
    ]
    sweep = load_sweep(small_sweep)
    assert len(sweep.points) == 10
    assert names(sweep)[0] == "a-l1_coefficient=1-lr=0.001-seed0"
    assert names(sweep)[-1] == "topk-seed1"
    first, last = sweep.points[0].config.runner, sweep.points[-1].config.runner
    assert (first.sae.l1_coefficient, first.lr, first.seed) == (1, 1e-3, 0)
    assert (last.sae.k, last.lr, last.seed) == (8, small_sweep["lr"], 1)
    assert first.sae.l1_warm_up_steps == 10  # shared; topk has no such field
    assert sweep.points[0].settings == {"l1_coefficient": 1, "lr": 1e-3}


def test_a_point_is_a_run_that_train_accepts(small_sweep: dict[str, Any]) -> None:
    point = load_sweep(small_sweep, ["lr=5e-4"]).points[0]
    assert load_config(point.config.mapping).runner.lr == 5e-4


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"curves": []}, "The sweep is empty"),
        ({"seeds": []}, "The sweep is empty"),
        ({"curves": [{"k": 3}]}, r"'sweep.curves\[0\].architecture' is missing"),
        ({"curves": [{"architecture": "gatd"}]}, "Did you mean 'gated'"),
        ({"curves": [{"architecture": "topk", "kk": 3}]}, "Unknown key 'sae.kk'.*'sae.k'"),
        ({"curves": [{"architecture": "topk"}] * 2}, "are the same, .*: topk-seed0, topk-seed1"),
        ({"curves": {"architecture": "topk"}}, "must be a list of mappings"),
        ({"curve": []}, "Unknown key 'sweep.curve'.*'sweep.curves'"),
        ({"seeds": [0.5]}, "'sweep.seeds' in .* must be a list of whole numbers"),
        (
            {"curves": [{"architecture": "topk", "seeds": 3}]},
            r"'sweep.curves\[0\].seeds' in .* must be a list of whole numbers",
        ),
        ({"curves": [{"architecture": "topk", "seeds": [], "k": 3}]}, "The sweep is empty"),
        ({"curves": [{"architecture": "topk", "seed": [1, 2]}]}, "a list, 'seeds'"),
        ({"eval_tokens": 0}, "'sweep.eval_tokens' must be above 1, not 0"),
        ({"eval_tokens": "all"}, "'sweep.eval_tokens' in .* must be a whole number"),
        ({"curves": [{"architecture": "topk", "label": "x" * 300}]}, "too long for the name"),
    ],
)
def test_bad_sweeps_are_sentences(
    small_sweep: dict[str, Any], change: dict[str, Any], sentence: str
) -> None:
    small_sweep["sweep"].update(change)
    with pytest.raises(SaeGatedError, match=sentence):
        load_sweep(small_sweep)


def test_the_sweep_itself_can_be_overridden(small_sweep: dict[str, Any]) -> None:
    overrides = ["sweep.seeds=[5]", "sweep.eval_tokens=99", "lr=5e-4"]
    sweep = load_sweep(small_sweep, overrides)
    assert {point.seed for point in sweep.points} == {5}
    assert sweep.eval_tokens == sweep.mapping["sweep"]["eval_tokens"] == 99
    assert sweep.mapping["sweep"]["seeds"] == [5]
    assert sweep.mapping["lr"] == 5e-4
    again = load_sweep(sweep.mapping)
    assert [point.config.mapping for point in again.points] == [
        point.config.mapping for point in sweep.points
    ]
    with pytest.raises(ConfigError, match=r"Unknown key 'sweep\.seed'.*'sweep\.seeds'"):
        load_sweep(small_sweep, ["sweep.seed=5"])


def test_a_curve_may_have_seeds_of_its_own(small_sweep: dict[str, Any]) -> None:
    curves = [{"architecture": "topk", "k": 3, "seeds": [2]}, {"architecture": "gated"}]
    small_sweep["sweep"]["curves"] = curves
    points = load_sweep(small_sweep).points
    assert [point.name for point in points] == ["topk-seed2", "gated-seed0", "gated-seed1"]
    assert [point.config.runner.seed for point in points] == [2, 0, 1]


@pytest.mark.parametrize(
    ("override", "own", "expected"),
    [
        ("sweep.seeds=[3]", {}, ["ours-seed3", "topk-seed3"]),
        ("sweep.seeds=[3]", {"seeds": [4]}, ["ours-seed4", "topk-seed3"]),
        ("sweep.curves=[{architecture: topk, k: 3}]", {}, ["topk-seed0", "topk-seed1"]),
        ("seed=3", {"seeds": [4, 5]}, ["ours-seed3", "topk-seed3"]),
        ("lr=1e-4", {"lr": [1e-2, 1e-3], "seeds": [0]}, ["ours-seed0", "topk-seed0", "topk-seed1"]),
        ("sae.d_sae=64", {"d_sae": [8, 9], "seeds": []}, ["topk-seed0", "topk-seed1"]),
        ("sae.architecture=relu", {"label": "x", "seeds": []}, ["relu-seed0", "relu-seed1"]),
    ],
)
def test_an_override_holds_for_every_point_and_is_in_sweep_yaml(
    small_sweep: dict[str, Any], override: str, own: dict[str, Any], expected: list[str]
) -> None:
    small_sweep["sweep"]["curves"] = [
        {"label": "ours", "architecture": "gated", **own},
        {"architecture": "topk"},
    ]
    before = copy.deepcopy(small_sweep)
    sweep = load_sweep(small_sweep, [override])
    assert small_sweep == before
    assert names(sweep) == expected
    for point in sweep.points:
        assert point.config.runner.seed == point.seed
        if not override.startswith("sweep."):
            key, value = override.split("=")
            said = {**point.config.mapping, **point.config.mapping["sae"]}
            assert f"{said[key.removeprefix('sae.')]}" in (value, "0.0001")
    again = load_sweep(sweep.mapping)
    assert [p.config.mapping for p in again.points] == [p.config.mapping for p in sweep.points]
    assert load_sweep(small_sweep, ["sweep.eval_tokens=99"]).eval_tokens == 99


def test_a_run_is_no_sweep(small_run: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="needs a 'sweep' section"):
        load_sweep(small_run)


def test_a_shared_field_that_nobody_has_is_found(small_sweep: dict[str, Any]) -> None:
    small_sweep["sae"]["l1_warmup_steps"] = 3
    with pytest.raises(ConfigError, match=r"Unknown key 'sae.l1_warmup_steps'"):
        load_sweep(small_sweep)


def test_an_unknown_engine_is_a_sentence(small_sweep: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine is 'slurm'; allowed: local, ray"):
        run_sweep(load_sweep(small_sweep), tmp_path, engine="slurm")


def test_what_a_stream_cannot_do_is_refused(small_sweep: dict[str, Any], tmp_path: Path) -> None:
    small_sweep["compile_sae"] = True
    with pytest.raises(ConfigError, match="compile_sae cannot be used in a sweep"):
        run_sweep(load_sweep(small_sweep), tmp_path)


@pytest.mark.filterwarnings("ignore:decoder=.* mixes the two:UserWarning")
def test_the_recipes_are_valid() -> None:
    """Every sweep in configs/ loads; those that need downloads are not run.

    Those on synthetic data are not a sweep's: tests/synthetic loads them.
    """
    configs = Path(__file__).parents[2] / "configs"
    texts = {path: path.read_text() for path in sorted(configs.glob("*.yaml"))}
    found = [p for p, t in texts.items() if "\nsweep:\n" in t and "\nsynthetic_model:" not in t]
    assert len(found) >= 5
    for path in found:
        assert load_sweep(path).points
