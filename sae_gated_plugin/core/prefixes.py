"""Reconstructions by nested prefixes of the latents; together they cost little more than one.

The latents from one width to the next are a slice. A prefix is the sum of its slices, so each entry
of the support is decoded once, and what prefixes add is one matrix of errors (N, d_in) each: added
up on the way there, and their gradients on the way back. On a CPU the slices are products of their
own, on a GPU one product of tokens that are cut into slices.
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
from .support import Part, outside_graphs


class Prefixes:
    """The prefixes of one batch's codes.

    widths: at least two, none below the one before it, the last one d_sae.
    """

    @outside_graphs
    def __init__(self, active: Active, widths: Sequence[int]):
        self.latents = [slice(*ends) for ends in pairwise((0, *widths))]
        self.n_tokens = active.n_tokens
        support = active.support
        self._support = support
        self._parts = None if support is None else support.slices(self.latents)

    def split(self, values: Tensor) -> list[Tensor]:
        """`values`, like `active.values`, of each slice, and zeros; differentiable."""
        if self._support is None:
            return [values[..., latents] for latents in self.latents]
        # Products, for numbers of entries would have to be waited for.
        col = self._support.col
        inside = [(col >= part.start) & (col < part.stop) for part in self.latents]
        return [values * mask.to(values.dtype) for mask in inside]

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
        if self._parts is None:
            rows = tangent_gradient(W_dec) if tangent else W_dec
            sizes = [latents.stop - latents.start for latents in self.latents]
            for values, own in zip(self.split(code), rows.split(sizes)):
                yield values @ own
            return
        sizes = [part.latents.stop - part.latents.start for part in self._parts]
        for part, own in zip(self._parts, W_dec.split(sizes)):
            if not len(own):
                yield W_dec.new_zeros(self.n_tokens, W_dec.shape[1])
                continue
            # index_select, not indexing: its gradient is an index_add.
            entries = part.entries
            values = code if isinstance(entries, slice) else code.index_select(0, entries)
            out = sparse_decode(values, own, part.support, tangent)
            yield from out.view(self.n_tokens, -1, out.shape[1]).unbind(1)


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
        parts: Sequence[Part],
        tangent: bool,
        frozen: bool,
        *codes: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.parts, ctx.tangent, ctx.frozen = parts, tangent, frozen
        n_tokens, d_in = target.shape
        with torch.autocast(W_dec.device.type, enabled=False):
            sums: list[list[Tensor]] = [[b_dec - target] for _ in codes]
            for part in parts:
                values = tuple(code[part.entries].to(W_dec.dtype) for code in codes)
                outs = part.support.sums_by_token(values, W_dec[part.latents])
                for before, out in zip(sums, outs):
                    for of_slice in out.view(n_tokens, -1, d_in).unbind(1):
                        before.append(of_slice.add_(before[-1]))
            results: list[Tensor] = []
            for _, *inner, last in sums:
                # By token: a norm of all of them at once takes three times as long.
                errors = [torch.linalg.vector_norm(error, dim=1) for error in inner]
                per_token = torch.stack(errors) * (1.0 if scale is None else scale.squeeze(1))
                results += [last + target, per_token.square().sum(1) / n_tokens]
        ctx.save_for_backward(W_dec, scale, *codes, *(s for of in sums for s in of[1:-1]))
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        W_dec, scale, *saved = ctx.saved_tensors
        parts: Sequence[Part] = ctx.parts
        n, n_inner = len(grads) // 2, grads[1].numel()
        codes, errors = saved[:n], saved[n:]
        at_once = (n_inner + 1) // len(parts)  # slices of a part
        grad_codes = [torch.empty_like(code) for code in codes]
        grad_W = torch.empty_like(W_dec) if ctx.needs_input_grad[0] else None
        grad_b = torch.zeros_like(W_dec[0])
        asked = W_dec.new_empty(len(grads[0]), at_once, W_dec.shape[1])
        with torch.autocast(W_dec.device.type, enabled=False):
            factor = 2 / len(asked) * (1.0 if scale is None else scale.square())
            for nth, code in enumerate(codes):
                learning = nth == 0 or not ctx.frozen
                # Of the sum up to a slice: what the later ones and their errors ask of it.
                running = grads[2 * nth].to(W_dec.dtype).contiguous()
                mine = errors[nth * n_inner : (nth + 1) * n_inner]
                for p, part in reversed(list(enumerate(parts))):
                    for j in reversed(range(at_once)):
                        i, into = p * at_once + j, asked[:, j]
                        if i < n_inner:
                            weight = factor * grads[2 * nth + 1][i]
                            running = torch.addcmul(running, mine[i], weight, out=into)
                        elif at_once > 1:
                            running = into.copy_(running)
                    flat = running if at_once == 1 else asked.view(-1, asked.shape[-1])
                    rows = W_dec[part.latents]
                    (dots,) = part.support.dot_products((flat,), rows)
                    grad_codes[nth][part.entries] = dots.to(code.dtype)
                    if learning and grad_W is not None:
                        values = code[part.entries].to(W_dec.dtype)
                        of_W = decoder_gradient(part.support, values, flat, rows, dots, ctx.tangent)
                        grad_W[part.latents] = of_W if nth == 0 else grad_W[part.latents] + of_W
                if learning:
                    grad_b += running.sum(0)
        return grad_W, grad_b, None, None, None, None, None, *grad_codes
