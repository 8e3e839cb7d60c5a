"""What to watch while training."""

from __future__ import annotations

import math

from torch import Tensor

from climb_plugin.gaussian import kl_to_standard_normal

ACTIVE_NATS = 0.01
"""A dimension counts as active if its mean rate is above this many nats."""


def nats_to_bits(nats: float) -> float:
    """Converts nats to bits.

    Examples:
        >>> round(nats_to_bits(math.log(8)), 6)
        3.0
    """
    return nats / math.log(2)


def rate_per_dimension(mean: Tensor, logvar: Tensor) -> Tensor:
    """The rate to N(0, I) of each dimension, averaged over everything else.

    Args:
        mean: Means, of shape (..., B, D).
        logvar: Log-variances, of the same shape.

    Returns:
        Rates in nats, of shape (D,); their sum is the rate.

    Examples:
        >>> import torch
        >>> rate_per_dimension(torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2))
        tensor([0., 2.])
    """
    per_sample = kl_to_standard_normal(mean.unsqueeze(-1), logvar.unsqueeze(-1))
    return per_sample.flatten(0, -2).mean(dim=0)


def active_dimensions(mean: Tensor, logvar: Tensor, *, threshold: float = ACTIVE_NATS) -> int:
    """How many dimensions carry a rate above ``threshold``.

    Args:
        mean: Means, of shape (..., B, D).
        logvar: Log-variances, of the same shape.
        threshold: In nats per dimension.

    Source: the active units of Burda et al., Importance Weighted Autoencoders, 2016, with the
    rate of a dimension in place of the variance of its mean.

    Examples:
        >>> import torch
        >>> active_dimensions(torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2))
        1
    """
    return int((rate_per_dimension(mean, logvar) > threshold).sum())
