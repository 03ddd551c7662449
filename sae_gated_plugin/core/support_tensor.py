"""A matrix that is zero off a support, as a tensor: SAELens counts it, all else sees it dense.

SAELens's trainer takes `feature_acts` (N, d_sae) in every step and asks on how many tokens each
latent fired, by `.bool().float().sum(0)`. On torch's sparse tensors each such sum is a sort, dense
is a matrix of the size that the sparse core avoids. Here it is a count over the entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass
from torch.utils._pytree import tree_map
from typing_extensions import override

from .support import Support

_aten = torch.ops.aten

#: Entry by entry, and 0 stays 0.
_KEEP_ZERO = {_aten._to_copy.default, _aten.clone.default, _aten.abs.default}

#: What reads memory past torch's dispatch, or makes text or bytes of it.
_READ_MEMORY = {
    *(Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.data_ptr, Tensor.untyped_storage),
    *(Tensor.__dlpack__, Tensor.__deepcopy__, Tensor.__reduce_ex__, Tensor.__repr__),
    *(Tensor.__format__, Tensor.to_dense),
}


class Content:
    """What a `SupportTensor` and its `detach()` share: entries, or the matrix once it is wanted."""

    def __init__(self, support: Support, values: Tensor):
        self.support, self.values = support, values
        self.whole: Tensor | None = None

    def dense(self) -> Tensor:
        """The matrix, (N, d_sae), always the same one: what is written into it stays."""
        if self.whole is None:
            shape = (self.support.n_tokens, self.support.d_sae)
            whole = self.values.new_zeros(shape[0] * shape[1])
            self.whole = whole.index_put_((self.support.flat,), self.values).view(shape)
        return self.whole


class SupportTensor(Tensor):
    """(N, d_sae), `values` (nnz,) on a support, without gradient; shape, dtype and device are those
    of the dense matrix, and so is all that is computed from it.

    Sums of float32, float64 and booleans over tokens, latents or both, conversions, absolutes,
    comparisons with 0 and `to_sparse_coo` read the entries alone. Anything else makes the matrix,
    once. Copies and pickles are plain dense tensors.
    """

    content: Content

    def __new__(cls, content: Content) -> SupportTensor:
        """A view of `content`."""
        values, shape = content.values, (content.support.n_tokens, content.support.d_sae)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=values.dtype, device=values.device)
        made.content = content
        return made

    @property
    def entries(self) -> tuple[Support, Tensor] | None:
        """The support and the values on it, (nnz,); None once the matrix was made."""
        content = self.content
        return (content.support, content.values) if content.whole is None else None

    @override
    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _READ_MEMORY:
            args = tree_map(_dense, args)
        with DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @override
    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        first: Any = args[0] if args else None
        if isinstance(first, cls):
            if func is _aten.detach.default:
                return cls(first.content)
            found = _on_entries(func, first, args[1:], kwargs)
            if found is not None:
                return found
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs))


def _dense(value: Any) -> Any:
    return value.content.dense() if isinstance(value, SupportTensor) else value


def _on_entries(
    func: Any, acts: SupportTensor, rest: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """`func` computed on the entries alone; None where that is not enough."""
    if acts.entries is None:
        return None
    support, values = acts.entries
    same_place = kwargs.get("device", acts.device) == acts.device and "layout" not in kwargs
    kept = func in _KEEP_ZERO and same_place
    kept |= func is _aten.gt.Scalar and rest[0] >= 0
    kept |= func is _aten.ne.Scalar and rest[0] == 0
    if kept:
        return SupportTensor(Content(support, func(values, *rest, **kwargs)))
    if func is _aten._to_sparse.default and not (rest or kwargs):
        indices = support.indices
        return torch.sparse_coo_tensor(
            indices, values, acts.shape, is_coalesced=True, check_invariants=False
        )
    if kwargs or values.dtype not in (torch.float32, torch.float64, torch.bool):
        return None
    if func is _aten.sum.default:
        return values.sum()
    axes: Any = rest[0] if func is _aten.sum.dim_IntList and len(rest) == 1 else None
    if len(axes or ()) != 1:
        return None
    counted = values.float() if values.dtype == torch.bool else values
    if axes[0] in (0, -2):
        sums = support.totals_by_latent(counted)
    else:
        sums = counted.new_zeros(support.n_tokens).index_add_(0, support.row, counted)
    return sums.long() if values.dtype == torch.bool else sums
