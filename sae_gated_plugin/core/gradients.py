"""The gradients of encoding and decoding on a support, and of their dense forms."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .support import Support


class _DenseEncode(torch.autograd.Function):
    """(x - b_dec) W_enc whose b_dec gradient is a matrix-vector product, not an N x d_in matmul.

    Written in differentiable operations, so second derivatives work as for a plain matmul.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_dec: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec)
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        ctx.dtype = torch.get_autocast_dtype(device) if autocast else W_enc.dtype
        with torch.autocast(device, enabled=False):
            m = centre(x, b_dec, W_enc).to(ctx.dtype) @ W_enc.to(ctx.dtype)
            return m.view(*x.shape[:-1], W_enc.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_dec = ctx.saved_tensors
        grad = grads[0].reshape(-1, W_enc.shape[1])
        grad_x = grad_W = grad_b = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = (grad.to(ctx.dtype) @ W_enc.to(ctx.dtype).T).to(x.dtype).view_as(x)
            if ctx.needs_input_grad[1]:
                centred = centre(x, b_dec, W_enc).to(ctx.dtype)
                # (d_sae, d_in) and its view: the layout of a column-contiguous W_enc.
                grad_W = (grad.to(ctx.dtype).T @ centred).to(W_enc.dtype).T
            if ctx.needs_input_grad[2]:
                grad_b = -(W_enc @ grad.sum(0, dtype=W_enc.dtype)).to(b_dec.dtype)
        return grad_x, grad_W, grad_b


def dense_encode(x: Tensor, W_enc: Tensor, b_dec: Tensor | None) -> Tensor:
    """(x - b_dec) W_enc, (..., d_sae), in autocast's dtype where that is on."""
    return cast(Tensor, _DenseEncode.apply(x, W_enc, b_dec))


class _SparseEncode(torch.autograd.Function):
    """Attach gradients to values of (x - b_dec) W_enc that were already found on a support."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_dec: Tensor | None,
        values: Tensor,
        support: Support,
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec)
        ctx.support = support
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, W_enc, b_dec = ctx.saved_tensors
        support: Support = ctx.support
        (grad,) = grads
        grad_x = grad_W = grad_b = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                (grad_x,) = support.sums_by_token((grad,), latent_rows(W_enc))
                grad_x = grad_x.to(x.dtype).view_as(x)
            if ctx.needs_input_grad[1]:
                # (d_sae, d_in) and its view: the layout of a column-contiguous W_enc.
                grad_W = support.sum_by_latent(grad, centre(x, b_dec, W_enc)).T
            if ctx.needs_input_grad[2]:
                grad_b = -(W_enc @ support.totals_by_latent(grad))
        return grad_x, grad_W, grad_b, None, None


def with_gradient(
    x: Tensor, W_enc: Tensor, b_dec: Tensor | None, values: Tensor, support: Support
) -> Tensor:
    """`values` (nnz,) of (x - b_dec) W_enc on a support, with gradients to x, W_enc and b_dec."""
    return cast(Tensor, _SparseEncode.apply(x, W_enc, b_dec, values, support))


class _SparseDecode(torch.autograd.Function):
    """Sparse times dense, with a sampled product and a transposed sparse product behind it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, support: Support, tangent: bool) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.support, ctx.tangent = support, tangent
        with torch.autocast(values.device.type, enabled=False):
            return support.sums_by_token((values.to(W_dec.dtype),), W_dec)[0]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        support: Support = ctx.support
        grad = grads[0].to(W_dec.dtype).contiguous()
        grad_values = grad_W = None
        with torch.autocast(grad.device.type, enabled=False):
            wide = values.to(W_dec.dtype)
            if ctx.needs_input_grad[0] or ctx.tangent:
                (grad_values,) = support.dot_products((grad,), W_dec)
            if ctx.needs_input_grad[1]:
                grad_W = decoder_gradient(support, wide, grad, W_dec, grad_values, ctx.tangent)
            if grad_values is not None:
                grad_values = grad_values.to(values.dtype)
        return grad_values, grad_W, None, None


