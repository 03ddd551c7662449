"""`sae-gated encoder-gap` on real runs, against codes whose gap is known, and in the report."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.test_cli import call
from datasets import Dataset
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY, get_sae_class
from sae_lens.saes.sae import SAEMetadata
from support.models import transformer
from support.results_files import result
from support.runs import D_IN, HOOK_NAME, SMALL_RUN

from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.errors import ConfigError
from sae_gated_plugin.measure import encoder_gap
from sae_gated_plugin.measure.activations import read_activations
from sae_gated_plugin.measure.encoder_gap import CODES, GAP_FILE
from sae_gated_plugin.measure.evaluate import evaluate, evaluate_all
from sae_gated_plugin.model.hook_point import HookPoint
from sae_gated_plugin.report.page import write_report
from sae_gated_plugin.report.reading import read_results
from sae_gated_plugin.training.run import train

TOKENS = 4 * 64


@pytest.fixture(scope="module")
def sparse_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two seconds that is sparse from the start, as `trained_run` is not."""
    config = copy.deepcopy(SMALL_RUN)
    config["sae"] = {"architecture": "topk", "d_in": D_IN, "d_sae": 256, "k": 12}
    folder = tmp_path_factory.mktemp("sparse") / "run"
    train(load_config(config, []), folder)
    return folder


@pytest.fixture
def run(sparse_run: Path, tmp_path: Path) -> Path:
    """A copy of the trained run, to write into."""
    return Path(shutil.copytree(sparse_run, tmp_path / "run"))


def saved(run: Path, architecture: str, folder: Path, **options: Any) -> Path:
    """An SAE of another architecture with the trained one's weights, and few active latents."""
    trained = SAE.load_from_disk(run)
    sae_class, config_class = get_sae_class(architecture)
    config = config_class(d_in=D_IN, d_sae=256, metadata=trained.cfg.metadata, **options)
    sae = sae_class(config)
    x = read_activations(trained, 200)
    pre = (sae.run_time_activation_norm_fn_in(x) - trained.b_dec) @ trained.W_enc
    threshold = float(pre.detach().quantile(0.93))
    for name, parameter in sae.named_parameters():
        if name in ("b_enc", "b", "b_gate"):
            parameter.data.fill_(-threshold if architecture != "jumprelu" else 0.0)
        elif name == "threshold":
            parameter.data.fill_(threshold)
    sae.load_state_dict(
        {k: v for k, v in trained.state_dict().items() if k[0] == "W"}, strict=False
    )
    sae.W_dec.data *= torch.linspace(0.5, 2, 256).unsqueeze(1)  # no row of norm 1 by chance
    sae.save_model(folder)
    return folder


