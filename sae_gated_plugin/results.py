"""What a results.json holds: its measures, how people see them, and the versions that measured it.

Reports, cards and tables take names and formats from here. Nothing here loads a model.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

Direction = Literal["up", "down"]

#: What `sae-gated encoder-gap` writes beside results.json, and a report reads there.
GAP_FILE = "encoder_gap.json"


@dataclass(frozen=True)
class Measure:
    """A number in results.json and how it is shown.

    title: its name and unit in a list of measures. heading: its name over a column. format: a
    format specification such as ".2%". direction: where better numbers lie, None where neither.
    """

    key: str
    title: str
    heading: str
    format: str = ".4g"
    direction: Direction | None = None

    def __post_init__(self) -> None:
        for what, text in (("title", self.title), ("heading", self.heading)):
            given: Any = text  # a plugin may pass anything
            if not isinstance(given, str) or not given or not given.isprintable():
                raise ValueError(f"the {what} must be printable text, not {given!r}")
        try:
            format(0.5, self.format)
        except (ValueError, TypeError):
            raise ValueError(
                f"the format {self.format!r} does not fit numbers; try '.4g'"
            ) from None
        if self.direction not in (None, "up", "down"):
            raise ValueError(f"the direction must be 'up', 'down' or None, not {self.direction!r}")

    def text(self, value: float | None) -> str:
        """The value as people see it; "none" where it is undefined."""
        return "none" if value is None else format(value, self.format)


#: How many latents a sparse probe reads: one, few, and as many as sae-probes recommends at most.
PROBE_KS = (1, 5, 16)


def probe_key(k: int | str) -> str:
    """The key in results.json of probes with k latents, or "raw"."""
    return f"probe_auc_{k}"


PROBE_KEYS = tuple(map(probe_key, (*PROBE_KS, "raw")))

#: The measures that this package makes, by their key in results.json, in the order of tables.
# fmt: off
MEASURES = {measure.key: measure for measure in (
    Measure("l0", "L0, active latents per token", "L0", ".1f"),
    Measure("fvu", "FVU, variance unexplained", "FVU", ".4f", "down"),
    Measure("gamma", "γ, below 1 is shrinkage", "γ", ".4f"),
    Measure("gamma_centered", "γ about the mean", "γ about the mean", ".4f"),
    Measure("loss_recovered", "loss recovered", "loss recovered", ".2%", "up"),
    Measure("nats_lost", "nats lost per token", "nats lost", ".4f", "down"),
    Measure("kl", "KL to the original model, nats", "KL", ".4f", "down"),
    Measure("dead_share", "dead latents", "dead latents", ".2%", "down"),
    Measure("coherence", "largest cosine similarity of decoder rows", "coherence", ".4f", "down"),
    Measure("coherence_top", "the same, mean of the top 1 % of rows", "top 1 %", ".4f", "down"),
    Measure("babel", "Babel function of the rows, k = 32", "Babel", ".2f", "down"),
    Measure("l1_coefficient", "λ at the end, SAELens's units", "λ"),
    # Of probes with the k best latents, and of one on all of the raw activations:
    *(Measure(probe_key(k), f"AUC of {k}-sparse probes", f"AUC k = {k}", ".3f", "up")
      for k in PROBE_KS),
    Measure(probe_key("raw"), "AUC of probes on raw activations", "AUC raw", ".3f", "up"),
    # Of data whose true features are known:
    Measure("f1", "F1 of latents as detectors", "F1", ".3f", "up"),
    Measure("precision", "precision of the same", "precision", ".3f", "up"),
    Measure("recall", "recall of the same", "recall", ".3f", "up"),
    Measure("mcc", "MCC of latents and features", "MCC", ".3f", "up"),
    Measure("uniqueness", "distinct nearest features per latent", "uniqueness", ".3f", "up"),
    Measure("explained_variance", "explained variance", "explained variance", ".4f", "up"),
    Measure("shrinkage", "norm of output over input", "norm ratio", ".4f"),
    Measure("features_found", "true features found", "found", ".0%", "up"),
    Measure("composites_found", "composites found", "composites", ".0%"),
    Measure("firing_precision", "precision of firing", "firing precision", ".0%", "up"),
    Measure("firing_recall", "recall of firing", "firing recall", ".0%", "up"),
)}

#: Keys that results have: no plugin's metric may take their place.
RESULT_KEYS = frozenset((
    *MEASURES,
    "architecture", "d_in", "d_sae", "model_name", "hook_name", "dataset", "tokens",
    "training_tokens", "target_l0", "undefined", "notes", "histograms", "split", "path", "seconds",
    "versions", "label", "seed", "settings", "figure", "true_l0", "mmcs_features", "mmcs_latents",
    "feature_precision", "b_dec_norm", "matches", "heatmap", "num_features", "hidden_dim",
    "composites", "lr", "name", "prefixes",
)) - {"gamma", "gamma_centered", "l0", "fvu", "dead_share"}  # these are registered metrics
# fmt: on


def setting_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """What tells an SAE from the others of its label: its settings, else its target, else its λ."""
    if results.get("settings"):
        return dict(results["settings"])
    for key in ("target_l0", "l1_coefficient"):
        if results.get(key) is not None:
            return {key: results[key]}
    return {}


#: Fewer active latents than this are none. Not 0: some tokens have activations so large that they
#: are the last to find no latent.
NO_LATENTS = 0.1

#: How far L0 may end from `target_l0`, as a share of it. RESULTS.md counts ± 5 % in training as
#: reached, and on held-out text L0 is up to 3 % higher.
TARGET_TOLERANCE = 0.1


def shortcomings(results: Mapping[str, Any]) -> dict[str, str]:
    """In what an SAE is not what it was meant to be: a sentence by the measure that shows it."""
    l0, target = results.get("l0"), results.get("target_l0")
    if l0 is None:
        return {}
    if l0 < NO_LATENTS:
        return {
            "l0": "Next to no latent is active on any token: nothing was learned. Lower lr or "
            "l1_coefficient, or set dead_latents=resample."
        }
    if not target or abs(l0 - target) <= TARGET_TOLERANCE * target:
        return {}
    if results.get("l1_coefficient") is None:  # SAELens's jumprelu
        advice = (
            "jumprelu's quadratic loss pulls L0 there, against the reconstruction: train longer, "
            "raise l0_coefficient, or widen jumprelu_bandwidth."
        )
    else:
        advice = (
            "λ moves only after l1_warm_up_steps, then for some hundred steps: train longer, or "
            "begin with an l1_coefficient nearer to the last λ."
        )
    return {"l0": f"target_l0 was {target:g} and is missed. {advice}"}


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("sae-gated-plugin", "sae-lens", "torch", "transformer-lens", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree
            found[name] = "unknown"
    return found
