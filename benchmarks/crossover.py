"""Where the sparse form stops paying: one training step in both forms over a range of densities.

    python benchmarks/crossover.py
    python benchmarks/crossover.py --autocast

`cost.CROSSOVER_DENSITY` for the CPU is read off the first table: the ratio hardly depends on the
shape, since both forms' costs grow with d_in, and the sparse one's with the number of active
entries. `cost.HALF_CROSSOVER` is read off the second, on a CPU with fast bfloat16: there the dense
form's products cost so little that it hardly grows with d_in. The last column is where `auto` takes
the other form; on CUDA `cost.break_even` says so.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import torch
from train_step import activations, build, forward_backward, interleaved

from sae_gated_plugin.core import choice, cost

SHAPES = [(576, 4608, 4096), (128, 2048, 4096), (768, 16384, 2048)]
DENSITIES = [0.01, 0.02, 0.04, 0.06, 0.08, 0.12, 0.2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--autocast", action="store_true", help="bfloat16 products")
    options = parser.parse_args()
    print("seconds of the sparse form / seconds of the dense form\n")
    heads = [f"{d:.0%}" for d in DENSITIES] + ["expected"]
    print("| d_in x d_sae, batch | " + " | ".join(heads) + " |")
    print("|---|" + "---|" * len(heads))
    for d_in, d_sae, batch in SHAPES:
        ratios = []
        for density in DENSITIES:
            args = SimpleNamespace(
                d_in=d_in,
                d_sae=d_sae,
                batch=batch,
                density=density,
                processor_time=False,
                **vars(options),
            )
            x = activations(args)  # pyright: ignore
            steps = {
                form: forward_backward(build(f"plugin.gated.{form}", args, x), x, args.autocast)  # pyright: ignore
                for form in ("sparse", "dense")
            }
            seconds = interleaved(steps, args)  # pyright: ignore
            ratios.append(f"{seconds['sparse'] / seconds['dense']:.2f}")
        if options.device == "cpu":
            expected = choice.sparse_below("cpu", d_in, options.autocast)
        else:
            expected = cost.crossover(x, x.new_empty(d_in, d_sae), half=options.autocast)
        cells = [*ratios, f"{expected:.1%}"]
        print(f"| {d_in} x {d_sae}, {batch} | " + " | ".join(cells) + " |", flush=True)
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