def require_ordered(measured: dict[str, Any]) -> None:
    encoder, refitted, pursued = (measured[name] for name in CODES)
    assert encoder["fvu"] >= refitted["fvu"] >= pursued["fvu"] > 0
    assert encoder["l0"] >= max(refitted["l0"], pursued["l0"]) > 0
    shares = measured["shares"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
    assert min(shares.values()) >= 0
    assert shares["dictionary"] == pytest.approx(pursued["fvu"] / encoder["fvu"])


def test_the_whole_command(run: Path) -> None:
    done = call("encoder-gap", run, "--tokens", TOKENS, "--json")
    assert done.exit_code == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured == json.loads((run / GAP_FILE).read_text())
    require_ordered(measured)
    assert measured["tokens"] == TOKENS // 64 * 63
    # What the encoder's own code loses is what `eval` says.
    expected = evaluate(run, tokens=TOKENS)
    for name in ("l0", "fvu", "gamma", "loss_recovered"):
        assert measured["encoder"][name] == pytest.approx(expected[name], rel=1e-6), name
    assert measured["pursuit"]["fvu"] < 0.9 * measured["encoder"]["fvu"]
    # A least-squares fit leaves no shrinkage along x̂, up to the constant b_dec.
    assert measured["refit"]["gamma"] == pytest.approx(1, abs=0.02)
    table = call("encoder-gap", run, "--tokens", 64, "--output", run / "other.json").stdout
    assert "its support, refitted" in table
    assert "Of the encoder's FVU: magnitude" in table
    assert json.loads((run / "other.json").read_text())["tokens"] == 63


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("standard", {"normalize_activations": "layer_norm"}),
        ("standard", {"normalize_activations": "constant_norm_rescale", "dtype": "bfloat16"}),
        ("topk", {"k": 8, "rescale_acts_by_decoder_norm": True}),
        ("topk", {"k": 8, "apply_b_dec_to_input": False}),
        ("jumprelu", {}),
        ("prolu", {}),
        ("gated", {}),
        ("matching_pursuit", {"max_iterations": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_architectures(
    run: Path, tmp_path: Path, hook_point: HookPoint, architecture: str, options: dict[str, Any]
) -> None:
    folder = saved(run, architecture, tmp_path / "other", **options)
    measured = encoder_gap.encoder_gap(folder, model=hook_point.model, tokens=2 * 64)
    require_ordered(measured)
    assert measured["architecture"] == architecture
    # Codes that the encoder gives come out as eval's, so the scale was handled rightly both ways.
    expected = evaluate(folder, model=hook_point.model, tokens=2 * 64)
    rel = 1e-2 if options.get("dtype") == "bfloat16" else 1e-6
    assert measured["encoder"]["fvu"] == pytest.approx(expected["fvu"], rel=rel)


def test_no_token_is_worse_than_its_refit(run: Path, hook_point: HookPoint) -> None:
    sae = SAE.load_from_disk(run)
    x = read_activations(sae, 500)
    with torch.no_grad():
        codes = sae.encode(x).to_dense()
    W, b = sae.W_dec.detach(), sae.b_dec.detach()
    refitted = encoder_gap.refit(x, W, b, codes)
    pursued = encoder_gap.gradient_pursuit(x, W, b, (codes > 0).sum(1))
    found = encoder_gap.search(x, W, b, codes)
    assert (found.squared_residual <= refitted.squared_residual).all()
    assert (found.squared_residual <= pursued.squared_residual).all()
    assert ((found.values > 0).sum(1) <= (codes > 0).sum(1)).all()


def test_a_planted_gap_is_found(run: Path, tmp_path: Path, hook_point: HookPoint) -> None:
    """An orthonormal dictionary of 2 · d_in halves: all error of a halved code is magnitude."""
    sae = SAE.load_from_disk(saved(run, "standard", tmp_path / "exact", apply_b_dec_to_input=False))
    eye = torch.eye(D_IN)
    sae.W_enc.data, sae.W_dec.data = torch.cat([eye, -eye], 1) / 2, torch.cat([eye, -eye])
    sae.b_dec.data.zero_()
    sae.b_enc.data.zero_()
    sae.save_model(tmp_path / "exact")
    measured = encoder_gap.encoder_gap(tmp_path / "exact", model=hook_point.model, tokens=64)
    assert measured["encoder"]["gamma"] == pytest.approx(0.5)
    assert measured["shares"]["magnitude"] == pytest.approx(1, abs=1e-6)
    assert measured["refit"]["loss_recovered"] == pytest.approx(1, abs=1e-4)


def test_attention_heads_are_flattened_for_the_search() -> None:
    model = transformer()
    sae_class, config_class = get_sae_class("standard")
    metadata = {"hook_name": "blocks.0.attn.hook_z", "context_size": 32, "prepend_bos": False}
    sae = sae_class(
        config_class(
            d_in=16, d_sae=48, reshape_activations="hook_z", metadata=SAEMetadata(**metadata)
        )
    )
    rows = encoder_gap._decoder_rows(sae)
    solvers = {"refit": encoder_gap.refit, "pursuit": encoder_gap.search}
    saes = {name: encoder_gap._recoded(sae, rows, solve) for name, solve in solvers.items()}
    tokens = torch.randint(0, 50, (12, 32))
    measured = evaluate_all(
        {"encoder": sae, **saes},
        model=model,
        dataset=Dataset.from_dict({"tokens": tokens.tolist()}),
        tokens=tokens.numel(),
    )
    encoder, refitted, pursued = (measured[name]["fvu"] for name in CODES)
    assert encoder > refitted > pursued
    assert all(each.hook_z_reshaping_mode for each in (sae, *saes.values()))


# --- refusals -------------------------------------------------------------------------------------


def test_refusals_are_one_sentence(run: Path, tmp_path: Path) -> None:
    def refused(*arguments: Any) -> str:
        done = call("encoder-gap", *arguments)
        assert done.exit_code == 2, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return " ".join(done.stderr.split())

    def changed(**metadata: Any) -> Path:
        folder = Path(shutil.copytree(run, tmp_path / f"changed{len(list(tmp_path.iterdir()))}"))
        config = json.loads((folder / "cfg.json").read_text())
        config["metadata"].update(metadata)
        (folder / "cfg.json").write_text(json.dumps(config))
        return folder

    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "names no model" in refused(changed(model_name=None))
    assert "names no dataset" in refused(changed(dataset_path=None))
    assert "no hook_name" in refused(changed(hook_name=None))
    narrow = saved_narrow(run, tmp_path / "narrow")
    assert f"hook point '{HOOK_NAME}' is {D_IN} wide" in refused(narrow)
    if "abstopk" in SAE_CLASS_REGISTRY:  # from 6.53 on
        signed = saved(run, "abstopk", tmp_path / "signed", k=8)
        assert "The codes of this SAE (abstopk) hold negative numbers" in refused(
            signed, "--tokens", 64
        )
    output = tmp_path / "no" / "such" / "folder.json"
    assert "cannot be written" in refused(run, "--tokens", 64, "--output", output)


def saved_narrow(run: Path, folder: Path) -> Path:
    sae_class, config_class = get_sae_class("standard")
    metadata = SAE.load_from_disk(run).cfg.metadata
    sae_class(config_class(d_in=16, d_sae=32, metadata=metadata)).save_model(folder)
    return folder


def test_a_decoder_that_is_not_linear(
    run: Path, hook_point: HookPoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = SAE.load_from_disk(run).__class__.decode
    monkeypatch.setattr(
        SAE.load_from_disk(run).__class__, "decode", lambda self, codes: decode(self, codes) ** 3
    )
    with pytest.raises(encoder_gap.ArtifactError, match=r"this SAE \(topk\) is not linear in its"):
        encoder_gap.encoder_gap(run, model=hook_point.model, tokens=64)
    assert not (run / GAP_FILE).exists()


# --- in the report --------------------------------------------------------------------------------


def gap(encoder: float | None, refitted: float, pursued: float) -> dict[str, Any]:
    codes = zip(CODES, (encoder, refitted, pursued))
    return {name: {"l0": 31.25, "fvu": fvu} for name, fvu in codes}


def test_the_report_draws_it_where_there_is_one(tmp_path: Path) -> None:
    values = {"gated": gap(0.1, 0.09, 0.06), "topk": gap(None, 0.1, 0.1), "standard": None}
    for number, (label, value) in enumerate(values.items()):
        folder = tmp_path / "runs" / str(number)
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(result(label, 3, histograms={})))
        if value:
            (folder / GAP_FILE).write_text(json.dumps(value))
    written = write_report([tmp_path / "runs"], tmp_path / "out")
    (drawn,) = written["encoder_gap"]
    expected = {"l0": 31.25, "magnitude": 0.01, "selection": 0.03, "dictionary": 0.06}
    assert drawn == pytest.approx({"label": "gated", "seed": 3, **expected})
    assert (tmp_path / "out" / "figures" / "encoder_gap.png").exists()
    page = Path(written["page"]).read_text()
    assert page.count("What the error is due to</h3>") == 1
    assert "FVU in three parts for gated, L0 31.2;" in page
    for file in (tmp_path / "runs").rglob(GAP_FILE):
        file.unlink()
    again = write_report([tmp_path / "runs"], tmp_path / "out")
    assert again["encoder_gap"] == []
    assert not (tmp_path / "out" / "figures" / "encoder_gap.png").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"encoder": 1}, "must each hold 'l0' and 'fvu'"),
        (gap("much", 0.1, 0.1), "must be a number or null"),  # pyright: ignore
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, value: Any, message: str) -> None:
    (tmp_path / "results.json").write_text(json.dumps(result()))
    (tmp_path / GAP_FILE).write_text(json.dumps(value))
    with pytest.raises(ConfigError, match=rf"encoder_gap\.json' is not a result: .*{message}"):
        read_results([tmp_path])
