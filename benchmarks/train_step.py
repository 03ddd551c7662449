"""One training step, side by side in one process: SAELens's architectures, ours, one matmul.

    python benchmarks/train_step.py --d-in 768 --d-sae 16384 --batch 4096 --density 0.003

Every candidate runs once per round, rounds are interleaved, the figures are medians; so what the
machine does meanwhile hits all of them alike. `seconds` is forward + backward, `trainer_step` one
whole `SAETrainer.step` (clipping, Adam and SAELens's statistics included). Peak memory is measured
in a fresh process per candidate, above what was there before its first step.

Biases are set so that the wanted share of latents is active, for the candidates that have one; topk
and batchtopk get k to match.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import sae_lens
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from sae_gated_plugin.architectures.gated import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_gated_plugin.architectures.prolu import ProLUTrainingSAE, ProLUTrainingSAEConfig
from sae_gated_plugin.results import versions
from sae_gated_plugin.saelens_internals import fuse_adam

OURS = {
    "plugin.gated": lambda shape: GatedTrainingSAE(GatedTrainingSAEConfig(**shape)),
    "plugin.gated.sparse": lambda shape: GatedTrainingSAE(
        GatedTrainingSAEConfig(**shape, backend="sparse")
    ),
    "plugin.gated.dense": lambda shape: GatedTrainingSAE(
        GatedTrainingSAEConfig(**shape, backend="dense")
    ),
    "plugin.gated.matryoshka": lambda shape: GatedTrainingSAE(
        GatedTrainingSAEConfig(**shape, matryoshka_widths=widths(shape["d_sae"]))
    ),
    "plugin.prolu": lambda shape: ProLUTrainingSAE(ProLUTrainingSAEConfig(**shape)),
}
THEIRS = ("gated", "standard", "topk", "batchtopk", "jumprelu")
MATRYOSHKA = "matryoshka_batchtopk"
MATMUL = "encoder_matmul"
PEER = "dictionary_learning.gated"


def widths(d_sae: int) -> tuple[int, ...]:
    """Five prefixes, the first a 32nd of all latents."""
    return tuple(d_sae // share for share in (32, 8, 4, 2, 1))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--density", type=float, default=0.003, help="share of active latents")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--fused-adam", action="store_true", help="in ours, as of `train`")
    parser.add_argument("--only", nargs="*", help="candidates to run, e.g. plugin.gated")
    parser.add_argument(
        "--first-steps", type=int, help="instead: seconds of this many steps from initialisation"
    )
    parser.add_argument("--no-memory", action="store_true", help="skip the peak-memory processes")
    parser.add_argument(
        "--processor-time", action="store_true", help="not wall time: for ratios on a busy CPU"
    )
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def activations(args: argparse.Namespace) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(args.batch, args.d_in, device=args.device)


def build(name: str, args: argparse.Namespace, x: torch.Tensor) -> Any:
    """A training SAE of that name with `args.density` of its latents active on x."""
    shape: dict[str, Any] = {"d_in": args.d_in, "d_sae": args.d_sae, "device": args.device}
    torch.manual_seed(1)
    if name == PEER:
        return dictionary_learning_gated(args)
    if name in OURS:
        sae = OURS[name](shape)
    else:
        architecture = name.removeprefix("sae_lens.")
        if architecture == "gated":
            sae = sae_lens.GatedTrainingSAE(sae_lens.GatedTrainingSAEConfig(**shape))
        else:
            sae_class, config_class = get_sae_training_class(architecture)
            own: dict[str, Any] = {}
            if "topk" in architecture:
                own["k"] = max(1, round(args.density * args.d_sae))
            if architecture == MATRYOSHKA:
                own["matryoshka_widths"] = [*widths(args.d_sae)]
            sae = sae_class(config_class(**shape, **own))
    set_density(sae, args.density, x)
    return sae


@torch.no_grad()
def set_density(sae: TrainingSAE[Any], density: float, x: torch.Tensor) -> None:
    sample = (x[:256] - sae.b_dec) @ sae.W_enc
    margin = torch.quantile(sample.flatten()[:: max(1, sample.numel() // 10**6)], 1 - density)
    if hasattr(sae, "b_gate"):
        sae.b_gate.fill_(-margin)
        sae.b_mag.fill_(-margin)
    elif hasattr(sae, "log_threshold"):
        sae.log_threshold.fill_(margin.clamp_min(1e-3).log())
    elif hasattr(sae, "b_enc"):
        sae.b_enc.fill_(-margin)


def dictionary_learning_gated(args: argparse.Namespace) -> Any:
    from dictionary_learning.trainers.gdm import GatedSAETrainer  # pyright: ignore

    return GatedSAETrainer(
        steps=100_000,
        activation_dim=args.d_in,
        dict_size=args.d_sae,
        layer=0,
        lm_name="none",
        device=args.device,
        seed=1,
    )


def forward_backward(sae: Any, x: torch.Tensor, autocast: bool) -> Callable[[], None]:
    if not isinstance(sae, TrainingSAE):  # dictionary_learning's trainer

        def peer_step() -> None:
            sae.ae.zero_grad()
            sae.loss(x, step=0).backward()

        return peer_step

    dead = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=x.device)
    coefficients = {
        name: value if isinstance(value, float | int) else value[0]
        for name, value in sae.get_coefficients().items()
    }
    context = (
        torch.autocast(x.device.type, dtype=torch.bfloat16)
        if autocast
        else contextlib.nullcontext()
    )

    def step() -> None:
        sae.zero_grad()
        with context:
            output = sae.training_forward_pass(TrainStepInput(x, coefficients, dead, 0, False))
        output.loss.backward()

    return step


def trainer_step(
    sae: Any, x: torch.Tensor, autocast: bool, fused_adam: bool = False
) -> Callable[[], None]:
    trainer = make_trainer(sae, len(x), autocast, lr=1e-7)  # so that the density stays what it is
    if fused_adam:
        fuse_adam(trainer, True)
    return lambda: void(trainer.step(x))


def make_trainer(sae: Any, batch: int, autocast: bool, lr: float) -> Any:
    return SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=batch,
            lr=lr,
            lr_end=lr,
            device=str(sae.device),
            autocast=autocast,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=iter(()),
    )


def void(_: object) -> None:
    return None


def first_steps(args: argparse.Namespace) -> None:
    """The dense first phase: trainer steps from initialisation on fresh batches, interleaved."""
    generator = torch.Generator().manual_seed(2)
    directions = torch.randn(args.d_in, args.d_in, generator=generator)
    saes = {}
    for name in ("plugin.gated", "sae_lens.gated"):
        torch.manual_seed(1)
        shape = {"d_in": args.d_in, "d_sae": args.d_sae}
        config = GatedTrainingSAEConfig if name in OURS else sae_lens.GatedTrainingSAEConfig
        sae_class = GatedTrainingSAE if name in OURS else sae_lens.GatedTrainingSAE
        saes[name] = sae_class(config(**shape, l1_coefficient=5.0))
    trainers = {name: make_trainer(sae, args.batch, False, lr=1e-3) for name, sae in saes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in saes}
    l0: dict[str, list[float]] = {name: [] for name in saes}
    for _ in range(args.first_steps):
        codes = torch.randn(args.batch, args.d_in, generator=generator).relu()
        x = codes * (codes > 1.5) @ directions
        for name, trainer in trainers.items():
            start = time.perf_counter()
            output = trainer.step(x)
            seconds[name].append(time.perf_counter() - start)
            l0[name].append(output.feature_acts.bool().float().sum().item() / args.batch)
    for name in saes:
        steps = ", ".join(f"{value:.0f}" for value in l0[name][:: max(1, args.first_steps // 5)])
        print(f"{name}: {sum(seconds[name]):.1f} s for {args.first_steps} steps; L0 {steps}")
    ours, theirs = seconds["plugin.gated"], seconds["sae_lens.gated"]
    slower = sum(a > b for a, b in zip(ours, theirs))
    ratio = sum(theirs) / sum(ours)
    print(f"{ratio:.1f} x; ours was the slower one in {slower} of {args.first_steps} steps")


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(step: Callable[[], None], args: argparse.Namespace) -> float:
    clock = time.process_time if args.processor_time else time.perf_counter
    synchronize(args.device)
    start = clock()
    step()
    synchronize(args.device)
    return clock() - start


def interleaved(steps: dict[str, Callable[[], None]], args: argparse.Namespace) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():  # once to warm up
        step()
    for _ in range(args.rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step, args))
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_mib(name: str, args: argparse.Namespace) -> float:
    """Peak memory of two trainer steps above the state before them, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_mib, (name, args))


