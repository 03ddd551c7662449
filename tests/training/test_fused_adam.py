"""PyTorch's fused Adam: the same numbers up to rounding, the same bits when a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.planted import make_trainer, planted_batches
from support.process import Process
from support.resuming import TINY, WEIGHTS, interrupted
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook

from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.saelens_internals import fuse_adam
from sae_gated_plugin.sweeps.grid import load_sweep
from sae_gated_plugin.sweeps.sweep import run_sweep
from sae_gated_plugin.training import checkpoints
from sae_gated_plugin.training.run import resume, train


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.sae.parameters()])


def trained(fused: bool | None, steps: int = 20, trainer: Any = None, skip: int = 0) -> Any:
    if trainer is None:
        trainer = make_trainer("gated", l1_coefficient=0.5)
        fuse_adam(trainer, fused)
    for batch in list(planted_batches(steps))[skip:]:
        trainer.step(batch)
    return trainer


def saved_fused(run: Path) -> list[bool | None]:
    """Whether the newest checkpoint's optimizer was fused, by SAELens's own file."""
    path, _ = checkpoints.newest(run / "checkpoints") or pytest.fail("no checkpoint")
    state = torch.load(path / "trainer_state.pt", weights_only=True)
    return [group["fused"] for group in state["optimizer"]["param_groups"]]


def test_numbers_are_adams_up_to_rounding() -> None:
    fused, plain = trained(True), trained(False)
    assert not torch.equal(weights(fused), weights(plain)), "the fused kernel was not used"
    torch.testing.assert_close(weights(fused), weights(plain), rtol=1e-4, atol=1e-6)
    assert torch.equal(weights(trained(None)), weights(plain))  # on a CPU
    norms = fused.sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_a_new_training_on_cuda_is_fused() -> None:
    """Tensors without data say that they are on a GPU."""
    with FakeTensorMode():
        trainer = make_trainer("standard")
        parameters = [torch.nn.Parameter(torch.zeros(3, device="cuda"))]
        trainer.optimizer.param_groups[0]["params"] = parameters
        fuse_adam(trainer, None)
        assert trainer.optimizer.param_groups[0]["fused"] is True
        fuse_adam(trainer, False)
        assert trainer.optimizer.param_groups[0]["fused"] is False


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("now", [None, False, True])
def test_a_checkpoint_goes_on_as_it_began_or_as_told(
    before: bool, now: bool | None, tmp_path: Path
) -> None:
    """Also where its moments lie otherwise than the parameter, as those of others may."""
    half = trained(before, 10)
    for moments in half.optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = moments[name].contiguous()
    half.save_trainer_state(tmp_path)
    again = make_trainer("gated", l1_coefficient=0.5)
    again.sae.load_state_dict(half.sae.state_dict())
    again.load_trainer_state(tmp_path)
    fuse_adam(again, now)
    assert again.optimizer.param_groups[0]["fused"] is (before if now is None else now)
    trained(None, 20, again, skip=10)
    expected = trained(before, 20)
    if now in (None, before):
        assert torch.equal(weights(again), weights(expected))
    torch.testing.assert_close(weights(again), weights(expected), rtol=1e-4, atol=1e-6)


def test_an_interrupted_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    train(load_config(TINY), tmp_path / "whole", fused_adam=True)
    assert saved_fused(tmp_path / "whole") == [True]
    interrupted(TINY, tmp_path / "run", fused_adam=True)
    assert saved_fused(tmp_path / "run") == [True]
    resume(tmp_path / "run")
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def fused_in_steps(action: Any) -> set[bool | None]:
    """What the groups of all optimizers said in their steps."""
    seen: set[bool | None] = set()
    hook = register_optimizer_step_post_hook(
        lambda optimizer, *_: seen.update(group["fused"] for group in optimizer.param_groups)
    )
    try:
        action()
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("fused", [None, True])
def test_a_sweep_takes_the_option(
    small_run: dict[str, Any], fused: bool | None, tmp_path: Path
) -> None:
    small_run["sae"] = {"d_in": 128, "d_sae": 256}
    small_run["sweep"] = {
        "eval_tokens": 2048,
        "curves": [{"architecture": "gated"}, {"architecture": "topk", "k": 8}],
    }
    small_run["training_tokens"] = 2048
    sweep = load_sweep(small_run)
    seen = fused_in_steps(lambda: run_sweep(sweep, tmp_path / "s", fused_adam=fused))
    assert seen == {bool(fused)}


def test_the_command_lines_take_it(tiny_yaml: Path, tmp_path: Path) -> None:
    run = Process(
        *("train", tiny_yaml, "--fused-adam", "--output", tmp_path / "run"), log=tmp_path / "log"
    )
    assert run.wait() == 0, run.text()
    assert saved_fused(tmp_path / "run") == [True]
