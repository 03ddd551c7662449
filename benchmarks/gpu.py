"""Everything about the sparse core on one GPU, in one command of some three minutes.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --interpret          without a GPU: the same checks at toy sizes

For each shape: errors of loss and gradients against float64; forward + backward and whole
`SAETrainer.step` of ours, SAELens's architectures and EleutherAI's sparsify (where installed), in
float32 and under bfloat16 autocast; peak memory above the weights; how often the host waits for the
GPU in a step; and the two forms of ours, of which the automatic choice should take the faster. Then
tokens per second of a whole training on the packaged model.

Densities of latents are spread log-normally (sigma 1.5), the densest at 0.5, as those of real SAEs
are. Times are means of steps done back to back. What does not fit into memory or --seconds is left
out and said so. Exit code 1 if an error against float64 is above its limit.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

if "--interpret" in sys.argv:  # before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"

import sae_lens
import torch
from float64_reference import reference, support_of
from gpu_candidates import L1, OURS, build, forward_backward, sparsify_step
from ranks import several_gpus
from sae_lens.saes.sae import TrainStepInput
from train_step import THEIRS, make_trainer, void

from sae_gated_plugin.core import choice, cost, cuda
from sae_gated_plugin.core.active import encode_active
from sae_gated_plugin.core.kernels import screening
from sae_gated_plugin.saelens_internals import fuse_adam

#: d_in, d_sae, mean number of active latents.
SHAPES = [
    (576, 4608, 46),
    (768, 16384, 49),
    (768, 32768, 65),
    (2304, 65536, 65),
    (2304, 65536, 196),
    (4096, 131072, 66),
]
TOY_SHAPES = [(24, 100, 5), (17, 70, 3)]

#: Largest relative errors against float64, of the loss and of each gradient.
LIMITS = {"loss": 1e-6, "gradient": 5e-6}


class Bench:
    """What the figures are measured on, and all of them so far."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = "cpu" if args.interpret else "cuda"
        self.batch = 12 if args.interpret else args.batch
        self.started = time.perf_counter()
        self.results: list[dict[str, Any]] = []
        self.left_out: list[str] = []

    @property
    def out_of_time(self) -> bool:
        return time.perf_counter() - self.started > self.args.seconds

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, step: Callable[[], None]) -> float:
        """Mean of steps back to back, at least 3, for `--each` seconds; two before to warm up."""
        if self.args.interpret:  # minutes otherwise, and nobody wants to know
            step()
            return 0.0
        for _ in range(2):
            step()
        self.synchronize()
        start, done = time.perf_counter(), 0
        while done < 3 or (done < 100 and time.perf_counter() - start < self.args.each):
            step()
            done += 1
            if done % 4 == 0:  # the host must not run far ahead, or this never ends in time
                self.synchronize()
        self.synchronize()
        return (time.perf_counter() - start) / done * 1e3

    def note(self, **figures: Any) -> None:
        self.results.append(figures)
        print(*(f"{key} {_text(value)}" for key, value in figures.items()), sep=" | ", flush=True)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Leave out what does not fit or work, and say so."""
        try:
            yield
        except Exception as error:
            reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else repr(error)
            self.left_out.append(f"{what}: {reason[:300]}")
            print("left out:", self.left_out[-1], flush=True)
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def peak_mib(step: Callable[[], None], bench: Bench) -> float | None:
    if bench.device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def waits(step: Callable[[], None], bench: Bench) -> int | None:
    """How often the host waits for the GPU in one step."""
    if bench.device != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
    names = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
    # Not cudaDeviceSynchronize: that is the profiler's own, at its end.
    return sum(event.count for event in profiler.key_averages() if event.key in names)


# --- correctness ----------------------------------------------------------------------------------


def correctness(shape: tuple[int, int, float], bench: Bench) -> None:
    """Errors of loss and gradients, relative to float64's norms."""
    x = inputs(shape, bench)[: bench.args.check_tokens]
    sae = build("sparse", shape, bench.device)
    active, entries, wrong = support_of(sae, x)
    loss, grads = reference(sae, x, active, L1)
    for autocast in (False, True):
        dead = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=x.device)
        sae.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            output = sae.training_forward_pass(TrainStepInput(x, {"l1": L1}, dead, 0, False))
        output.loss.backward()
        errors = {
            name: float((getattr(sae, name).grad - grad).norm() / grad.norm().clamp_min(1e-30))
            for name, grad in grads.items()
        }
        worst = max(errors, key=lambda name: errors[name])
        bench.note(
            what="correctness",
            shape=f"{shape[0]}x{shape[1]}",
            l0=len(active) / len(x),
            autocast=autocast,
            candidates_per_active=entries / max(1, len(active)),
            support_wrong=wrong,
            loss_error=abs(output.loss.item() - loss) / abs(loss),
            gradient_error=errors[worst],
            worst=worst,
        )


