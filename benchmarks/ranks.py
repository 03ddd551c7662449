"""One SAE on 1, 2, 4, … processes: peak memory of each against the account, and the same loss.

    python benchmarks/ranks.py                             # on CPUs by gloo, on GPUs by NCCL
    python benchmarks/ranks.py --d-in 4096 --d-sae 131072  # for GPUs

Memory is what a process has at most from when its share of the SAE is built: on a GPU torch's own
peak, on a CPU what the kernel counts beyond what the process held before it built anything.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput

import sae_gated_plugin
from sae_gated_plugin.distributed.state import shard
from sae_gated_plugin.training.needs import COPIES, bytes_per_step


def resident(what: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    return 0


def on_rank(rank: int, size: int, args: argparse.Namespace, folder: Path) -> None:
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{folder}/{size}", rank=rank, world_size=size
    )
    config = sae_gated_plugin.GatedTrainingSAEConfig(
        d_in=args.d_in, d_sae=args.d_sae, backend="sparse", l1_coefficient=1.0
    )
    torch.manual_seed(0)
    batches = 0.1 * torch.randn(args.steps, args.batch, args.d_in)
    before = resident("VmRSS")
    sae: Any = sae_gated_plugin.GatedTrainingSAE(config)
    with torch.no_grad():
        sae.b_gate.fill_(-0.25)  # few latents are active, as after the first steps
    sae = shard(sae, rank, size).to(device)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4)
    dead = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=device)
    seconds: list[float] = []
    for number, batch in enumerate(batches):
        began = time.perf_counter()
        output = sae.training_forward_pass(
            TrainStepInput(batch.to(device), {"l1": 1.0}, dead, number, False)
        )
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = output.loss.item()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM") - before
    numbers = {"peak": peak, "loss": loss, "seconds": min(seconds)}
    numbers["l0"] = float(sae.shards.total(output.feature_acts.bool().float().sum()) / args.batch)
    (folder / f"{size}-{rank}.json").write_text(json.dumps(numbers))
    dist.barrier()
    dist.destroy_process_group()


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of processes: the largest peak of its ranks."""
    rows: list[dict[str, Any]] = []
    parameters = 2 * args.d_in * args.d_sae + 3 * args.d_sae
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            options = (size, args, Path(folder))
            torch.multiprocessing.spawn(on_rank, options, nprocs=size)
            ranks = [json.loads(file.read_text()) for file in Path(folder).glob("*.json")]
        config = sae_gated_plugin.GatedTrainingSAEConfig(d_in=args.d_in, d_sae=args.d_sae)
        sae = sae_gated_plugin.GatedTrainingSAE(config) if not rows else None
        sent = bytes_per_step(sae, args.batch) if sae is not None else rows[0]["sent_mb"] * 1e6
        rows.append(
            {
                "processes": size,
                "peak_mb": max(rank["peak"] for rank in ranks) / 1e6,
                "account_mb": 4 * COPIES * parameters / size / 1e6,
                "sent_mb": sent / 1e6,
                "loss": ranks[0]["loss"],
                "l0": ranks[0]["l0"],
                "ms": 1000 * max(rank["seconds"] for rank in ranks),
            }
        )
        print("  ".join(f"{key} {value:.7g}" for key, value in rows[-1].items()), flush=True)
    return rows


def matrices() -> None:
    """How many matrices a dense step holds at most, of tokens × latents and of tokens × d_in."""
    torch.set_num_threads(1)
    tokens = 2048
    for name in ("gated", "prolu", "relu"):
        for d_in, d_sae in ((8, 16384), (8192, 64)):
            sae_class, config_class = get_sae_training_class(name)
            sae = sae_class(config_class(d_in=d_in, d_sae=d_sae, backend="dense"))
            x, dead = torch.randn(tokens, d_in), torch.zeros(d_sae, dtype=torch.bool)
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            output = sae.training_forward_pass(TrainStepInput(x, {"l1": 1.0}, dead, 0, False))
            fired = output.feature_acts.bool().float()  # which SAELens's trainer keeps
            output.loss.backward()
            held = (resident("VmHWM") - before) / (4 * tokens * max(d_in, d_sae))
            print(f"{name}, {d_in} to {d_sae}: {held:.1f} beside the input", flush=True)
            del output, sae, fired


def several_gpus(bench: Any) -> None:
    """For gpu.py: 1, 2, 4, … of the GPUs here, at a size that fits one."""
    sizes = [n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()]
    args = argparse.Namespace(d_in=2048, d_sae=65536, batch=4096, steps=10, sizes=sizes)
    for row in measure(args):
        bench.note(what="several GPUs", **row)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=65536)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--matrices", action="store_true", help="only count a step's matrices")
    arguments = parser.parse_args()
    if arguments.matrices:
        matrices()
    else:
        measure(arguments)
