"""What crosses between ranks in a step is what `sae-gated fits` says, however many latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from support.ranks import on_ranks
from support.runs import SMALL_RUN
from support.sharded import D_IN, N, guarded
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from sae_gated_plugin.architectures.base import training_step
from sae_gated_plugin.cli.tables import needs_table
from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.core import active, prefixes
from sae_gated_plugin.errors import ConfigError
from sae_gated_plugin.training.needs import bytes_per_step, needs

CASES: list[tuple[str, dict[str, Any]]] = [
    ("gated", {}),
    ("gated", {"target_l0": 3.0, "tie_encoders": False}),
    ("gated", {"apply_b_dec_to_input": False}),
    ("mlp_encoder", {}),
    ("prolu", {"target_l0": 3.0}),
    ("relu", {"dead_latents": "auxk"}),
    ("gated", {"matryoshka_widths": (5, 20)}),
    ("prolu", {"matryoshka_widths": (5, 20)}),
]
#: With 50 latents, the first of two ranks has none of the second slice.
WIDTHS = {"matryoshka_widths": (20,)}


class Collectives(TorchDispatchMode):
    """Counts the bytes of the tensors that this rank hands to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            if "allgather" in func.__name__:
                tensors = args[1]
            sent = sum(tensor.nbytes for tensor in tensors)
            self.bytes[func.__name__] = self.bytes.get(func.__name__, 0) + sent
        return func(*args, **(kwargs or {}))


def sent_in_one_step(case: Any, rank: int, size: int, d_sae: int) -> int:
    trainer = guarded(case, rank, size, d_sae=d_sae)
    trainer.n_forward_passes_since_fired[0] = 10  # one dead latent on each rank
    trainer.n_training_steps = 1
    batch = next(trainer.data_provider)
    with Collectives() as collectives:
        trainer.step(batch)
    return sum(collectives.bytes.values())


@pytest.fixture(scope="module", params=[2, 4])
def sent(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[list[list[int]]]:
    size: int = request.param

    def work(rank: int) -> list[list[int]]:
        return [[sent_in_one_step(case, rank, size, d) for d in (40, 160)] for case in CASES]

    return on_ranks(size, work, tmp_path_factory.mktemp("ranks") / str(size))


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_the_bytes_of_a_step(number: int, sent: list[list[list[int]]]) -> None:
    expected = bytes_per_step(guarded(CASES[number]).sae, N, width=8)
    assert expected >= 8 * N * D_IN
    for rank in sent:
        few_latents, many_latents = rank[number]
        assert few_latents == many_latents
        assert 0 <= many_latents - expected < 100


def test_the_account_of_memory() -> None:
    """Of the packaged model's run: 5 tensors of each parameter, of which latents' are divided."""
    one, two, *_ = needs(load_config(SMALL_RUN), (1, 2))
    d_in, d_sae, tokens = 128, 256, 512
    assert one["latents"] == 4 * 5 * (2 * d_in * d_sae + 3 * d_sae) == 2 * two["latents"]
    assert one["common"] == two["common"] == 4 * 5 * d_in
    assert one["sent"] == 0
    assert two["sent"] == 4 * (2 * tokens * d_in + d_in)
    table = needs_table(0.001, [one, two])
    assert table[-1].startswith("It fits in none of these")
    middle = (one["memory"] + two["memory"]) / 2e9
    assert needs_table(middle, [one, two])[-1].startswith("It fits in 2 ×")


def test_what_cannot_be_divided_fits_nowhere() -> None:
    sae = {**SMALL_RUN["sae"], "decoder_coherence": 1.0}
    with pytest.raises(ConfigError, match="decoder_coherence"):
        needs(load_config({**SMALL_RUN, "sae": sae}))


def test_sums_are_waited_for_when_the_rest_is_computed(tmp_path: Path) -> None:
    """A sum is begun when a part is there, and all are waited for after the last of the rest."""

    def events_of(flags: dict[str, Any], rank: int) -> list[str]:
        trainer = guarded(("gated", flags), rank, 2)
        events: list[str] = []
        all_reduce, penalty = dist.all_reduce, training_step.penalty

        class Waited:
            def __init__(self, work: Any):
                self.wait = noted("wait", work.wait)

        def noted(name: str, function: Any) -> Any:
            def called(*args: Any, **kwargs: Any) -> Any:
                events.append(name)
                return function(*args, **kwargs)

            return called

        def begin(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            done = all_reduce(tensor, *args, **kwargs)
            return done if tensor.ndim < 2 else Waited(events.append("sum") or done)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_reduce", begin)
            for module, name in ((active, "decode_active"), (prefixes, "sparse_decode")):
                patch.setattr(module, name, noted("decode", getattr(module, name)))
            patch.setattr(training_step, "penalty", noted("sparsity", penalty))
            trainer.step(next(trainer.data_provider))
        return events

    def work(rank: int) -> list[list[str]]:
        each = ({"backend": "sparse"}, {"backend": "dense"}, {"backend": "sparse", **WIDTHS})
        return [events_of(flags, rank) for flags in each]

    sparse = ["sum", "sum", "sparsity", "wait", "wait"]  # one pass decodes both
    dense = ["decode", "sum", "decode", *sparse[1:]]
    both, one = ["decode", "sum", "decode", "sum"], ["sum", "decode", "sum"]
    rest = ["sparsity", "sparsity", *["wait"] * 4]
    expected = [[sparse, dense, [*own, *own, *rest]] for own in (both, one)]
    assert on_ranks(2, work, tmp_path) == expected
