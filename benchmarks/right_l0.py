"""Do the proxies for the right L0 of arXiv 2508.16560 find it where it is known? On synthetic data.

    python benchmarks/right_l0.py --output runs/right_l0

Trains SAEs of `configs/synth_small.yaml`'s model over a range of L0, and prints beside F1 and MCC,
which need the true features, the paper's two proxies, which do not. Both should be lowest where
the features are found best: c_dec, the mean |cosine| of two decoder rows, and s_n, the n-th largest
projection of a token on decoder rows: of all (x - b_dec) W_dec^T of N tokens, the (n N)-th largest.
"""

from __future__ import annotations

import argparse

import torch

from sae_gated_plugin.config.yaml import read_yaml
from sae_gated_plugin.saes.load import load_sae
from sae_gated_plugin.synthetic.config import load_toy
from sae_gated_plugin.synthetic.experiment import run_toy
from sae_gated_plugin.synthetic.model import open_model

L0S = [2, 4, 6, 8, 12, 20]


@torch.no_grad()
def proxies(sae: object, x: torch.Tensor, ns: list[int]) -> list[float]:
    """c_dec, and s_n for each n."""
    rows = torch.nn.functional.normalize(sae.W_dec, dim=1)
    cosines = (rows @ rows.T).abs()
    c_dec = (cosines.sum() - cosines.trace()) / (len(rows) * (len(rows) - 1))
    projections = ((x - sae.b_dec) @ rows.T).flatten().sort(descending=True).values
    return [c_dec.item(), *(projections[n * len(x)].item() for n in ns)]


def main() -> None:
    """Train, measure and print one line per SAE."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/synth_small.yaml")
    parser.add_argument("--output", required=True)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    mapping = read_yaml(arguments.config)
    labels = {"gated": "target_l0", "SAELens's batchtopk": "k"}
    curves = [c for c in mapping["sweep"]["curves"] if c["label"] in labels]
    for curve in curves:
        curve[labels[curve["label"]]] = L0S
    mapping["sweep"] = {"seeds": [0], "curves": curves}
    toy = load_toy(mapping, arguments.overrides)
    saes = run_toy(toy, arguments.output)["saes"]
    model, _ = open_model(toy.points[0].config)
    torch.manual_seed(1)
    x = model.sample(2048)
    d_sae = saes[0]["d_sae"]
    ns = [d_sae // 16, d_sae // 8, d_sae // 4, d_sae // 2]
    heads = ["L0", "F1", "MCC", "c_dec", *(f"s_{n}" for n in ns)]
    print(f"{'':22}" + "".join(f"{head:>9}" for head in heads))
    for sae in saes:
        if "error" in sae:
            print(f"{sae['label']:22}{sae['settings']}: {sae['error']}")
            continue
        found = [sae["l0"], sae["f1"], sae["mcc"], *proxies(load_sae(sae["path"]), x, ns)]
        print(f"{sae['label']:22}" + "".join(f"{value:9.4f}" for value in found))


if __name__ == "__main__":
    main()