def sparse_decode(values: Tensor, W_dec: Tensor, support: Support, tangent: bool) -> Tensor:
    """Sum of values (nnz,) times decoder rows over each token's entries, (N, d_in)."""
    return cast(Tensor, _SparseDecode.apply(values, W_dec, support, tangent))


class _SparseDecodeBoth(torch.autograd.Function):
    """`_SparseDecode` of two codes on one support; each decoder row is read once for both.

    frozen: the second code's decode gives W_dec no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        auxiliary: Tensor,
        W_dec: Tensor,
        support: Support,
        tangent: bool,
        frozen: bool,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(values, auxiliary, W_dec)
        ctx.support, ctx.tangent, ctx.frozen = support, tangent, frozen
        with torch.autocast(values.device.type, enabled=False):
            both = (values.to(W_dec.dtype), auxiliary.to(W_dec.dtype))
            return tuple(support.sums_by_token(both, W_dec))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        *codes, W_dec = ctx.saved_tensors
        support: Support = ctx.support
        both = [grad.to(W_dec.dtype).contiguous() for grad in grads]
        grad_W = None
        with torch.autocast(W_dec.device.type, enabled=False):
            dots = support.dot_products((both[0], both[1]), W_dec)
            if ctx.needs_input_grad[2]:
                for code, grad, dot in list(zip(codes, both, dots))[: 1 if ctx.frozen else 2]:
                    part = decoder_gradient(
                        support, code.to(W_dec.dtype), grad, W_dec, dot, ctx.tangent
                    )
                    grad_W = part if grad_W is None else grad_W.add_(part)
        first, second = (dot.to(code.dtype) for dot, code in zip(dots, codes))
        return first, second, grad_W, None, None, None


def sparse_decode_both(
    values: Tensor, auxiliary: Tensor, W_dec: Tensor, support: Support, tangent: bool, frozen: bool
) -> tuple[Tensor, Tensor]:
    """`sparse_decode` of two codes at once. frozen: the second gives W_dec no gradient."""
    outs = _SparseDecodeBoth.apply(values, auxiliary, W_dec, support, tangent, frozen)
    return cast(tuple[Tensor, Tensor], outs)


def decoder_gradient(
    support: Support,
    values: Tensor,
    grad: Tensor,
    W_dec: Tensor,
    dots: Tensor | None,
    tangent: bool,
) -> Tensor:
    """W_dec's gradient (d_sae, d_in) from that of a reconstruction, (N, d_in).

    values: the code, (nnz,); dots: (nnz,), the code's gradient, wanted where tangent.
    """
    if tangent and dots is not None:
        return support.tangent_sum_by_latent(values, grad, W_dec, dots)
    return support.sum_by_latent(values, grad)


class _TangentGradient(torch.autograd.Function):
    """Identity whose gradient has no component along the (unit) rows."""

    @staticmethod
    def forward(ctx: Any, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(W_dec)
        return W_dec.view_as(W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (W_dec,) = ctx.saved_tensors
        along = torch.linalg.vecdot(grads[0], W_dec)
        return torch.addcmul(grads[0], W_dec, along[:, None], value=-1)


def tangent_gradient(W_dec: Tensor) -> Tensor:
    """W_dec (d_sae, d_in), unit rows, whose gradient will have no component along them."""
    return cast(Tensor, _TangentGradient.apply(W_dec))


def centre(x: Tensor, b_dec: Tensor | None, like: Tensor) -> Tensor:
    """x - b_dec in the dtype of `like`, (N, d_in)."""
    x = x.reshape(-1, x.shape[-1]).to(like.dtype)
    return x if b_dec is None else x - b_dec


def latent_rows(weight: Tensor) -> Tensor:
    """(d_in, d_sae) as contiguous (d_sae, d_in) rows; free for a column-contiguous weight."""
    return weight.T.contiguous()
