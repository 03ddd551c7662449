"""Opening a data set and cutting it into sequences of tokens."""

from __future__ import annotations

import errno
import itertools
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import get_dataset_split_names, load_dataset
from sae_lens import SAE, ActivationsStore
from torch import Tensor
from tqdm.auto import tqdm

from ..config.run import QUICKSTART, packaged
from ..errors import ConfigError, first_line, unknown_name
from ..files import require_local
from .hook_point import HookPoint

_BATCH_NUMBERS = 2**25  # logits, or latents, held at once: 128 MiB in fp32
_HELD_OUT = ("validation", "test", "train")


def open_text(dataset: Any, split: str | None = None) -> tuple[Any, str]:
    """Open a dataset by path or name for streaming; return it with the name of the split.

    split: default is the first of validation, test, train that exists. A loaded dataset is
    returned as it is.
    """
    if not isinstance(dataset, str | Path):
        if dataset is None:
            raise ConfigError("The SAE's metadata names no dataset; give one with --dataset.")
        return dataset, split or str(getattr(dataset, "split", None) or "as given")
    require_local("dataset_path", str(dataset))
    if dataset == QUICKSTART:  # as a published SAE's metadata has it
        dataset = packaged("dataset_path")
    try:
        known = get_dataset_split_names(str(dataset))
        if split is None:
            split = next((name for name in _HELD_OUT if name in known), known[0])
        if split not in known:
            raise ConfigError(unknown_name(f"split of dataset '{dataset}'", split, known))
        return load_dataset(str(dataset), split=split, streaming=True), split
    except ConfigError:
        raise
    except Exception as error:
        read_only = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS)
        hint = ". Set HF_HOME to a folder that can be written" if read_only else ""
        raise ConfigError(
            f"Dataset '{dataset}' cannot be opened: {first_line(error)}{hint}"
        ) from error


def token_sequences(sae: SAE[Any], point: HookPoint, text: Any) -> Iterator[Tensor]:
    """Yield the token sequences, (context_size,), that training on this text would have seen."""
    metadata = sae.cfg.metadata
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dataset is not tokenized")
        try:
            store = ActivationsStore.from_sae(
                point.model,
                sae,
                text,
                total_tokens=1,
                disable_concat_sequences=bool(metadata.disable_concat_sequences),
                sequence_separator_token=metadata.get("sequence_separator_token", "bos"),
            )
        except ValueError as error:
            raise ConfigError(f"The text does not fit this SAE: {error}") from error
    return store.iterable_sequences


def token_batches(
    sequences: Iterator[Tensor], tokens: int, numbers_per_token: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (batch, position) tokens and (batch,) sequence numbers, some `tokens` in all."""
    first = next(sequences, None)
    if first is None:
        return
    length, count = len(first), 0
    size = math.ceil(_BATCH_NUMBERS / (length * numbers_per_token))
    wanted = itertools.islice(itertools.chain([first], sequences), math.ceil(tokens / length))
    with tqdm(total=tokens, desc="Evaluating", unit=" tokens", disable=None, leave=False) as bar:
        while held := list(itertools.islice(wanted, size)):
            yield torch.stack(held), torch.arange(count, count + len(held))
            bar.update(len(held) * length)
            count += len(held)
