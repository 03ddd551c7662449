"""The CUDA form of the core on whatever there is."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from sae_gated_plugin.core import choice, cost

collect_ignore = [] if find_spec("triton") else ["test_kernels.py", "test_choice.py"]


@pytest.fixture(scope="module")
def kernels_everywhere() -> Iterator[None]:
    """The kernels run, in parts of 8 entries and samples of 8 tokens; where there is no GPU, in
    Triton's interpreter.
    """
    from sae_gated_plugin.core import cuda
    from sae_gated_plugin.core.kernels import screening

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "KERNEL_DEVICES", {device})
        patch.setattr(cuda, "PART", 8)
        patch.setattr(screening, "SAMPLE", 8)
        if device == "cpu":
            patch.setattr(choice, "_tried", lambda *_: True)
            patch.setattr(cost, "_properties", lambda _: ((9, 0), 132))
        yield
