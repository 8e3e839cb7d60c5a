"""Measures rates to a distribution that is the same for all images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from climb_plugin.checks import checked_width
from climb_plugin.gaussian import (
    Posterior,
    bound_logvar,
    kl_between,
    kl_to_standard_normal,
    unbound_logvar,
    widened,
)
from climb_plugin.prior.base import Prior, per_sample


class StandardPrior(Prior):
    """N(0, I): the rate bounds I(z; v), the information of an embedding on its view."""

    def forward(self, posteriors: Sequence[Posterior]) -> Tensor:
        """The rates in nats of the samples of all views, in a vector."""
        return per_sample([kl_to_standard_normal(*posterior) for posterior in posteriors])


class LearnedPrior(Prior):
    """A diagonal Gaussian whose mean and variance are learned; N(0, I) at the start.

    Args:
        dim: Width of the samples.

    Raises:
        ValueError: If ``dim`` is no positive integer.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = checked_width("dim", dim)
        self.mean = nn.Parameter(torch.zeros(dim))
        self.raw_logvar = nn.Parameter(torch.full((dim,), unbound_logvar(0.0)))

    def forward(self, posteriors: Sequence[Posterior]) -> Tensor:
        """The rates in nats of the samples of all views, in a vector."""
        logvar = bound_logvar(widened(self.raw_logvar))
        return per_sample(
            [
                kl_between(*p, self.mean.expand_as(p.mean), logvar.expand_as(p.mean))
                for p in posteriors
            ]
        )
