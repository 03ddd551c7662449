"""What a results.json holds, and the versions that measured it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("sae-gated-plugin", "sae-lens", "torch", "transformer-lens", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree
            found[name] = "unknown"
    return found


#: Keys that results have besides the registered metrics: no metric may take their place.
# fmt: off
RESULT_KEYS = frozenset((
    "architecture", "d_in", "d_sae", "model_name", "hook_name", "dataset", "tokens",
    "training_tokens", "l1_coefficient", "target_l0", "loss_recovered", "nats_lost", "kl",
    "coherence", "coherence_top", "babel", "undefined", "histograms", "split", "path", "seconds",
    "versions", "label", "seed", "settings", "figure", "true_l0", "mmcs_features", "mmcs_latents",
    "features_found", "feature_precision", "firing_recall", "firing_precision",
    "composites_found", "b_dec_norm", "matches", "heatmap",
))
# fmt: on
