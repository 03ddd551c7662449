"""`feature_acts` as SAELens's trainer gets them: the dense matrix to look at, entries inside."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from support.planted import D_IN, D_SAE, make_trainer, planted_batches
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae_gated_plugin.core.active import Active
from sae_gated_plugin.core.support import flat_nonzero, make_support
from sae_gated_plugin.core.support_tensor import Content, SupportTensor
from sae_gated_plugin.metrics.registered import training_metrics

Operation = Callable[[Any], Any]


def both(
    seed: int = 0, shape: tuple[int, int] = (6, 16), density: float = 0.3
) -> tuple[Any, Tensor]:
    """The same matrix as entries and dense; some entries are 0, as where a magnitude is."""
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(shape, generator=generator) < density
    dense = torch.randn(shape, generator=generator).where(on, 0.0)
    dense[torch.rand(shape, generator=generator) < 0.1] = 0
    flat = flat_nonzero(on)
    support = make_support(flat, *shape)
    return SupportTensor(Content(support, dense.view(-1)[flat])), dense


def equal(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        torch.testing.assert_close(found.to_dense(), expected.to_dense(), equal_nan=True)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            equal(one, other)
    else:
        assert found == expected


# What SAELens 6.51.2 to 6.54.12 compute from it, in a step and for their log.
TRAINER: dict[str, Operation] = {
    "did_fire": lambda acts: acts.bool().float().sum(-2).bool(),
    "act_freq_scores": lambda acts: acts.bool().float().sum(0),
    "l0": lambda acts: acts.bool().float().sum(-1).to_dense().mean(),
}
# And what plugins may count without a matrix.
COUNTED: dict[str, Operation] = {
    "detach": lambda acts: acts.detach(),
    "clone": lambda acts: acts.clone(),
    "double": lambda acts: acts.double(),
    "half": lambda acts: acts.to(torch.bfloat16),
    "abs": lambda acts: acts.abs(),
    "> 0": lambda acts: acts > 0,
    "!= 0": lambda acts: acts != 0,
    "fired": lambda acts: (acts > 0.5).sum(0),
    "fired at all": lambda acts: (acts != 0).sum(),
    "l1 of tokens": lambda acts: acts.abs().sum(-1),
    "mass of latents": lambda acts: acts.sum(0),
    "mass": lambda acts: acts.sum(),
    "coo": lambda acts: acts.to_sparse_coo(),
}
ANYTHING: dict[str, Operation] = {
    "> -1": lambda acts: acts > -1,
    "!= 1": lambda acts: acts != 1,
    "< 0": lambda acts: acts < 0,
    "sum of both": lambda acts: acts.sum((0, 1)),
    "sum kept": lambda acts: acts.sum(0, keepdim=True),
    "sum in half": lambda acts: acts.bfloat16().sum(0),
    "sum as double": lambda acts: acts.sum(0, dtype=torch.float64),
    "mean": lambda acts: acts.mean(0),
    "max": lambda acts: acts.max(-1).values,
    "topk": lambda acts: acts.topk(3).values,
    "matmul": lambda acts: acts @ torch.arange(2.0 * acts.shape[-1]).view(-1, 2).to(acts.dtype),
    "from the right": lambda acts: torch.ones(2, acts.shape[0], dtype=acts.dtype) @ acts,
    "arithmetic": lambda acts: (2 - acts * 3) / 4 + acts,
    "exp": lambda acts: acts.exp(),
    "row": lambda acts: acts[1],
    "rows": lambda acts: [row.sum() for row in acts],
    "chosen": lambda acts: acts[torch.tensor([2, 0])],
    "masked": lambda acts: acts[acts > 0],
    "transposed": lambda acts: acts.T,
    "reshaped": lambda acts: acts.view(2, -1),
    "joined": lambda acts: torch.cat([acts, acts]),
    "into another": lambda acts: torch.zeros(acts.shape, dtype=acts.dtype).add_(acts),
    "csr": lambda acts: acts.to_sparse(1),
    "nonzero": lambda acts: acts.nonzero(),
    "isfinite": lambda acts: acts.isfinite().all(),
    "like": lambda acts: torch.zeros_like(acts),
    "numpy": lambda acts: acts.float().numpy().tolist(),
    "list": lambda acts: acts.tolist(),
    "text": lambda acts: [str(acts), repr(acts), f"{acts}"],
    "deepcopy": copy.deepcopy,
    "pickle": lambda acts: pickle.loads(pickle.dumps(acts)),
    "saved": lambda acts: saved(acts),
    "shape": lambda acts: [acts.shape, acts.stride(), acts.layout, acts.numel(), acts.is_sparse],
}
IN_PLACE: dict[str, Operation] = {
    "add_": lambda acts: acts.add_(1),
    "relu_": lambda acts: acts.relu_(),
    "rows written": lambda acts: acts[0].fill_(7),
    "set": lambda acts: acts.__setitem__((slice(None), 3), 2.0),
    "masked set": lambda acts: acts.__setitem__(acts > 1, 0.0),
    "copy of": lambda acts: acts.copy_(torch.ones(acts.shape)),
    "detached": lambda acts: acts.detach().zero_(),
}


def saved(tensor: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", TRAINER)
@pytest.mark.parametrize("density", [0, 0.3, 1])
def test_what_the_trainer_asks_is_counted_to_the_same_bits(name: str, density: float) -> None:
    acts, dense = both(density=density, shape=(50, 24))
    found, expected = TRAINER[name](acts), TRAINER[name](dense)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert type(found) is Tensor
    assert acts.entries is not None


@pytest.mark.parametrize("name", COUNTED)
def test_what_else_is_read_off_the_entries(name: str) -> None:
    acts, dense = both()
    found = COUNTED[name](acts)
    assert acts.entries is not None
    if isinstance(found, SupportTensor):
        assert found.entries is not None
    equal(found, COUNTED[name](dense))


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(3, 6), st.sampled_from([4, 8, 10])),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    names=st.lists(st.sampled_from([*COUNTED, *ANYTHING, *IN_PLACE]), min_size=1, max_size=4),
)
def test_anything_is_as_with_the_dense_matrix(
    seed: int, shape: tuple[int, int], density: float, names: list[str]
) -> None:
    """One operation after another, some of which write into it, and what is left at the end."""
    pair = both(seed, (2 * shape[0], shape[1]), density)
    for name in names:
        operation = {**COUNTED, **ANYTHING, **IN_PLACE}[name]
        found, expected = (operation(acts) for acts in pair)
        equal(found, expected)
    equal(*pair)


@pytest.mark.parametrize("leaf", [False, True])
def test_gradients_through_it_are_the_dense_ones(leaf: bool) -> None:
    """A penalty of a user's own; with `leaf` one who wants the gradient of the codes."""
    weight = torch.randn(16, 3, requires_grad=True)
    grads: list[list[Tensor]] = []
    for acts in both():
        wanted = [weight, acts.requires_grad_()] if leaf else [weight]
        loss = ((acts @ weight).square().sum() + acts.abs().sum(0) @ weight[:, 0]) * acts.sum()
        grads.append(list(torch.autograd.grad(loss, wanted)))
    for found, expected in zip(*grads):
        torch.testing.assert_close(found, expected)
    acts, _ = both()
    acts.requires_grad_()
    out = (acts @ weight).sum()
    with pytest.raises(RuntimeError, match="in-place"):
        acts.add_(1)
    out.backward()


