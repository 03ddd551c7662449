"""The activations that a run trains on, as SAELens mixes them, with a state that can be saved.

SAELens reads texts, runs the language model and shuffles its activations in generators, whose
state nothing can save. Here the shuffling buffer is an object, and the sequences taken from the
texts are counted; the same seed gives the same batches as SAELens, bit for bit.

To restore, the buffer's rows are read back and the texts already read are read again, without the
language model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import ConfigError
from ..saelens_internals import activations_of, replace_sequences, serve


class ActivationStream(Iterator[Tensor]):
    """Batches of activations, (train_batch_size_tokens, d_in), from SAELens's ActivationsStore.

    Takes the place of the store's own mixing buffer. prefetched: how many batches may have been
    handed out and not been trained on. before_model is called before each pass of the language
    model; what it raises leaves a state that can be saved. trained_on is the last batch that a
    step was completed on: the state is the one after it.
    """

    def __init__(self, store: Any, prefetched: int = 0):
        self.before_model: Callable[[], None] = lambda: None
        self.trained_on: Tensor | None = None
        self._store = store
        self._loader = activations_of(store)
        self._size = store.n_batches_in_buffer * store.training_context_size
        self._kept = int(self._size * store.activations_mixing_fraction)
        self._rows: Tensor | None = None  # (n, d_in): to be served, then to be mixed with new ones
        self._n_batches = 0  # of them to be served before the next mixing
        self._handed_out: deque[Tensor] = deque(maxlen=prefetched + 3)
        self._n_sequences = 0  # of this epoch
        self._first_text = 0  # of this epoch, by the store's count
        self._tokenized = replace_sequences(store, self._counted_sequences)
        serve(store, self)

    @property
    def filled(self) -> float:
        """The share of the buffer that there is for the next mixing."""
        return (0 if self._rows is None else len(self._rows)) / self._size

    def _counted_sequences(self) -> Iterator[Tensor]:
        self._n_sequences, self._first_text = 0, self._store.n_dataset_processed
        for sequence in self._tokenized():
            self._n_sequences += 1
            yield sequence

    @torch.no_grad()
    def __next__(self) -> Tensor:
        batch_size: int = self._store.train_batch_size_tokens
        while not self._n_batches:
            self.before_model()
            self._mix_in(next(self._loader), batch_size)
        assert self._rows is not None
        batch, self._rows = self._rows[:batch_size], self._rows[batch_size:]
        self._n_batches -= 1
        if batch.data_ptr() % 64:
            batch = batch.clone()  # matrix products may round by where in memory a batch begins
        self._handed_out.append(batch)
        return batch

    def _mix_in(self, new: Tensor, batch_size: int) -> None:
        """Add activations; once there are enough, shuffle, and serve all but a share of them."""
        rows = new if self._rows is None else torch.cat([self._rows, new])
        if len(rows) >= self._size:
            if self._store.activations_mixing_fraction > 0:
                rows = rows[torch.randperm(len(rows))]
            self._n_batches = max(1, (len(rows) - self._kept) // batch_size)
        self._rows = rows

    def state_dict(self) -> dict[str, Tensor]:
        """Return the buffer's rows, with batches that were not trained on, and where it is."""
        waiting = list(self._handed_out)
        for index, batch in enumerate(self._handed_out):
            if batch is self.trained_on:
                waiting = waiting[index + 1 :]
        rows = waiting if self._rows is None else [*waiting, self._rows]
        counts = {
            "n_batches": self._n_batches + len(waiting),
            "n_sequences": self._n_sequences,
            "n_texts": self._store.n_dataset_processed - self._first_text,
            "n_texts_before": self._first_text,
            "cached_row": getattr(self._store, "current_row_idx", 0),
        }
        state = {name: torch.tensor(count) for name, count in counts.items()}
        return {"rows": torch.cat(rows), **state} if rows else state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where `state` was taken. Raises ConfigError where the texts are other ones."""
        store, count = self._store, {k: int(v) for k, v in state.items() if k != "rows"}
        rows = state.get("rows")
        self._rows = None if rows is None else rows.to(store.device, copy=True)
        self._n_batches = count["n_batches"]
        skipped = tqdm(range(count["n_sequences"]), desc="Reading texts again", leave=False)
        read = sum(1 for _ in zip(skipped, store.iterable_sequences))
        if (read, store.n_dataset_processed) != (count["n_sequences"], count["n_texts"]):
            raise ConfigError(
                f"The training texts are not those that the run has read: {count['n_sequences']:,} "
                f"sequences came from {count['n_texts']:,} texts, now {read:,} from "
                f"{store.n_dataset_processed:,}. A run can only be resumed on its own data."
            )
        self._first_text = count["n_texts_before"]
        store.n_dataset_processed += self._first_text
        if store.cached_activation_dataset is not None:
            store.current_row_idx = count["cached_row"]
