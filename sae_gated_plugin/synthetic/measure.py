"""What an SAE found of the known features."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.synthetic import ActivationGenerator, SyntheticModel, eval_sae_on_synthetic_data
from sae_lens.util import cosine_similarities
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..errors import UndefinedMetric
from ..metrics.batch import Batch
from ..metrics.registered import registered_metrics

#: A feature is found by a latent of its own whose cosine with it is above this.
FOUND = 0.95

#: Cosines of latents with directions that results.json has in full, and a heatmap can show.
MOST_DRAWN = 2**17
_BENCHMARK = ("mcc", "uniqueness", "explained_variance", "shrinkage")
_UNDEFINED = {
    "feature_precision": "No latent fires.",
    "firing_recall": "No feature fires.",
    "firing_precision": "No latent that is matched with a feature fires.",
    "composites_found": "There are no composites.",
}


def match_features(cosines: Tensor) -> Tensor:
    """Pair columns with rows one to one so that the sum of their cosines is the largest possible.

    cosines: (rows, columns). Returns (columns,) int64, each column's row, or -1 where none is left.
    """
    rows, columns = linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
    row_of = torch.full((cosines.shape[1],), -1, device=cosines.device)
    row_of[torch.from_numpy(columns)] = torch.from_numpy(rows).to(cosines.device)
    return row_of


class Drawn:
    """Feature activations that are drawn once and given out to one SAE after another.

    Kept sparse: of 16,384 features a few dozen are active. Sampling takes longer than measuring.
    """

    def __init__(self, generator: ActivationGenerator, samples: int, batch_size: int):
        sizes = [min(batch_size, samples - start) for start in range(0, samples, batch_size)]
        self._batches = [generator.sample(size).to_sparse() for size in sizes]

    def __iter__(self) -> Iterator[Tensor]:
        """Batches (N, num_features), dense."""
        return (batch.to_dense() for batch in self._batches)

    def as_generator(self) -> Any:
        """As SAELens asks its generator for them: `sample(N)`, batch after batch."""
        batches = iter(self)

        def sample(_: int) -> Tensor:
            return next(batches)

        return SimpleNamespace(sample=sample)


@torch.no_grad()
def measure_toy(
    sae: SAE[Any],
    model: SyntheticModel,
    members: Tensor,
    samples: int,
    batch_size: int,
    drawn: Drawn | None = None,
) -> dict[str, Any]:
    """Hold an SAE against the true features, on `samples` activations drawn from the model.

    drawn: the activations of features, where they are drawn already.

    Cosines are between decoder rows and true directions, with their sign. A latent fires where its
    activation is not zero; firing is compared between each feature and the latent matched with it,
    whether that is near it or not, and averaged over features. The benchmark's own measures are
    SAELens's `eval_sae_on_synthetic_data`, on the same samples: f1, precision and recall of every
    latent as a detector of the feature nearest to it, mcc, uniqueness, explained_variance and
    shrinkage. Returns what `results.json` says of an SAE, shares in [0, 1]; what is undefined is
    None, with the reason in "undefined"; cosines, matches and heatmap only up to MOST_DRAWN.
    """
    drawn = drawn or Drawn(model.activation_generator, samples, batch_size)
    benchmark = eval_sae_on_synthetic_data(
        sae, model.feature_dict, drawn.as_generator(), samples, batch_size
    )
    features = model.feature_dict.feature_vectors
    composites = (members * model.activation_generator.mean_firing_magnitudes) @ features
    directions = torch.cat([features, composites])
    cosines = cosine_similarities(sae.W_dec, directions)
    of_features, of_composites = cosines.split([len(features), len(composites)], dim=1)
    latent_of, cosine = _matched(of_features)
    _, composite_cosine = _matched(of_composites)

    metrics = registered_metrics()
    device = sae.W_dec.device
    fired = torch.zeros(
        3, len(features), device=device
    )  # samples: the feature, its latent, both at once
    alive = torch.zeros(len(cosines), dtype=torch.bool, device=device)
    for feature_acts in drawn:
        x = model.feature_dict(feature_acts)
        acts = sae.encode(x)
        for metric in metrics.values():
            metric.update(Batch(x, sae.decode(acts), acts))
        feature, latent = feature_acts > 0, (acts != 0)[:, latent_of] & (latent_of >= 0)
        fired += torch.stack([feature.sum(0), latent.sum(0), (feature & latent).sum(0)])
        alive |= (acts != 0).any(0)
    recall, precision = fired[2] / fired[0], fired[2] / fired[1]  # NaN where nothing fires
    found = cosine > FOUND

    values: dict[str, Any] = {}
    undefined: dict[str, str] = {}
    for name, metric in metrics.items():
        try:
            values[name] = metric.compute()
        except UndefinedMetric as error:
            values[name], undefined[name] = None, str(error)
    values.update(
        true_l0=fired[0].sum().item() / samples,
        mmcs_features=of_features.amax(0).mean().item(),
        mmcs_latents=of_features.amax(1).mean().item(),
        features_found=found.double().mean().item(),
        feature_precision=_number((found & alive[latent_of]).sum() / alive.sum()),
        firing_recall=_number(recall.nanmean()),
        firing_precision=_number(precision.nanmean()),
        composites_found=_number((composite_cosine > FOUND).double().mean()),
        b_dec_norm=sae.b_dec.norm().item(),
        f1=benchmark.classification.f1_score,
        precision=benchmark.classification.precision,
        recall=benchmark.classification.recall,
        **{name: getattr(benchmark, name) for name in _BENCHMARK},
    )
    undefined |= {name: why for name, why in _UNDEFINED.items() if values[name] is None}
    for name in [name for name in _BENCHMARK if not math.isfinite(values[name])]:
        values[name], undefined[name] = None, "SAELens gives no finite number."
    if cosines.numel() > MOST_DRAWN:
        return {**values, "undefined": undefined}
    order = _drawn_order(cosines)
    return {
        **values,
        "undefined": undefined,
        "matches": {
            "latent": [row if row >= 0 else None for row in latent_of.tolist()],
            "cosine": [_number(value) for value in cosine],
            "firing_recall": [_number(value) for value in recall],
            "firing_precision": [_number(value) for value in precision],
        },
        "heatmap": {
            "latents": order,
            "dead": [row for row in order if not alive[row]],
            "cosines": [[round(c, 4) for c in row] for row in cosines[order].tolist()],
            "bias": [
                round(c, 4) for c in cosine_similarities(sae.b_dec[None], directions)[0].tolist()
            ],
        },
    }


def _matched(cosines: Tensor) -> tuple[Tensor, Tensor]:
    """Each column's row by `match`, and its cosine there, NaN where it has none."""
    row_of = match_features(cosines)
    cosine = cosines[row_of, torch.arange(len(row_of), device=row_of.device)]
    return row_of, torch.where(row_of >= 0, cosine, torch.nan)


def _drawn_order(cosines: Tensor) -> list[int]:
    """Latents by the column they are matched with, then the others by their nearest column."""
    matched = [row for row in match_features(cosines).tolist() if row >= 0]
    nearest = cosines.argmax(1).argsort(stable=True).tolist()
    return matched + [row for row in nearest if row not in set(matched)]


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()
