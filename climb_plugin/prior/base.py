"""Defines priors, and those to one distribution, the same for all images."""

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


class Prior(nn.Module):
    """Maps the posteriors of one head to rates; the base of all priors, and of yours.

    A subclass defines ``forward``, and ``compares_views`` if its rate depends on several views. The
    parameters of a prior are among those of the loss, in the loss's state dict and in checkpoints;
    they are trained only if an optimiser holds them.

    Attributes:
        compares_views: Whether the rate compares the views of an image with each other, and so does
            not tell the distance of a posterior to a fixed prior.
        dim: Width of the samples that the prior fits; None: any.

    Examples:
        >>> from climb_plugin.gaussian import kl_between
        >>> class Wide(Prior):
        ...     def forward(self, posteriors):
        ...         zeros = torch.zeros_like(posteriors[0].mean)
        ...         return per_sample([kl_between(*one, zeros, zeros + 1) for one in posteriors])
        >>> Wide()([Posterior(torch.zeros(2, 3), torch.ones(2, 3))])
        tensor([0., 0.])
    """

    compares_views = False
    dim: int | None = None

    def forward(self, posteriors: Sequence[Posterior]) -> Tensor:
        """One rate per sample of all views, in nats, in a vector; :func:`per_sample` makes one.

        Args:
            posteriors: One per forward call of the head, each of shape (..., B, D).
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(self, posteriors).")


def per_sample(values: Sequence[Tensor]) -> Tensor:
    """The samples of several tensors in one vector, so that in a mean each counts the same."""
    return torch.cat([value.flatten() for value in values])


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
