"""Computes rates and entropies of diagonal Gaussians, in nats.

Unless a function says otherwise, all arguments are floating-point tensors of one shape (..., B, D),
and the result has one value per row, in shape (..., B): the sum over the last dimension. Half
precision is computed and returned in float32, float64 in float64.

Raises:
    TypeError: From each function, if an argument is not a floating-point tensor.
    ValueError: From each function, if the shapes differ or have fewer than two dimensions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOGVAR_MIN = -20.0
"""Lower bound of the log-variances that :func:`bound_logvar` returns (std 4.5e-5)."""
LOGVAR_MAX = 10.0
"""Upper bound of the log-variances that :func:`bound_logvar` returns (std 148)."""

_LOG_2PI = math.log(2 * math.pi)
_CENTRE = (LOGVAR_MAX + LOGVAR_MIN) / 2
_REACH = (LOGVAR_MAX - LOGVAR_MIN) / math.pi


class Posterior(NamedTuple):
    """p(z | v) of a batch of views: N(mean, exp(logvar)), each of shape (..., B, D)."""

    mean: Tensor
    logvar: Tensor


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 (float64 stays float64), the precision of all statistics."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def checked(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float32, or all in float64 if one is; raises as this module says."""
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected a tensor, got {type(tensor).__name__}: {tensor!r}.")
        if not tensor.is_floating_point():
            raise TypeError(
                f"expected floating-point tensors, got {tensor.dtype}: "
                "convert with .float() before the call."
            )
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"mean and logvar must have the same shape, got {', '.join(map(str, shapes))}."
        )
    if len(shapes[0]) < 2:
        raise ValueError(f"expected shape (..., B, D), got {shapes[0]}: add a batch dimension.")
    is_double = torch.float64 in [tensor.dtype for tensor in tensors]
    return tuple([tensor.to(torch.float64 if is_double else torch.float32) for tensor in tensors])


def reparameterize(mean: Tensor, logvar: Tensor, *, noise: Tensor) -> Tensor:
    """Samples of N(mean, exp(logvar)), of shape (..., B, D), from standard normal noise.

    Source: Kingma and Welling, Auto-Encoding Variational Bayes, 2014, section 2.4.

    Examples:
        >>> reparameterize(torch.ones(1, 2), torch.zeros(1, 2), noise=torch.ones(1, 2))
        tensor([[2., 2.]])
    """
    mean, logvar, noise = checked(mean, logvar, noise)
    return mean + noise * torch.exp(logvar / 2)


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, I)): 1/2 sum(mean^2 + var - 1 - log var).

    Source: Kingma and Welling, Auto-Encoding Variational Bayes, 2014, appendix B.

    Examples:
        >>> kl_to_standard_normal(torch.ones(1, 4), torch.zeros(1, 4))
        tensor([2.])
    """
    mean, logvar = checked(mean, logvar)
    return (mean.square() + (torch.expm1(logvar) - logvar)).sum(dim=-1) / 2


def kl_between(mean: Tensor, logvar: Tensor, other_mean: Tensor, other_logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(other_mean, exp(other_logvar))).

    Examples:
        >>> zeros = torch.zeros(1, 4)
        >>> kl_between(zeros + 1, zeros, zeros, zeros)
        tensor([2.])
    """
    mean, logvar, other_mean, other_logvar = checked(mean, logvar, other_mean, other_logvar)
    log_ratio = logvar - other_logvar
    distance = (mean - other_mean).square() * torch.exp(-other_logvar)
    return (distance + (torch.expm1(log_ratio) - log_ratio)).sum(dim=-1) / 2


def symmetric_kl(mean: Tensor, logvar: Tensor, other_mean: Tensor, other_logvar: Tensor) -> Tensor:
    """The mean of both directions: 1/2 KL(p || q) + 1/2 KL(q || p).

    Source: the regulariser of Federici et al., Learning Robust Representations via Multi-View
    Information Bottleneck, 2020, equation 5, here in closed form.

    Examples:
        >>> zeros = torch.zeros(1, 4)
        >>> symmetric_kl(zeros + 1, zeros, zeros, zeros)
        tensor([2.])
    """
    mean, logvar, other_mean, other_logvar = checked(mean, logvar, other_mean, other_logvar)
    precisions = torch.exp(-logvar) + torch.exp(-other_logvar)
    # cosh(x) - 1 = 2 sinh(x / 2)^2 does not cancel where the variances are nearly equal.
    spread = 2 * torch.sinh((logvar - other_logvar) / 2).square()
    return ((mean - other_mean).square() * precisions / 2 + spread).sum(dim=-1) / 2


def conditional_entropy(mean: Tensor, logvar: Tensor) -> Tensor:
    """H(z | v), the differential entropy of the posterior: 1/2 sum(1 + log 2 pi + log var).

    The entropy does not depend on the mean, and is negative for small variances.

    Examples:
        >>> conditional_entropy(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([2.8379])
    """
    _, logvar = checked(mean, logvar)
    return (1 + _LOG_2PI + logvar).sum(dim=-1) / 2


def entropy_bound(mean: Tensor, logvar: Tensor) -> Tensor:
    """E[-log r(z)] for r = N(0, I), an upper bound of H(z): 1/2 sum(mean^2 + var + log 2 pi).

    The bound equals ``kl_to_standard_normal + conditional_entropy``.

    Examples:
        >>> entropy_bound(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([2.8379])
    """
    mean, logvar = checked(mean, logvar)
    return (mean.square() + torch.exp(logvar) + _LOG_2PI).sum(dim=-1) / 2


def bound_logvar(raw: Tensor) -> Tensor:
    """Maps any real number smoothly into (LOGVAR_MIN, LOGVAR_MAX); slope 1 in the middle.

    The map is an arc tangent. The slope of an arc tangent falls off as a power and is computed
    without cancellation, so a saturated value still has a gradient (the slope of a tanh rounds to
    exactly 0 in float32). Takes any shape.

    Examples:
        >>> bound_logvar(torch.tensor([-1e6, -5.0, 1e6]))
        tensor([-19.9999,  -5.0000,   9.9999])
    """
    return _CENTRE + _REACH * torch.atan((raw - _CENTRE) / _REACH)


def unbound_logvar(logvar: float) -> float:
    """The number that :func:`bound_logvar` maps to ``logvar``.

    Raises:
        ValueError: If ``logvar`` does not lie strictly between LOGVAR_MIN and LOGVAR_MAX.

    Examples:
        >>> bound_logvar(torch.tensor(unbound_logvar(-2.0)))
        tensor(-2.)
    """
    if not LOGVAR_MIN < logvar < LOGVAR_MAX:
        raise ValueError(
            f"logvar must lie strictly between {LOGVAR_MIN} and {LOGVAR_MAX}, got {logvar}."
        )
    return _CENTRE + _REACH * math.tan((logvar - _CENTRE) / _REACH)
