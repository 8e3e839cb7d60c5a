"""The operations that every step runs, each with its analytic gradient.

Written out operation by operation, a sample and its rate allocate and pass over a dozen tensors
of the sample's size. Here each is one autograd node that reads its inputs once, works in place on
a block that stays in the cache, and keeps what its gradient needs: one tensor for the sample, the
inputs themselves for the others.

The ``plain_*`` functions are the same mathematics as a composition of torch's operations: the
reference in the tests, and what runs wherever torch differentiates or traces by itself
(torch.compile, which fuses better; torch.func; forward-mode derivatives).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

# Elements per thread of a block: 512 kB of float32, of which a few fit into the L2 cache.
_BLOCK = 1 << 17


def sample(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """The sample mean + exp(logvar / 2) * noise.

    Args:
        mean: Means, of shape (B, ...).
        logvar: Log-variances, of the same shape and dtype.
        noise: Of the same shape and dtype. It is used up: the gradient's tensor takes its place.
    """
    if not _eager():
        return plain_sample(mean, logvar, noise)
    z, _ = _Sample.apply(mean, logvar, noise)
    return z  # type: ignore[no-any-return]


def plain_sample(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """What :func:`sample` computes; the noise stays."""
    return torch.addcmul(mean, noise, torch.exp(logvar / 2))


def standard_rate(mean: Tensor, logvar: Tensor) -> Tensor:
    """1/2 sum(mean^2 + exp(logvar) - 1 - logvar) over the last dimension, in nats.

    Args:
        mean: Means, of shape (..., B, D).
        logvar: Log-variances, of the same shape and dtype.

    Returns:
        Rates of shape (..., B).
    """
    if not _eager():
        return plain_standard_rate(mean, logvar)
    return _StandardRate.apply(mean, logvar)  # type: ignore[no-any-return]


def plain_standard_rate(mean: Tensor, logvar: Tensor) -> Tensor:
    """What :func:`standard_rate` computes."""
    return (mean.square() + (torch.expm1(logvar) - logvar)).sum(dim=-1) / 2


def squash(raw: Tensor, centre: float, reach: float) -> Tensor:
    """The bounded centre + reach * atan((raw - centre) / reach).

    Args:
        raw: Any real numbers, of any shape.
        centre: The number that is mapped to itself with slope 1.
        reach: 2 / pi times the distance of the bounds from the centre.
    """
    if not _eager():
        return plain_squash(raw, centre, reach)
    return _Squash.apply(raw, centre, reach)  # type: ignore[no-any-return]


def plain_squash(raw: Tensor, centre: float, reach: float) -> Tensor:
    """What :func:`squash` computes."""
    return centre + reach * torch.atan((raw - centre) / reach)


class _Sample(Function):
    """Outputs the sample, and half its deviation from the mean.

    The half is all that the gradient needs: d sample / d logvar. It is an output because its own
    derivative by logvar, half of itself, makes the second derivative right.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, logvar: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.empty_like(noise)
        for mean_, logvar_, half_, z_ in _blocks(mean, logvar, noise, z):
            half_.mul_(torch.mul(logvar_, 0.5).exp_().mul_(0.5))
            torch.add(mean_, half_, alpha=2, out=z_)
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(noise)
        ctx.save_for_backward(noise)
        return z, noise

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_half: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        (half,) = ctx.saved_tensors
        grad_logvar = None
        if ctx.needs_input_grad[1]:
            if grad is not None:
                grad_logvar = grad * half
            if grad_half is not None:  # in a second differentiation alone
                more = grad_half * half / 2
                grad_logvar = more if grad_logvar is None else grad_logvar + more
        return grad, grad_logvar, None


class _StandardRate(Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, logvar: Tensor) -> Tensor:
        ctx.save_for_backward(mean, logvar)
        rate = mean.new_empty(mean.shape[:-1])
        for mean_, logvar_, rate_ in _blocks(mean, logvar, rate):
            per_dimension = torch.expm1(logvar_).sub_(logvar_).addcmul_(mean_, mean_)
            torch.sum(per_dimension, dim=-1, out=rate_)
        return rate.mul_(0.5)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        mean, logvar = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        grad_mean = grad * mean if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_mean, None
        if torch.is_grad_enabled():  # to be differentiated again
            return grad_mean, torch.expm1(logvar) * (grad / 2)
        grad_logvar = torch.empty_like(logvar)
        for logvar_, half_, out_ in _blocks(logvar, grad / 2, grad_logvar):
            # torch's expm1 takes five times as long as its exp, whose rounding, 6e-8 of the
            # gradient at unit variance, is that of the composition as well.
            torch.exp(logvar_, out=out_).sub_(1).mul_(half_)
        return grad_mean, grad_logvar


class _Squash(Function):
    @staticmethod
    def forward(ctx: Any, raw: Tensor, centre: float, reach: float) -> Tensor:
        ctx.save_for_backward(raw)
        ctx.centre, ctx.reach = centre, reach
        bounded = torch.empty_like(raw)
        for raw_, out_ in _blocks(raw, bounded):
            torch.sub(raw_, centre, out=out_).div_(reach).atan_().mul_(reach).add_(centre)
        return bounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (raw,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            return grad / (1 + ((raw - ctx.centre) / ctx.reach).square()), None, None
        grad_raw = torch.empty_like(raw)
        for raw_, grad_, out_ in _blocks(raw, grad, grad_raw):
            torch.sub(raw_, ctx.centre, out=out_).div_(ctx.reach).square_().add_(1)
            torch.div(grad_, out_, out=out_)
        return grad_raw, None, None


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, whose first dimension is common, in blocks that fit into a CPU's cache."""
    first = tensors[0]
    if first.device.type != "cpu" or first.ndim == 0:
        return iter([tensors])
    per_row = max(1, first.numel() // max(1, len(first)))
    rows = max(1, _BLOCK * torch.get_num_threads() // per_row)
    if len(first) <= rows:
        return iter([tensors])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _eager() -> bool:
    """Whether torch runs operation by operation and derives backwards, if at all.

    torch.func and forward-mode derivatives have no public names to ask; torch's own
    autograd.Function asks these.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
