"""How long sparse codes on a fixed decoder take, against the matrix products they cannot avoid.

    python benchmarks/sparse_coding.py                     # 100,000 tokens: gradient pursuit alone
    python benchmarks/sparse_coding.py --tokens 2000 --methods gradient_pursuit refit fista

Activations are sums of l0 decoder rows and noise. The floor is l0 products of the residuals with
the decoder, as one matrix product each on blocks of the same size, timed in the same process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sae_gated_plugin.sparse_coding.fista import fista
from sae_gated_plugin.sparse_coding.problem import refit
from sae_gated_plugin.sparse_coding.pursuit import gradient_pursuit, matching_pursuit


def problem(n: int, d_in: int, d_sae: int, l0: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(d_sae, d_in, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    x = 0.1 * torch.randn(n, d_in, generator=generator)
    for _ in range(l0):
        latents = torch.randint(d_sae, (n,), generator=generator)
        x += W_dec[latents] * 3 * torch.rand(n, 1, generator=generator)
    return x.to(device), W_dec.to(device), torch.zeros(d_in, device=device)


def seconds(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Wall and processor time; they differ where the machine is busy with other things."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--l0", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+", default=["gradient_pursuit"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    n, l0, device = options.tokens, options.l0, options.device
    x, W, b = problem(n, options.d_in, options.d_sae, l0, device)

    def floor() -> None:
        for block in x[: min(n, 2000)].split(max(1, 2**20 // len(W))):
            for _ in range(l0):
                block @ W.T

    def start() -> Tensor:  # a TopK encoder's codes, half as long as they should be
        best = (x @ W.T).topk(l0)
        codes = torch.zeros(n, len(W), device=device)
        return codes.scatter_(1, best.indices, best.values.clamp(min=0) / 2)

    runs: dict[str, Callable[[], object]] = {
        "gradient_pursuit": lambda: gradient_pursuit(x, W, b, l0),
        "matching_pursuit": lambda: matching_pursuit(x, W, b, l0),
        "exchanges": lambda: gradient_pursuit(x, W, b, l0, start=start()),
        "refit": lambda: refit(x, W, b, start()),
        "fista": lambda: fista(x, W, b, 0.5),
    }
    gradient_pursuit(x[:64], W, b, 4)  # libraries load
    least = tuple(value * n / min(n, 2000) for value in seconds(floor, device))
    rows = {"floor": least, **{name: seconds(runs[name], device) for name in options.methods}}
    if options.json:
        keys = ("seconds", "processor_seconds")
        print(json.dumps({name: dict(zip(keys, row)) for name, row in rows.items()}, indent=2))
        return
    print(f"{n:,} tokens, d_in {options.d_in}, d_sae {options.d_sae}, L0 {l0}, float32, {device}\n")
    print("| method | s | processor s | times the floor (processor) | ms per token |")
    print("|---|---|---|---|---|")
    for name, (wall, processor) in rows.items():
        ratio = processor / least[1]
        print(f"| {name} | {wall:.1f} | {processor:.1f} | {ratio:.2f} | {wall / n * 1e3:.2f} |")
    print(f"\ntorch {torch.__version__}, {options.threads} threads")


if __name__ == "__main__":
    main()
