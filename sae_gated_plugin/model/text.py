"""Opening a data set and cutting it into sequences of tokens."""

from __future__ import annotations

import errno
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict, get_dataset_split_names, load_dataset, load_from_disk
from sae_lens import SAE, ActivationsStore
from torch import Tensor
from tqdm.auto import tqdm

from ..config.run import QUICKSTART, packaged
from ..errors import ConfigError, first_line, unknown_name
from ..files import expanded, require_local
from ..progress import Lines
from .hook_point import HookPoint

_BATCH_NUMBERS = 2**25  # logits, or latents, held at once: 128 MiB in fp32
_HELD_OUT = ("validation", "test", "train")
#: Files of texts or tokens, and who in `datasets` reads them.
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


def open_text(dataset: Any, split: str | None = None) -> tuple[Any, str]:
    """Open a dataset by path or name for streaming; return it with the name of the split.

    dataset: a name on the Hub; a folder of files, or one that `save_to_disk` has written; a file,
    which is all of it the split train. split: default is the first of validation, test, train that
    exists. A loaded dataset is returned as it is.
    """
    if not isinstance(dataset, str | Path):
        if dataset is None:
            raise ConfigError("The SAE's metadata names no dataset; give one with --dataset.")
        return dataset, split or str(getattr(dataset, "split", None) or "as given")
    require_local(
        "dataset_path",
        str(dataset),
        "Give a folder of .parquet or .jsonl files with a column text or input_ids, one such file, "
        "a folder that datasets' save_to_disk has written, or a name on the Hub (owner/name).",
    )
    if dataset == QUICKSTART:  # as a published SAE's metadata has it
        dataset = packaged("dataset_path")
    try:
        dataset = expanded(dataset)
        saved = _saved(dataset)
        opened = get_dataset_split_names(str(dataset)) if saved is None else saved
        known = [str(name) for name in opened]
        chosen = split or next((name for name in _HELD_OUT if name in known), known[0])
        if chosen not in known:
            raise ConfigError(unknown_name(f"split of dataset '{dataset}'", chosen, known))
        if saved is not None:
            return saved[chosen], chosen
        return load_dataset(str(dataset), split=chosen, streaming=True), chosen
    except ConfigError:
        raise
    except Exception as error:
        read_only = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS)
        hint = ". Set HF_HOME to a folder that can be written" if read_only else ""
        raise ConfigError(
            f"Dataset '{dataset}' cannot be opened: {first_line(error)}{hint}"
        ) from error


def _saved(path: Path) -> Mapping[Any, Any] | None:
    """The splits of a file or of what `save_to_disk` has written; None for anything else."""
    if path.is_file():
        if path.suffix not in _READERS:
            raise ConfigError(
                f"dataset_path '{path}' is a file of an unknown kind; known: {', '.join(_READERS)}."
            )
        return load_dataset(_READERS[path.suffix], data_files=str(path), streaming=True)
    if not ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        return None
    saved = load_from_disk(str(path))
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    return {name: split.to_iterable_dataset() for name, split in splits.items()}


def local_text(dataset_path: str) -> Any | None:
    """The training split of a data set on this machine, opened; None for one on the Hub.

    For `override_dataset`: SAELens cannot open a file or what `save_to_disk` has written, and asks
    the Hub about the tokenizer of any data set of tokens.
    """
    is_here = expanded(dataset_path).exists()
    return open_text(dataset_path, "train")[0] if is_here else None


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
    settings: dict[str, Any] = {
        "bar_format": "{desc} {percentage:3.0f}%|{bar}| {rate_fmt}, {remaining} left",
        **{"unit": "tok", "unit_scale": True, "dynamic_ncols": True},
    }
    with tqdm(total=tokens, desc="measuring", disable=None, leave=False, **settings) as bar:
        lines = Lines(bar, settings["unit"])
        while held := list(itertools.islice(wanted, size)):
            yield torch.stack(held), torch.arange(count, count + len(held))
            bar.update(len(held) * length)
            count += len(held)
            lines.write("measuring", count * length)
