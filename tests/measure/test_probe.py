"""Sparse probing with the real sae-probes on the packaged model; without it, the sentences."""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import HOOK_NAME, QUICKSTART
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from sae_gated_plugin.cli.commands import app
from sae_gated_plugin.errors import ConfigError
from sae_gated_plugin.measure import probe as probing
from sae_gated_plugin.measure.probe import probe
from sae_gated_plugin.model.hook_point import HookPoint
from sae_gated_plugin.publish.card import Card, Entry, render
from sae_gated_plugin.report.page import write_report
from sae_gated_plugin.results import PROBE_KEYS

installed = pytest.mark.skipif(not find_spec("sae_probes"), reason="needs the extra [probes]")

KEYS = ("probe_auc_1", "probe_auc_5", "probe_auc_16", "probe_auc_raw")


def test_activations_are_those_of_each_texts_last_token(hook_point: HookPoint) -> None:
    """Whatever the lengths, also of texts longer than the model's context; against transformers."""
    texts = ["The whale", "It was a bright cold day in April. " * 3, "Yes", "word " * 300]
    found = probing._last_tokens(hook_point, texts)
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "model")
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART / "model")
    for text, acts in zip(texts, found):
        tokens = torch.tensor([tokenizer(text)["input_ids"][-128:]])
        with torch.no_grad():
            states = model(tokens, output_hidden_states=True).hidden_states
        torch.testing.assert_close(acts, states[3][0, -1].float(), rtol=1e-4, atol=1e-4)