# --- times ----------------------------------------------------------------------------------------


def inputs(shape: tuple[int, int, float], bench: Bench) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(bench.batch, shape[0], generator=generator).to(bench.device)


def times(name: str, shape: tuple[int, int, float], autocast: bool, bench: Bench) -> None:
    x = inputs(shape, bench)
    sae = build(name, shape, bench.device)
    step = partial(forward_backward, sae, x, autocast)
    figures: dict[str, Any] = {
        "what": "times",
        "shape": f"{shape[0]}x{shape[1]}",
        "l0": shape[2],
        "autocast": autocast,
        "candidate": name if name not in OURS else f"ours.{name}",
        "forward_backward_ms": bench.milliseconds(step),
        "peak_mib": peak_mib(step, bench),
        "waits": waits(step, bench),
    }
    if name in OURS and name != "dense":
        figures["form"] = form(sae, x, autocast)
    for fused in (False, True) if name == "auto" else (False,):
        sae.zero_grad()
        trainer = make_trainer(sae, len(x), autocast and bench.device == "cuda", lr=1e-9)
        fuse_adam(trainer, fused)
        once = lambda trainer=trainer: void(trainer.step(x))  # noqa: E731
        figures["trainer_step_fused_ms" if fused else "trainer_step_ms"] = bench.milliseconds(once)
        if name == "auto" and not fused:
            figures["trainer_step_waits"] = waits(once, bench)
        del trainer, once
    bench.note(**figures)


def form(sae: Any, x: torch.Tensor, autocast: bool) -> str:
    """Which form a step takes."""
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        active = encode_active(x, sae.W_enc, sae.thresholds(), sae.b_dec, sae.cfg.backend)
    return "dense" if active.support is None else type(active.support).__name__


def sparsify_times(shape: tuple[int, int, float], autocast: bool, bench: Bench) -> None:
    step = sparsify_step(shape, inputs(shape, bench), autocast)
    bench.note(
        what="times",
        shape=f"{shape[0]}x{shape[1]}",
        l0=shape[2],
        autocast=autocast,
        candidate="sparsify.topk",
        forward_backward_ms=bench.milliseconds(step),
        peak_mib=peak_mib(step, bench),
    )


def parts(shape: tuple[int, int, float], bench: Bench) -> None:
    """Milliseconds of each part of a sparse step."""
    x = inputs(shape, bench)
    sae = build("sparse", shape, bench.device)
    rows, W_dec = sae.W_enc.detach().T.contiguous(), sae.W_dec.detach()
    limit = sae.thresholds().detach()
    found = cuda.find(x, rows, limit, 1.0)
    assert found is not None
    support, values, keep = found
    low = cuda.rounded(x), cuda.rounded(rows)
    work: dict[str, Callable[[], Any]] = {
        "round": lambda: cuda.rounded(rows),
        "screen": lambda: cuda.screen(*low, limit, cuda.MOST_ENTRIES),
        "find": lambda: cuda.find(x, rows, limit, 1.0),
        "decode_both": lambda: support.sums_by_token((values, keep), W_dec),
        "dots_both": lambda: support.dot_products((x, x), W_dec),
        "transpose": support.sorted_by_latent,
        "sum_by_latent": lambda: support.sum_by_latent(values, x),
        "tangent_sum": lambda: support.tangent_sum_by_latent(values, x, W_dec, values),
        "totals": lambda: support.totals_by_latent(values),
    }
    bench.note(
        what="parts",
        shape=f"{shape[0]}x{shape[1]}",
        l0=shape[2],
        **{name: bench.milliseconds(lambda run=run: void(run())) for name, run in work.items()},
    )