# --- in SAELens's trainers ------------------------------------------------------------------------

STATE = ("act_freq_scores", "n_forward_passes_since_fired", "n_frac_active_samples")


def trained(architecture: str, many: bool) -> tuple[Any, ...]:
    """What eight steps leave, and the log of each."""
    trainer = make_trainer(architecture, backend="sparse", l1_coefficient=0.5)
    trainer.cfg.logger.log_to_wandb = True
    trainer.cfg.logger.wandb_log_frequency = 1
    trainers = {"a": trainer}
    if many:
        second = make_trainer(architecture, backend="sparse", l1_coefficient=0.1).sae
        multi = MultiSAETrainer(
            trainer.cfg, {"a": trainer.sae, "b": second}, {"a": "x", "b": "x"}, iter(())
        )
        trainers = multi.trainers
    logs: list[Any] = []
    for batch in planted_batches(8):
        for one in trainers.values():
            output = one.step(batch)
            logs.append(one.build_train_step_log_dict(output, 0))
            one.n_training_steps += 1
    states = [getattr(one, name) for one in trainers.values() for name in STATE]
    return states, logs, [one.sae.state_dict() for one in trainers.values()]


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("architecture", ["gated", "prolu"])
def test_training_leaves_the_same_bits_as_with_dense_activations(
    architecture: str, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trained(architecture, many)
    with monkeypatch.context() as patch:
        patch.setattr(Active, "matrix", lambda active, acts: active.dense(acts).detach())  # pyright: ignore
        expected = trained(architecture, many)
    for one, other in zip(found[0], expected[0]):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    assert found[1] == expected[1]
    for one, other in zip(found[2], expected[2]):
        assert all(torch.equal(one[name], other[name]) for name in other)


class Largest(TorchDispatchMode):
    """The largest dense tensor that any operation gives; a `SupportTensor` holds none."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, SupportTensor) for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and one.layout is torch.strided:
                self.numel = max(self.numel, one.numel())
        return out


def test_no_step_makes_a_matrix_of_tokens_by_latents() -> None:
    trainer = make_trainer("gated", backend="sparse")
    trainer.sae.b_gate.data.fill_(-1.0)
    trainer.cfg.logger.log_to_wandb = True
    trainer.cfg.logger.wandb_log_frequency = 1
    x = torch.randn(4096, D_IN)
    with Largest() as largest:
        output = trainer.step(x)
        log = trainer.build_train_step_log_dict(output, 0)
    assert {"metrics/gamma", "metrics/l0", "metrics/dead_share"} <= log.keys()
    nnz = output.feature_acts.entries[1].numel()
    assert largest.numel < len(x) * D_SAE
    assert largest.numel <= max(512 * D_SAE, x.numel(), 2 * nnz)
    with largest:
        output.feature_acts.exp()
    assert largest.numel == len(x) * D_SAE


def test_metrics_see_what_they_see_of_a_dense_matrix() -> None:
    acts, dense = both(shape=(64, 16))
    x = torch.randn(64, 4)
    assert training_metrics(x, x + 1, acts) == training_metrics(x, x + 1, dense)
    support, values = acts.entries
    bad = Content(support, values.index_fill(0, torch.tensor([0]), torch.nan))
    assert "l0" not in training_metrics(x, x + 1, SupportTensor(bad))
    acts[0, 0] = dense[0, 0] = 3.0
    assert training_metrics(x, x + 1, acts) == training_metrics(x, x + 1, dense)
