"""Tokens per second of a whole SAELens run on SmolLM2, against the model's forward pass alone.

    python benchmarks/end_to_end.py

SAELens's own runner trains; the activations come from `model.layers.12` in float32, d_sae is 16
times d_in. The forward pass alone is timed within the run, batch for batch, where SAELens's
activation store calls the model. What the run takes beyond that is training. Biases start where
`--density` of the latents is active: the dense first phase is dozens of steps out of thousands.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import Any

import sae_lens
import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.load_model import load_model
from sae_lens.saes.sae import TrainingSAE
from train_step import measured_with, set_density

from sae_gated_plugin.architectures.gated import GatedTrainingSAE, GatedTrainingSAEConfig

D_IN, EXPANSION, LAYER = 576, 16, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--text", default="data/public_domain_text")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--l1", type=float, default=12.0)
    parser.add_argument(
        "--density",
        type=float,
        default=0.005,
        help="share of active latents to start from, as after the first percent of a long run",
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="Dataset is not tokenized")

    hook_name = f"model.layers.{LAYER}"
    model = load_model("AutoModelForCausalLM", args.model, "cpu", {"dtype": "float32"}, [hook_name])
    shape: dict[str, Any] = {"d_in": D_IN, "d_sae": EXPANSION * D_IN, "l1_coefficient": args.l1}
    candidates: dict[str, TrainingSAE[Any]] = {
        "plugin.gated": GatedTrainingSAE(GatedTrainingSAEConfig(**shape)),
        "sae_lens.gated": sae_lens.GatedTrainingSAE(sae_lens.GatedTrainingSAEConfig(**shape)),
    }
    rates: dict[str, dict[str, float]] = {}
    for name, sae in candidates.items():
        cfg = LanguageModelSAERunnerConfig(
            sae=sae.cfg,
            model_name=args.model,
            model_class_name="AutoModelForCausalLM",
            hook_name=hook_name,
            dataset_path=args.text,
            dataset_trust_remote_code=False,
            is_dataset_tokenized=False,
            context_size=128,
            prepend_bos=False,
            seqpos_slice=(1, None),
            training_tokens=args.steps * args.batch,
            train_batch_size_tokens=args.batch,
            store_batch_size_prompts=32,
            n_batches_in_buffer=128,
            lr=1e-3,
            output_path=None,
            checkpoint_path=None,
            logger=LoggingConfig(log_to_wandb=False),
            verbose=False,
        )
        runner = LanguageModelSAETrainingRunner(cfg, override_model=model, override_sae=sae)
        set_density(sae, args.density, runner.activations_store.get_filtered_llm_batch())
        forward = Stopwatch(runner.activations_store.get_filtered_llm_batch)
        runner.activations_store.get_filtered_llm_batch = forward  # type: ignore[method-assign]
        start = time.perf_counter()
        runner.run()
        seconds = time.perf_counter() - start
        rates[name] = {
            "forward_tokens_per_second": forward.tokens / forward.seconds,
            # The buffer holds tokens that were computed and not yet trained on.
            "run_tokens_per_second": forward.tokens / seconds,
            "share_of_forward_rate": forward.seconds / seconds,
        }
    if args.json:
        print(json.dumps({"rates": rates, "steps": args.steps, "versions": measured_with()}))
        return
    print(f"{hook_name}, d_sae {EXPANSION * D_IN}, {args.steps} steps of {args.batch}")
    print(f"{measured_with()}\n")
    print("| | forward alone, tokens/s | whole run, tokens/s | share |\n|---|---|---|---|")
    for name, rate in rates.items():
        forward_rate, run_rate, share = rate.values()
        print(f"| {name} | {forward_rate:.0f} | {run_rate:.0f} | {share:.0%} |")


class Stopwatch:
    """Times the calls of a function that returns activations, and counts their tokens."""

    def __init__(self, function: Any) -> None:
        self.function, self.seconds, self.tokens = function, 0.0, 0

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        start = time.perf_counter()
        activations = self.function(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        self.tokens += len(activations)
        return activations


if __name__ == "__main__":
    main()