# --- a whole training -----------------------------------------------------------------------------


@contextmanager
def without_interpreter() -> Iterator[None]:
    """On the CPU the CPU's own form, for Triton's interpreter would take hours."""
    devices, choice.KERNEL_DEVICES = choice.KERNEL_DEVICES, {"cuda"}
    try:
        yield
    finally:
        choice.KERNEL_DEVICES = devices


def training(architecture: str, bench: Bench) -> None:
    """Tokens per second of `sae-gated train` on the packaged model.

    From runs of two lengths, so that loading the model and compiling kernels does not count.
    """
    import sae_gated_plugin
    from sae_gated_plugin.config.run import load_config
    from sae_gated_plugin.training.run import train

    quickstart = Path(sae_gated_plugin.__file__).parent / "quickstart"
    lengths = (4096, 8192) if bench.args.interpret else (204_800, 819_200)
    config: dict[str, Any] = {
        "model_name": str(quickstart / "model"),
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": "model.layers.2",
        "dataset_path": str(quickstart / "text"),
        "dataset_trust_remote_code": False,
        "is_dataset_tokenized": False,
        "context_size": 128,
        "prepend_bos": False,
        "sae": {"architecture": architecture, "d_in": 128, "d_sae": 4096, "l1_coefficient": 1.0},
        "train_batch_size_tokens": 2048 if bench.args.interpret else 4096,
        "store_batch_size_prompts": 32,
        "n_batches_in_buffer": 16,
        "lr": 1e-3,
        "device": bench.device,
        "logger": {"log_to_wandb": False},
        "verbose": False,
    }
    seconds: list[float] = []
    with without_interpreter(), tempfile.TemporaryDirectory() as folder:
        for tokens in lengths:
            start = time.perf_counter()
            run = load_config({**config, "training_tokens": tokens}, [])
            train(run, Path(folder) / str(tokens))
            seconds.append(time.perf_counter() - start)
    bench.note(
        what="training",
        architecture=architecture,
        seconds=sum(seconds),
        tokens_per_s=(lengths[1] - lengths[0]) / (seconds[1] - seconds[0]),
    )


# --- all of it ------------------------------------------------------------------------------------


def table(bench: Bench) -> None:
    """Times side by side, and how many times as long SAELens's gated takes."""
    rows = [row for row in bench.results if row["what"] == "times"]
    print(
        "\n| shape, L0 | precision | candidate | fwd + bwd | × | trainer step | × | MiB | waits |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        same = [
            other
            for other in rows
            if other["candidate"] == "gated"
            and all(other[key] == row[key] for key in ("shape", "l0", "autocast"))
        ]
        cells = [f"{row['shape']}, {row['l0']}", "bf16" if row["autocast"] else "fp32"]
        cells.append(row["candidate"] + (f" ({row['form']})" if "form" in row else ""))
        for key in ("forward_backward_ms", "trainer_step_ms"):
            value = row.get(key)
            cells.append("" if value is None else f"{value:.2f} ms")
            cells.append(f"{same[0][key] / value:.1f}" if same and value else "")
        cells.append(f"{row['peak_mib']:.0f}" if row.get("peak_mib") is not None else "")
        cells.append(str(row["waits"]) if row.get("waits") is not None else "")
        print("| " + " | ".join(cells) + " |")


