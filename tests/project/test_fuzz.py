"""Configurations and YAML, mangled: right, or refused in a sentence.

How to run many: see mangling.py.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example
from hypothesis import strategies as st
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from support.mangling import FIELDS, JUNK, TEXT, fuzz, mutated, nudged, paths, sentence, spliced

from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.config.yaml import MOST_VALUES, _Loader, read_yaml, to_yaml
from sae_gated_plugin.errors import ConfigError, SaeGatedError
from sae_gated_plugin.sweeps.grid import load_sweep
from sae_gated_plugin.synthetic.config import load_toy
from sae_gated_plugin.synthetic.model import open_model

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore"),  # of SAELens's configurations, and of failing plugins
]


# --- configurations -------------------------------------------------------------------------------

SHARED: dict[str, Any] = {
    "model_name": "m", "dataset_path": "text", "context_size": 64, "seqpos_slice": [1, None],
    "n_batches_in_buffer": 128, "training_tokens": 100_000, "lr": 1e-3, "verbose": False,
    "model_from_pretrained_kwargs": {"revision": "x"}, "logger": {"log_to_wandb": False},
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "gated": {"target_l0": 3.0, "dead_latents": "resample", "resample_steps": [5, 9]},
    "prolu": {"l1_coefficient": 2, "l1_warm_up_steps": 3, "gradient": "relu"},
    "mlp_encoder": {"d_hidden": 9, "decoder_coherence": 0.1, "decoder_coherence_cap": 0.4},
    "topk": {"k": 3},
    "jumprelu": {"l0_coefficient": 2.0},
    "matryoshka_batchtopk": {"k": 3, "matryoshka_widths": [4, 16]},
}
RUNS = [
    {**SHARED, "sae": {"architecture": name, "d_in": 8, "d_sae": 16, **OWN.get(name, {})}}
    for name in sorted(SAE_TRAINING_CLASS_REGISTRY)
    if name != "rescale_shift"
]
#: What a number must be, said here once more: (least, most).
LIMITS = {
    **dict.fromkeys(("d_in", "d_sae", "k", "context_size", "training_tokens"), (1, 2**63 - 1)),
    **dict.fromkeys(("l1_warm_up_steps", "n_checkpoints", "lr_warm_up_steps"), (0, 2**63 - 1)),
    **dict.fromkeys(("l1_coefficient", "l0_coefficient", "auxk_coefficient"), (0, math.inf)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, math.nextafter(1, 0))),
    **dict.fromkeys(("resample_share", "activations_mixing_fraction"), (0, 1)),
    **dict.fromkeys(("lr", "target_l0"), (5e-324, math.inf)),
}


def require_held(mapping: dict[str, Any], runner: Any) -> None:
    """Every value of the mapping is what the configuration holds, in type and number."""
    for prefix, config in (("", runner), ("sae", runner.sae), ("logger", runner.logger)):
        for name, value in (mapping.get(prefix) or {} if prefix else mapping).items():
            if name in ("sae", "logger", "architecture") or value is None:
                continue
            held = getattr(config, name)
            if name == "checkpoint_path":
                held = held.rpartition("/")[0]
            held = list(held) if isinstance(held, tuple) else held
            if isinstance(value, str) and value.startswith("~") and held != value:
                assert held == os.path.expanduser(value), name
                continue
            assert held == value, name
            assert isinstance(held, bool) == isinstance(value, bool), name
            assert isinstance(held, str) == isinstance(value, str), name
            if isinstance(held, int | float):
                assert math.isfinite(held), name
                low, high = LIMITS.get(name, (-math.inf, math.inf))
                assert low <= held <= high, name
    assert runner.sae.architecture() == mapping["sae"]["architecture"]


@fuzz("configuration", mutated(RUNS, FIELDS))
@example({**RUNS[0], "model_name": "~~~x//y"})
def test_configurations(run: dict[str, Any]) -> None:
    loaded = sentence(lambda: load_config(run))
    if loaded:
        require_held(run, loaded.runner)
        loaded.to_yaml().encode()


VALUES = ["1", "-1", "0.5", "true", ".nan", "1e999", "null", "[1, 2]", "{a: 1}", "{1: 2}", "maybe"]
VALUES += [
    "!!bool x",
    "!!set {a}",
    "!!binary aGk=",
    '"\\ud800"',
    "*a",
    "[" * 60,
    "2000-01-01",
    "' '",
]
KEYS = st.sampled_from(FIELDS) | TEXT
OVERRIDES = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["", "sae.", "logger.", "sae.sae.", " ", ".", "model_kwargs."]),
    KEYS,
    st.sampled_from(["=", "=", "=", "", " = ", "=="]),
    st.sampled_from(VALUES) | TEXT,
)


@st.composite
def fitting(draw: Any) -> str:
    """An override of something that most of the runs have, by a value of the same kind."""
    known = [way for way in paths(RUNS[0]) if "architecture" not in way]
    way = draw(st.sampled_from(known))
    value = functools.reduce(lambda inner, step: inner[step], way, RUNS[0])
    text = yaml.safe_dump(draw(nudged(value)), default_flow_style=True).removesuffix("...\n")
    return f"{'.'.join(map(str, way))}={text.strip()}"


@fuzz(
    "override",
    st.sampled_from(RUNS),
    st.lists(fitting() | fitting() | OVERRIDES, min_size=1, max_size=3),
)
@example(RUNS[0], ["a." * 2000 + "b=1"])
@example(RUNS[0], ["model_kwargs={a: !!binary aGk=}"])
@example(RUNS[0], ["context_size=1e30"])
@example(RUNS[0], ["training_tokens=1e308"])
@example(RUNS[0], ["device=warp"])
@example(RUNS[0], ["adam_beta1=-0.5"])
@example(RUNS[0], ["\n\x1b[2J=3"])
@example(RUNS[0], ["model_kwargs.\x850=1"])
@example(RUNS[0], ["model_name=~0"])
@example(RUNS[0], ["dataset_path='~'"])
@example(RUNS[3], ["sae.k=17"])
def test_overrides(run: dict[str, Any], overrides: list[str]) -> None:
    loaded = sentence(lambda: load_config(run, overrides))
    if loaded:
        require_held(loaded.mapping, loaded.runner)
        again = load_config(yaml.load(loaded.to_yaml(), _Loader))
        assert again.mapping == loaded.mapping


SWEEP = {
    **SHARED,
    "sae": {"d_in": 8, "d_sae": 16},
    "sweep": {
        "seeds": [0, 1],
        "eval_tokens": 100,
        "curves": [
            {"label": "a", "architecture": "gated", "l1_coefficient": [1, 2]},
            {"architecture": "topk", "k": [1, 2], "lr": 0.1},
        ],
    },
}


HUGE = {"architecture": "gated", **{f"x{i}": list(range(1000)) for i in range(10)}}


@fuzz("sweep", mutated([SWEEP], [*FIELDS, "seeds", "curves", "sweep", "label", "architecture"]))
@example({**SWEEP, "sweep": {"curves": [HUGE]}})
@example({**SWEEP, "sae": 3})
@example({**SWEEP, "sweep": {"curves": [{"architecture": "gated", "label": "x" * 300}]}})
@example({**SWEEP, "sweep": {"curves": [{"architecture": "gated", "label": " "}]}})
def test_sweeps(sweep: dict[str, Any]) -> None:
    loaded = sentence(lambda: load_sweep(sweep))
    if loaded:
        assert all(isinstance(point.label, str) for point in loaded.points)
        for point in loaded.points:
            assert point.seed == point.config.runner.seed
            require_held(point.config.mapping, point.config.runner)
            assert len(point.name.encode()) < 255
            assert "/" not in point.name


TOY = {
    "training_samples": 1000,
    "seed": 1,
    "synthetic_model": {
        "num_features": 6, "hidden_dim": 8, "firing_probability": 0.1, "std_firing_magnitudes": 0.2,
        "mean_firing_magnitudes": {"generator_name": "linear", "start": 1.0, "end": 2.0},
        "correlation": {"rank": 2},
        "orthogonalization": {"num_steps": 2},
    },
    "composites": {"groups": [[0, 1], [2, 3]], "probability": 0.1},
    "sae": {"d_sae": 6},
    "saes": [{"label": "g", "architecture": "gated"}, {"architecture": "topk", "k": 2}],
}  # fmt: skip


@fuzz("toy", mutated([TOY], [*FIELDS, "groups", "hierarchy", "bias", "saes", "label"]))
@example({**TOY, "synthetic_model": {"num_features": 10**6, "hidden_dim": 10**6}})
@example({**TOY, "synthetic_model": {**TOY["synthetic_model"], "firing_probability": 10**400}})
@example({**TOY, "saes": [{"label": "", "architecture": "gated"}]})
def test_toys(given_: dict[str, Any]) -> None:
    loaded = sentence(lambda: load_toy(given_))
    if loaded:
        for name in ("training_samples", "seed", "lr", "eval_samples", "batch_size"):
            value = given_.get(name)
            for point in loaded.points:
                assert value is None or getattr(point.config.training, name) == value, name
        assert all(isinstance(point.label, str) and point.label for point in loaded.points)
        opened = sentence(lambda: open_model(loaded.points[0].config))
        if opened:
            model, members = opened
            assert model.activation_generator.firing_probabilities.isfinite().all()
            assert members.sum(1).tolist() == [
                len(group) for group in (given_.get("composites") or {}).get("groups", [])
            ]


# --- YAML -----------------------------------------------------------------------------------------

VALID = yaml.safe_dump(RUNS[0]).encode()
PIECES = [
    "a: ", "- ", "? ", "&x ", "*x", "<<: *x", "[", "]", "{", "}", "|\n ", ">\n ", "\t", "\n", "  ",
    "!!int x", "!!bool x", "!!timestamp x", "!!float ", "!!null x", "!!set {a}", "!!omap [a: 1]",
    "!!binary x", "!!python/object:os.system x", "'", '"', '"\\ud800"', "1e999", "0x1f", "---\n",
    "...\n", "%YAML 9\n", "%TAG ! x\n", "#", ",", "1:30", "a" * 300, "9" * 5000, "\u2028", "\ufeff",
    "\x00", "~", "=",
]  # fmt: skip


def bomb(width: int, depth: int) -> bytes:
    lines = ["a0: &a0 [" + "x, " * width + "]"]
    lines += [f"a{i}: &a{i} [{f'*a{i - 1}, ' * width}]" for i in range(1, depth)]
    return "\n".join(lines).encode()


NESTING = st.sampled_from([b"[", b"- ", b"{", b"a: {", b"? "])
YAML = st.one_of(
    st.binary(max_size=60),
    st.lists(st.sampled_from(PIECES), max_size=14).map(lambda pieces: "".join(pieces).encode()),
    st.builds(bomb, st.integers(1, 9), st.integers(1, 40)),
    st.builds(lambda piece, times: piece * times, NESTING, st.integers(1, 3000)),
    st.dictionaries(TEXT, JUNK, max_size=3).map(lambda tree: yaml.safe_dump(tree).encode()),
    mutated([RUNS[0]], FIELDS).map(lambda run: yaml.safe_dump(run).encode()),
    spliced([VALID], [piece.encode() for piece in PIECES]),
)


@fuzz("YAML", YAML)
@example(bomb(9, 30))
@example(b"a: &a {b: *a}")
@example(b"a: !!bool maybe")
@example(b"a: !!int ''")
@example(b"a: !!timestamp x")
@example(b'a: "\\ud800"')
@example(b"a: 1\n" * 200_000)
@example(b"a: &x {b: 1}\nc: *x")
def test_yaml(place: Path, content: bytes) -> None:
    path = place / "any.yaml"
    path.write_bytes(content)
    value = sentence(lambda: read_yaml(path), ConfigError)
    if value is not None:
        assert len(paths(value)) <= MOST_VALUES
        path.write_text(to_yaml(value), encoding="utf-8")
        again = read_yaml(path)
        assert repr(again) == repr(value)  # by repr, for NaN
        with contextlib.suppress(SaeGatedError):
            load_config(path)
