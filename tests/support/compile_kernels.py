"""Compile every kernel for a GPU that need not be there, and print what each uses, as JSON.

    python tests/support/compile_kernels.py 768 90

Width of the rows, and compute capability without its dot. A process of its own, for the other tests
run the kernels in Triton's interpreter. The kernels and their arguments are those that a step of
that width launches.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sae_gated_plugin.core import cuda

#: Shared memory in bytes that one program may have.
SHARED = {80: 166_912, 89: 101_376, 90: 232_448}

TYPES = {
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def launches(width: int, shared: int, dtype: torch.dtype) -> list[tuple[Any, Any, Any]]:
    """(kernel, arguments, options) of one step, on tensors without data."""
    found: list[tuple[Any, Any, Any]] = []
    cuda.launch = lambda kernel, _, *arguments, **options: found.append(
        (kernel, arguments, options)
    )
    cuda.read = lambda numbers: [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 200_000.0]
    cuda._tile = lambda device: cuda.tile_for(shared)
    x, W = (torch.empty(n, width, dtype=dtype, device="meta") for n in (4096, 16384))
    step = cuda.find(x, W, W.new_empty(len(W)), 1.0)
    assert step
    support, values, keep = step
    for codes in ((values,), (values, keep)):
        support.sums_by_token(codes, W)
    for lefts in ((x,), (x, x)):
        support.dot_products(lefts, W)
    support.sum_by_latent(values, x)
    support.tangent_sum_by_latent(values, x, W, values)
    support.totals_by_latent(values)
    return found


def compiled(kernel: Any, arguments: Any, options: Any, capability: int) -> Any:
    names, constants, rest = kernel.arg_names, {}, {"enable_fp_fusion": True}
    signature, attributes = {}, {}
    for place, (name, value) in enumerate(zip(names, arguments)):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    for name, value in options.items():
        if name in names:
            signature[name] = "constexpr"
            constants[(names.index(name),)] = value
        else:
            rest[name] = value
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=rest)


def usage(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack: what did not fit into them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        done = subprocess.run(
            [tool, "-res-usage", path], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found, done.stdout
    return {"registers": int(found[1]), "stack": int(found[2])}


def main(width: int, capability: int) -> None:
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.float64)[: 2 if capability == 90 else 1]:
        seen: set[str] = set()
        for kernel, arguments, options in launches(width, SHARED[capability], dtype):
            # The same kernel with the same constants is one compilation.
            if f"{kernel.__name__} {options}" in seen:
                continue
            seen.add(f"{kernel.__name__} {options}")
            result = compiled(kernel, arguments, options, capability)
            rows.append(
                {
                    "kernel": kernel.__name__,
                    "dtype": str(dtype),
                    "shared": result.metadata.shared,
                    **usage(result.asm["cubin"]),
                }
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
