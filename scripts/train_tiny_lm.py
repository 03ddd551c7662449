"""Train the tiny language model that `sae-gated quickstart` works on.

    python scripts/train_tiny_lm.py --output sae_gated_plugin/quickstart/model

A Llama of 1.05M parameters (4 layers, width 128, tied embeddings, context 128) with a byte-level
BPE of 2,048 tokens, both trained on the text that lies in sae_gated_plugin/quickstart/text.
One special token, <|endoftext|>, is bos, eos and pad: every context starts with it and it stands
between documents, which is the token stream that SAELens makes from plain text by default.
Deterministic on one machine: seeded, one thread, a fixed number of steps.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import pyarrow.parquet
import torch
import transformers
from fetch import Parser, Refused, finish, readable, writable_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = Path(__file__).parent.parent / "sae_gated_plugin" / "quickstart" / "text"
SEED = 0
CONTEXT = 128
VOCABULARY = 2048
SPECIAL = "<|endoftext|>"
BATCH = 16  # sequences of CONTEXT tokens
MUON_LR = 1e-2
MUON_DECAY = 0.2
ADAM_LR = 8e-3
WARM_UP_STEPS = 30
STORED_DTYPE = torch.float16  # halves the file; loaded as float32, as config.json says


def read(path: Path) -> list[str]:
    """Return the rows of one parquet file's column `text`."""
    try:
        return pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
    except (OSError, KeyError, pyarrow.ArrowException):
        raise Refused(
            f"No parquet file with a column `text` at {path}; scripts/prepare_text.py makes one."
        ) from None


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; token 0 is the special token, and none is added on its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL, eos_token=SPECIAL, pad_token=SPECIAL
    )


def contexts(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return (N, CONTEXT) int64 token ids: documents in one stream, each context led by bos."""
    bos = tokenizer.bos_token_id
    stream = [token for ids in tokenizer(texts)["input_ids"] for token in (bos, *ids)]
    n_contexts = len(stream) // (CONTEXT - 1)
    body = torch.tensor(stream[: n_contexts * (CONTEXT - 1)]).view(n_contexts, CONTEXT - 1)
    return torch.cat([torch.full((n_contexts, 1), bos), body], dim=1)


def unigram_cross_entropy(train: torch.Tensor, held_out: torch.Tensor) -> float:
    """Return the held-out nats per token of the train set's token frequencies (add-one)."""
    counts = torch.bincount(train[:, 1:].flatten(), minlength=VOCABULARY) + 1.0
    return -(counts / counts.sum()).log()[held_out[:, 1:]].mean().item()


@torch.no_grad()
def cross_entropy(model: LlamaForCausalLM, batch: torch.Tensor) -> float:
    """Return the mean nats per predicted token over (N, CONTEXT) ids."""
    model.eval()
    parts = [(len(ids), model(input_ids=ids, labels=ids).loss) for ids in batch.split(64)]
    model.train()
    return sum(n * loss.item() for n, loss in parts) / len(batch)


def new_model() -> LlamaForCausalLM:
    """Return the untrained model; the layers that write to the residual stream start small."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).float()
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data /= math.sqrt(2 * config.num_hidden_layers)
    return model


def train(model: LlamaForCausalLM, data: torch.Tensor, held_out: torch.Tensor, steps: int) -> None:
    """Muon for the layers' matrices, AdamW for embeddings and gains; warm-up, then a cosine.

    After 200 steps this reaches 4.4 nats where AdamW alone, at its best rate, is at 5.1.
    """
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in named if p.dim() < 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=MUON_LR, weight_decay=MUON_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        return min(1.0, (step + 1) / WARM_UP_STEPS) * (0.05 + 0.95 * cosine)

    schedules = [torch.optim.lr_scheduler.LambdaLR(each, rate) for each in optimizers]
    generator = torch.Generator().manual_seed(SEED)
    order = torch.empty(0, dtype=torch.int64)
    started = time.monotonic()
    for step in range(1, steps + 1):
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(data), generator=generator)])
        ids, order = data[order[:BATCH]], order[BATCH:]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if step % 50 == 0 or step == steps:
            tokens = step * BATCH * CONTEXT
            seconds = time.monotonic() - started
            line = f"step {step}/{steps}  train CE {loss.item():.3f}"
            if step % 200 == 0:
                line += f"  held-out CE {cross_entropy(model, held_out[:128]):.3f}"
            print(f"{line}  {tokens / seconds:,.0f} tokens/s  {seconds:.0f} s", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model with STORED_DTYPE weights that load as float32, and the tokenizer."""
    model.to(STORED_DTYPE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    edit(folder / "config.json", dtype="float32")
    # The class's name in every version of transformers; version 5 writes a new one.
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    readable(folder)


def edit(path: Path, **changes: str) -> None:
    """Change entries of a JSON file."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes, indent=2) + "\n")


def main() -> None:
    """Train, save, load back and compare."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the model's folder")
    parser.add_argument("--text", type=Path, default=TEXT, help="a folder of prepare_text.py's")
    parser.add_argument("--steps", type=int, default=1400, help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        raise Refused(f"--steps must be at least 1, got {arguments.steps}.")

    if not hasattr(torch.optim, "Muon"):
        raise Refused(f"Training needs torch 2.9 or newer for its Muon, found {torch.__version__}.")

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    texts = read(arguments.text / "train.parquet")
    held_out_texts = read(arguments.text / "validation.parquet")
    output = writable_folder(arguments.output)

    tokenizer = train_tokenizer(texts)
    data, held_out = contexts(texts, tokenizer), contexts(held_out_texts, tokenizer)
    if min(len(data), len(held_out)) < BATCH:
        raise Refused(f"{arguments.text} holds too little text: {BATCH} contexts are the least.")
    model = new_model()
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters; "
        f"{data.numel():,} tokens to train on, {held_out.numel():,} held out"
    )
    print(f"unigram held-out CE {unigram_cross_entropy(data, held_out):.3f} nats", flush=True)
    train(model, data, held_out, arguments.steps)
    trained = cross_entropy(model, held_out)

    save(model, tokenizer, output)
    loaded = LlamaForCausalLM.from_pretrained(output)
    stored = cross_entropy(loaded, held_out)
    print(f"held-out CE {trained:.4f} nats as trained, {stored:.4f} as stored")
    print(f"saved in {output}")


if __name__ == "__main__":
    finish(main)
