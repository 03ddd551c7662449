"""Reconstructions by nested prefixes of the latents; together they cost little more than one.

The latents from one width to the next are a slice. A prefix is the sum of its slices, so each entry
of the support is decoded once, and what prefixes add is one matrix of errors (N, d_in) each: added
up on the way there, and their gradients on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .active import Active
from .gradients import decoder_gradient, sparse_decode, tangent_gradient
from .support import Slice, outside_graphs


class Prefixes:
    """The prefixes of one batch's codes.

    widths: at least two, none below the one before it, the last one d_sae.
    """

    @outside_graphs
    def __init__(self, active: Active, widths: Sequence[int]):
        self.latents = [slice(*ends) for ends in pairwise((0, *widths))]
        self.n_tokens = active.n_tokens
        support = active.support
        self._parts = None if support is None else support.slices(self.latents)

    def split(self, values: Tensor) -> list[Tensor]:
        """`values`, like `active.values`, of each slice; differentiable."""
        if self._parts is None:
            return [values[..., latents] for latents in self.latents]
        # index_select, not indexing: its gradient is an index_add.
        return [values.index_select(0, part.entries) for part in self._parts]

    @outside_graphs
    def decode(
        self,
        codes: Sequence[Tensor],
        W_dec: Tensor,
        b_dec: Tensor,
        target: Tensor,
        scale: Tensor | None = None,
        tangent: bool = False,
        frozen: bool = True,
        begin_sum: Callable[[Tensor], Callable[[], Tensor]] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each code its reconstruction f W_dec + b_dec, (N, d_in), and the inner prefixes'
        squared errors, summed over d_in, means over tokens, (number of widths - 1,).

        codes: one or two, like `active.values`, zero outside the support; W_dec: (d_sae, d_in);
        b_dec: (d_in,); target: (N, d_in), what errors are taken from; scale: (N, 1), by which each
        token's are multiplied. Gradients reach the codes, W_dec and b_dec; frozen: these two only
        from the first code. tangent: as in `decode_active`. begin_sum: where other latents are
        elsewhere, begins the sum of a slice's part, (N, d_in), over all places; what it returns
        waits for it, as the iterator does. Every prefix's sum is then in memory.
        """
        target = target.detach().to(W_dec.dtype)
        if begin_sum is not None or self._parts is None:
            begun: list[tuple[list[Callable[[], Tensor]], Tensor]] = []
            for code in codes:
                parts = self._each(code, W_dec, tangent)
                begun.append(([(begin_sum or _at_once)(part) for part in parts], b_dec))
                if frozen:
                    W_dec, b_dec = W_dec.detach(), b_dec.detach()
            return (_summed_up(sums, bias, target, scale) for sums, bias in begun)
        out = _SparsePrefixes.apply(
            W_dec, b_dec, target, scale, self._parts, tangent, frozen, *codes
        )
        return zip(out[::2], out[1::2])

    def _each(self, code: Tensor, W_dec: Tensor, tangent: bool) -> Iterator[Tensor]:
        """Each slice's part of a reconstruction, (N, d_in)."""
        rows = W_dec if self._parts or not tangent else tangent_gradient(W_dec)
        sizes = [latents.stop - latents.start for latents in self.latents]
        for i, (values, own) in enumerate(zip(self.split(code), rows.split(sizes))):
            if self._parts is None:
                yield values @ own
            elif sizes[i]:
                yield sparse_decode(values, own, self._parts[i].support, tangent)
            else:
                yield W_dec.new_zeros(self.n_tokens, W_dec.shape[1])


def _at_once(part: Tensor) -> Callable[[], Tensor]:
    return lambda: part


def _summed_up(
    sums: Sequence[Callable[[], Tensor]], b_dec: Tensor, target: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A code's reconstruction and the inner prefixes' errors, from its slices' parts."""
    parts = [part() for part in sums]
    *inner, recons = accumulate([parts[0] + b_dec, *parts[1:]], torch.add)
    errors = torch.stack([part - target for part in inner])
    errors = errors if scale is None else errors * scale
    return recons, errors.square().sum((1, 2)) / len(target)


class _SparsePrefixes(torch.autograd.Function):
    """`Prefixes.decode` on a support: (recons, errors) of the first code, then of the second."""

    @staticmethod
    def forward(
        ctx: Any,
        W_dec: Tensor,
        b_dec: Tensor,
        target: Tensor,
        scale: Tensor | None,
        parts: Sequence[Slice],
        tangent: bool,
        frozen: bool,
        *codes: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.parts, ctx.tangent, ctx.frozen = parts, tangent, frozen
        with torch.autocast(W_dec.device.type, enabled=False):
            sums = [b_dec - target] * len(codes)
            errors = W_dec.new_empty(len(codes), len(parts) - 1)
            inner: list[Tensor] = []
            for i, part in enumerate(parts):
                values = tuple(code[part.entries].to(W_dec.dtype) for code in codes)
                slices = part.support.sums_by_token(values, W_dec[part.latents])
                sums = [of_slice.add_(before) for of_slice, before in zip(slices, sums)]
                if i < len(parts) - 1:
                    inner += sums
                    for error, code_sum in zip(errors[:, i], sums):
                        scaled = code_sum if scale is None else code_sum * scale
                        error.copy_(torch.linalg.vector_norm(scaled).square() / len(target))
        ctx.save_for_backward(W_dec, scale, *codes, *inner)
        return tuple(
            out for code_sum, error in zip(sums, errors) for out in (code_sum + target, error)
        )

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        W_dec, scale, *saved = ctx.saved_tensors
        n = len(grads) // 2
        codes, inner = saved[:n], saved[n:]
        learning = 1 if ctx.frozen else n  # how many codes move the decoder
        grad_codes = [torch.zeros_like(code) for code in codes]
        grad_W = torch.empty_like(W_dec) if ctx.needs_input_grad[0] else None
        with torch.autocast(W_dec.device.type, enabled=False):
            # Of the sum up to this slice: what the later ones and their errors ask of it.
            running = [grad.to(W_dec.dtype) for grad in grads[::2]]
            factor = 2 / len(running[0]) * (1.0 if scale is None else scale.square())
            for i, part in reversed(list(enumerate(ctx.parts))):
                rows = W_dec[part.latents]
                if i < len(ctx.parts) - 1:
                    first = i == len(ctx.parts) - 2  # the gradients that came in are not ours
                    running = [
                        torch.addcmul(grad, error, factor * weight[i], out=None if first else grad)
                        for grad, error, weight in zip(running, inner[i * n :], grads[1::2])
                    ]
                dots = part.support.dot_products(tuple(running), rows)
                for grad_code, dot in zip(grad_codes, dots):
                    grad_code[part.entries] = dot.to(grad_code.dtype)
                if grad_W is not None:
                    asked = [
                        decoder_gradient(
                            part.support,
                            code[part.entries].to(W_dec.dtype),
                            grad,
                            rows,
                            dot,
                            ctx.tangent,
                        )
                        for code, grad, dot in list(zip(codes, running, dots))[:learning]
                    ]
                    grad_W[part.latents] = sum(asked[1:], asked[0])
            grad_b = sum(grad.sum(0) for grad in running[:learning])
        return grad_W, grad_b, None, None, None, None, None, *grad_codes  # type: ignore[return-value]