def test_reading_stops_at_the_hook_point(hook_point: HookPoint) -> None:
    tokens = torch.arange(24).view(2, 12)
    after: list[Any] = []
    last = dict(hook_point.model.model.named_modules())["model.layers.3"]
    handle = last.register_forward_hook(lambda *_: after.append(1))
    try:
        found = hook_point.read(tokens)
        assert not after
        assert torch.equal(found, hook_point.run(tokens)[1])  # no hook of `read` is left behind
        assert after
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def probed(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run's copy, probed on the two smallest data sets, and what `probe` returned."""
    from sae_probes.utils_data import get_dataset_sizes

    run = tmp_path_factory.mktemp("probed") / "run"
    shutil.copytree(trained_run, run, ignore=shutil.ignore_patterns("checkpoints"))
    sizes = get_dataset_sizes()
    smallest = sorted(sizes, key=lambda name: sizes[name])[:2]
    return run, probe([run], smallest, seeds=2)


@installed
def test_means_and_intervals_are_of_every_data_set_and_seed(probed: tuple[Path, Any]) -> None:
    run, (result,) = probed
    assert json.loads((run / "probes.json").read_text()) == result
    assert (result["datasets"], result["seeds"], len(result["by_dataset"])) == (2, 2, 2)
    for key in KEYS:
        aucs = [found[key] for found in result["by_dataset"].values()]
        assert all(len(seeds) == 2 and 0 < min(seeds) <= max(seeds) <= 1 for seeds in aucs)
        mean = statistics.fmean(value for seeds in aucs for value in seeds)
        assert result[key] == pytest.approx(mean)
        first, second = (statistics.fmean(seeds[i] for seeds in aucs) for i in (0, 1))
        half = 12.7062 * abs(first - second) / 2  # Student's t with one degree of freedom
        assert result[f"{key}_ci"] == pytest.approx([mean - half, mean + half], rel=1e-4)
    assert result["probe_auc_raw"] > 0.6  # there is something to find
    assert result["probe_auc_16"] > result["probe_auc_1"]  # and more latents find more of it
    assert result["versions"]["sae-probes"]


@installed
def test_what_was_done_before_an_interrupt_is_not_done_again(
    probed: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real SIGINT, sent while the second data set's texts are read; the first is kept."""
    done, (expected,) = probed
    names = list(expected["by_dataset"])
    run = tmp_path / "run"
    shutil.copytree(done, run)
    (run / "probes.json").unlink()
    original, read = probing._last_tokens, list[int]()

    def interrupted(*arguments: Any) -> torch.Tensor:
        read.append(1)
        if len(read) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(probing, "_last_tokens", interrupted)
    options = ("--dataset", names[0], "--dataset", names[1], "--seeds", "2", "--device", "cpu")
    stopped = CliRunner().invoke(app, ["probe", str(run), *options])
    assert stopped.exit_code == 130
    assert "1 of 2 data sets are done and kept; the same command goes on." in stopped.stderr
    assert not (run / "probes.json").exists()
    kept = json.loads((run / "probes_unfinished.json").read_text())
    assert kept["by_dataset"] == {names[0]: expected["by_dataset"][names[0]]}

    (result,) = probe([run], names, seeds=2)
    assert len(read) == 3  # the first data set's texts were not read again
    assert result["by_dataset"] == expected["by_dataset"]
    assert not (run / "probes_unfinished.json").exists()

    (run / "probes_unfinished.json").write_text(json.dumps({**kept, "of": {"weights": "others"}}))
    probe([run], names[:1], seeds=1)
    assert len(read) == 4  # of another SAE: begun again


@installed
def test_what_is_known_is_not_measured_again(
    probed: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished probing has all of its SAE, and the raw probe for an SAE that joins later."""
    import sae_probes

    done, (expected,) = probed
    known, joins = tmp_path / "known", tmp_path / "joins"
    shutil.copytree(done, known)
    shutil.copytree(done, joins)
    (joins / "probes.json").unlink()

    def again(**_: Any) -> None:
        pytest.fail("measured again")

    monkeypatch.setattr(sae_probes, "run_baseline_evals", again)
    names = list(expected["by_dataset"])
    results = probe([known, joins], names, seeds=2)
    assert [result["by_dataset"] for result in results] == [expected["by_dataset"]] * 2

    monkeypatch.setattr(sae_probes, "run_sae_evals", again)
    (result,) = probe([known], names[:1], seeds=2)
    assert result["by_dataset"] == {names[0]: expected["by_dataset"][names[0]]}
    (result,) = probe([known], names, seeds=2)  # the fewer data sets have not cost the other
    assert result["by_dataset"] == expected["by_dataset"]
    assert not (known / "probes_unfinished.json").exists()
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        probe([known], names[:1], seeds=1)


@installed
def test_report_and_card_show_it(probed: tuple[Path, Any], tmp_path: Path) -> None:
    run, (result,) = probed
    results = json.loads((run / "results.json").read_text())
    assert results["l0"] > 0  # what was there is there still
    assert [results[key] for key in KEYS] == [result[key] for key in KEYS]
    write_report([run], tmp_path)
    page = (tmp_path / "report.html").read_text()
    config = json.loads((run / "cfg.json").read_text())
    card = render(Card("me/saes", [Entry("run", config, results)]))
    for text in ("AUC k = 1", "AUC k = 16", "AUC raw", f"{result['probe_auc_16']:.3f}"):
        assert text in page
        assert text in card
    without = {key: value for key, value in results.items() if not key.startswith("probe_")}
    assert "AUC" not in render(Card("me/saes", [Entry("run", config, without)]))


@installed
def test_an_unknown_data_set_names_the_nearest(trained_run: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean '5_hist_fig_ismale'"):
        probe([trained_run], ["5_hist_fig_ismal"])


def test_a_data_set_that_is_not_there_is_named_without_the_extra_too() -> None:
    with pytest.raises(ConfigError, match=r"no data set 'set11'\. Did you mean 'set1'.* It has 10"):
        probing._chosen([f"set{i}" for i in range(10)], ["set3", "set11"], 5)


def test_data_sets_are_spread_evenly_and_named_ones_are_kept() -> None:
    known = [f"set{i}" for i in range(10)]
    assert probing._chosen(known, [], 5) == ["set0", "set2", "set4", "set6", "set8"]
    assert probing._chosen(known, [], 99) == known
    assert probing._chosen(known, ["set7", "set1", "set7"], 5) == ["set7", "set1"]


def test_without_the_extra_it_is_a_sentence(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sae_probes", None)
    done = CliRunner().invoke(app, ["probe", str(trained_run)])
    assert done.exit_code == 2
    assert "pip install 'sae-gated-plugin[probes]'" in done.stderr
    assert "Traceback" not in done.output


def test_the_keys_are_those_of_the_schema() -> None:
    assert PROBE_KEYS == KEYS


@installed
def test_saes_of_different_places_are_refused(trained_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained_run, other, ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((other / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == HOOK_NAME
    config["metadata"]["hook_name"] = "model.layers.1"
    (other / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"model\.layers\.1.*one by one"):
        probe([trained_run, other])
