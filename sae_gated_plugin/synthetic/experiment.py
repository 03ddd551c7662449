"""SAEs trained on activations whose true features are known, and held against them.

    training_samples: 400_000                      and the other fields of Training
    synthetic_model: {num_features: 10, hidden_dim: 16, firing_probability: 0.05}
    composites: {groups: [[0, 1], [2, 3]], probability: 0.1}
    sae: {d_sae: 10}                               what the SAEs share
    saes:
      - {label: gated, architecture: gated, l1_coefficient: 0.4}
      - {label: topk, architecture: topk, k: 2}

`synthetic_model` is SAELens's SyntheticModelConfig, or the folder or Hub name of a saved model; a
probability or magnitude is a number or one of SAELens's generators, {generator_name: zipfian,
max_prob: 0.3}. In the place of `saes` may stand a `sweep` with `curves` and `seeds`, as in a
sweep's file: a list stands for alternatives. Seeds are those of the weights; all SAEs see the same
samples in the same order, those of the first seed.

The folder: `toy.yaml`; `saes/NAME/` as SAELens saves an SAE, with `results.json` or a
`failed.json`; where the features are few, every SAE's heatmap `NAME.png`; `toy.json`, all results.
Starting the same again does what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import write_json
from ..sweeps.grid import Sweep
from ..sweeps.stream import streams_of
from ..sweeps.sweep import places_of, run_streams, write_file
from .heatmap import cosine_heatmap
from .stream import SyntheticStream

RESULTS_FILE = "toy.json"
CONFIG_FILE = "toy.yaml"

_COMMON = ("model_name", "num_features", "hidden_dim", "composites", "tokens", "versions")


def run_toy(
    toy: Sweep, output: str | Path, only: Sequence[str] = (), fused_adam: bool | None = None
) -> dict[str, Any]:
    """Train every SAE that is not there yet, measure and draw it; return what `toy.json` holds.

    only: labels of those to do this time, default all. fused_adam: as of `train`.
    An SAE that fails is recorded and the others go on. Raises ConfigError for a folder of other
    SAEs, one that cannot be written, and where all SAEs failed; Interrupted on a signal, when
    everything is saved.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"Output folder '{folder}' is a file; choose another with --output.")
    try:
        places = places_of(toy, folder / "saes", only)
    except ConfigError as error:
        if "another configuration" not in str(error):
            raise
        raise ConfigError(
            f"Output folder '{folder}' already holds a toy; choose another with --output. {error}"
        ) from error
    write_file(folder / CONFIG_FILE, toy.mapping)
    run_streams(streams_of(places, folder, None, SyntheticStream), fused_adam)
    results = [place.outcome() for place in places]
    for place, result in zip(places, results):
        result["name"] = place.point.name
        if "heatmap" in result:
            result["figure"] = f"{place.point.name}.png"
            title = f"{result['label']}: {result['features_found']:.0%} of features found"
            picture = cosine_heatmap(title, result, result["num_features"])
            (folder / result["figure"]).write_bytes(picture)
    measured = [result for result in results if "error" not in result]
    if not measured:
        raise ConfigError(
            f"No SAE could be trained; '{results[0]['label']}': {results[0]['error']} To try again "
            f"with the same configuration, delete '{folder / 'saes'}'."
        )
    common = {key: measured[0][key] for key in _COMMON}
    found = {"path": str(folder), **common, "saes": results}
    write_json(folder / RESULTS_FILE, found)
    return found
