"""What the README shows runs as it stands, in its order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runnable = [block for block in BLOCKS if "MySAE" not in block]
    assert len(runnable) == 1
    names: dict[str, object] = {}
    for block in runnable:
        exec(compile(block, str(README), "exec"), names)
    assert (tmp_path / "my_sae" / "sae_weights.safetensors").exists()
    sae: Any = names["sae"]
    assert sae.encode(torch.randn(4, 128)).shape == (4, 1024)


def test_every_link_of_the_readme_leads_somewhere() -> None:
    for page in (README, README.parent / "configs" / "README.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), target