def _peak_mib(name: str, args: argparse.Namespace) -> float:
    x = activations(args)
    sae = build(name, args, x)
    step = forward_backward(sae, x, args.autocast)
    if args.device.startswith("cuda"):
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # /proc's high-water mark can be reset, unlike getrusage's.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status_kib("VmRSS")
    step()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def measured_with() -> dict[str, Any]:
    """What the figures depend on beside the machine."""
    return {**versions(), "threads": torch.get_num_threads()}


def main() -> None:
    args = parse_args()
    if args.first_steps:
        first_steps(args)
        return
    names = [*OURS, *(f"sae_lens.{name}" for name in (*THEIRS, MATRYOSHKA))]
    with contextlib.suppress(ImportError):
        import dictionary_learning.trainers.gdm  # noqa: F401  # pyright: ignore

        names.append(PEER)
    if args.only:
        names = [name for name in names if name in args.only]
    x = activations(args)
    saes = {name: build(name, args, x) for name in names}
    rows = torch.nn.functional.normalize(torch.randn(args.d_sae, args.d_in, device=args.device))

    steps = {name: forward_backward(sae, x, args.autocast) for name, sae in saes.items()}
    steps[MATMUL] = lambda: void(x @ rows.T)
    seconds = interleaved(steps, args)
    for sae in saes.values():
        if isinstance(sae, TrainingSAE):
            sae.zero_grad()
    trainer_steps = {
        name: trainer_step(sae, x, args.autocast, args.fused_adam and name in OURS)
        for name, sae in saes.items()
        if isinstance(sae, TrainingSAE)
    }
    trainer_seconds = interleaved(trainer_steps, args)
    memory = {} if args.no_memory else {name: peak_mib(name, args) for name in names}

    result = {
        "shape": {
            "d_in": args.d_in,
            "d_sae": args.d_sae,
            "batch": args.batch,
            "density": args.density,
            "device": args.device,
            "autocast": args.autocast,
            "fused_adam": args.fused_adam,
        },
        "seconds": seconds,
        "trainer_step_seconds": trainer_seconds,
        "peak_mib": memory,
        "versions": measured_with(),
    }
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['shape']}, {args.rounds} rounds, {result['versions']}")
    print("\n| candidate | fwd + bwd | vs matmul | vs SAELens gated | trainer step | vs | peak |")
    print("|---|---|---|---|---|---|---|")
    theirs = "sae_lens.gated"
    for name, value in seconds.items():
        columns = [name, f"{value * 1e3:.0f} ms", f"{value / seconds[MATMUL]:.2f}"]
        columns.append(f"{seconds[theirs] / value:.1f} ×" if theirs in seconds else "")
        step_time = trainer_seconds.get(name)
        columns.append(f"{step_time * 1e3:.0f} ms" if step_time else "")
        has_ratio = step_time and theirs in trainer_seconds
        columns.append(f"{trainer_seconds[theirs] / step_time:.1f} ×" if has_ratio else "")
        columns.append(f"{memory[name]:.0f} MiB" if name in memory else "")
        print("| " + " | ".join(columns) + " |")


if __name__ == "__main__":
    sys.exit(main())
