"""The gradients of the sparse operations."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .products import gather_rows, gather_sum_by_latent, latent_rows, sampled_product
from .support import Support


class DenseEncode(torch.autograd.Function):
    """(x - b_dec) W_enc whose b_dec gradient is a matrix-vector product, not an N x d_in matmul.

    Written in differentiable operations, so second derivatives work as for a plain matmul.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_dec: Tensor | None) -> Tensor:
        """The values."""
        ctx.save_for_backward(x, W_enc, b_dec)
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        ctx.dtype = torch.get_autocast_dtype(device) if autocast else W_enc.dtype
        with torch.autocast(device, enabled=False):
            m = centre(x, b_dec, W_enc).to(ctx.dtype) @ W_enc.to(ctx.dtype)
            return m.view(*x.shape[:-1], W_enc.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients."""
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
                grad_x = gather_rows(support, grad, latent_rows(W_enc)).to(x.dtype).view_as(x)
            if ctx.needs_input_grad[1]:
                # (d_sae, d_in) and its view: the layout of a column-contiguous W_enc.
                grad_W = gather_sum_by_latent(support, grad, centre(x, b_dec, W_enc)).T
            if ctx.needs_input_grad[2]:
                total = grad.new_zeros(support.d_sae).index_add_(0, support.col, grad)
                grad_b = -(W_enc @ total)
        return grad_x, grad_W, grad_b, None, None


def with_gradient(
    x: Tensor, W_enc: Tensor, b_dec: Tensor | None, values: Tensor, support: Support
) -> Tensor:
    """`values`, exact, with the gradients of the product they come from."""
    return cast(Tensor, _SparseEncode.apply(x, W_enc, b_dec, values, support))


class SparseDecode(torch.autograd.Function):
    """Sparse times dense, with a sampled product and a transposed sparse product behind it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, support: Support, tangent: bool) -> Tensor:
        """The values."""
        ctx.save_for_backward(values, W_dec)
        ctx.support, ctx.tangent = support, tangent
        with torch.autocast(values.device.type, enabled=False):
            return gather_rows(support, values.to(W_dec.dtype), W_dec)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The gradients."""
        values, W_dec = ctx.saved_tensors
        support: Support = ctx.support
        grad = grads[0].to(W_dec.dtype).contiguous()
        grad_values = grad_W = None
        with torch.autocast(grad.device.type, enabled=False):
            wide = values.to(W_dec.dtype)
            if ctx.needs_input_grad[0] or ctx.tangent:
                grad_values = sampled_product(grad, W_dec.T, support)
            if ctx.needs_input_grad[1]:
                grad_W = gather_sum_by_latent(support, wide, grad)
                if ctx.tangent and grad_values is not None:
                    # row . grad_W summed over the entries: no pass over the two matrices.
                    along = grad.new_zeros(support.d_sae)
                    along.index_add_(0, support.col, wide * grad_values)
                    grad_W.addcmul_(W_dec, along[:, None], value=-1)
            if grad_values is not None:
                grad_values = grad_values.to(values.dtype)
        return grad_values, grad_W, None, None


class TangentGradient(torch.autograd.Function):
    """Identity whose gradient has no component along the (unit) rows."""

    @staticmethod
    def forward(ctx: Any, W_dec: Tensor) -> Tensor:
        """The values."""
        ctx.save_for_backward(W_dec)
        return W_dec.view_as(W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """The gradients."""
        (W_dec,) = ctx.saved_tensors
        along = torch.linalg.vecdot(grads[0], W_dec)
        return torch.addcmul(grads[0], W_dec, along[:, None], value=-1)


def centre(x: Tensor, b_dec: Tensor | None, like: Tensor) -> Tensor:
    """x - b_dec in the dtype of `like`, (N, d_in)."""
    x = x.reshape(-1, x.shape[-1]).to(like.dtype)
    return x if b_dec is None else x - b_dec