def verdict(bench: Bench) -> list[str]:
    """What is wrong: errors above their limits, and forms that were not the faster ones."""
    bad: list[str] = []
    rows = [row for row in bench.results if row["what"] == "correctness"]
    if not rows:
        bad.append("nothing was compared with float64")
    for row in rows:
        errors = row["loss_error"] / LIMITS["loss"], row["gradient_error"] / LIMITS["gradient"]
        if not max(errors) < 1 or row["support_wrong"]:
            bad.append(f"{row['shape']}, autocast {row['autocast']}: differs from float64")
    return bad


def choices(bench: Bench) -> list[str]:
    """Where the automatic choice was more than 10 % slower than the better form."""
    slow: list[str] = []
    measured = {
        (row["shape"], row["l0"], row["autocast"], row["candidate"]): row["forward_backward_ms"]
        for row in bench.results
        if row["what"] == "times"
    }
    for (*place, candidate), value in measured.items():
        if candidate == "ours.auto":
            forms = [measured.get((*place, f"ours.{form}")) for form in ("sparse", "dense")]
            best = min((form for form in forms if form), default=value)
            if value > 1.1 * best:
                slow.append(f"{place}: {value:.2f} ms, the better form {best:.2f}")
    return slow


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--interpret", action="store_true", help="toy sizes, without a GPU")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--check-tokens", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=200, help="start nothing after so many")
    parser.add_argument("--each", type=float, default=0.3, help="seconds per measurement")
    parser.add_argument("--shapes", nargs="*", type=int, help="numbers of the shapes, from 0")
    parser.add_argument("--json", type=Path, help="write all figures there")
    return parser.parse_args()


def stages(bench: Bench) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is to be measured, the most important first."""
    shapes = TOY_SHAPES if bench.args.interpret else SHAPES
    shapes = [shapes[i] for i in bench.args.shapes or range(len(shapes))]
    precisions = (False, True)
    for shape in shapes:
        yield f"correctness {shape}", partial(correctness, shape, bench)
    for name in ("auto", "gated"):
        for shape in shapes:
            for autocast in precisions:
                yield f"{name} {shape}", partial(times, name, shape, autocast, bench)
    for shape in shapes:
        yield f"parts {shape}", partial(parts, shape, bench)
    for architecture in ("gated", "sae_lens_gated"):
        yield f"training {architecture}", partial(training, architecture, bench)
    others = ("sparse", "dense", "standard", "prolu", *(t for t in THEIRS if "k" in t or "j" in t))
    if torch.cuda.device_count() > 1:
        yield "several GPUs", partial(several_gpus, bench)
    for name in others:
        for shape in shapes:
            for autocast in precisions:
                yield f"{name} {shape}", partial(times, name, shape, autocast, bench)
    for shape in shapes:
        for autocast in precisions:
            yield f"sparsify {shape}", partial(sparsify_times, shape, autocast, bench)


def main() -> int:
    args = parse_args()
    bench = Bench(args)
    if args.interpret:
        torch.set_num_threads(1)
        choice.KERNEL_DEVICES.add("cpu")
        cost.MIN_TOKENS, screening.SAMPLE, cuda.PART = 8, 8, 8
        cost.crossover = lambda *_: 0.5
    versions = {"torch": torch.__version__, "triton": cuda.triton.__version__}
    gpu = "none" if args.interpret else torch.cuda.get_device_name()
    bench.note(what="machine", gpu=gpu, sae_lens=sae_lens.__version__, **versions)
    for what, measure in stages(bench):
        if bench.out_of_time:
            bench.left_out.append(f"{what}: no time")
            continue
        with bench.attempt(what):
            measure()
    table(bench)
    bad, slow = verdict(bench), choices(bench)
    for line in (*(f"left out: {what}" for what in bench.left_out), *bad):
        print(line)
    for line in slow:
        print("the automatic choice took the slower form:", line)
    print(f"{time.perf_counter() - bench.started:.0f} s")
    if args.json:
        summary = {"left_out": bench.left_out, "wrong": bad, "slower_form": slow}
        args.json.write_text(json.dumps({"results": bench.results, **summary}, indent=1))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
