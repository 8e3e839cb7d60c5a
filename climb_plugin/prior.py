"""What the rate is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from climb_plugin.gaussian import (
    bound_logvar,
    kl_between,
    kl_to_standard_normal,
    symmetric_kl,
    unbound_logvar,
)
from climb_plugin.head import Posterior


class StandardPrior(nn.Module):
    """N(0, I): the rate bounds I(z; v), what the embedding says about its view."""

    def forward(self, posteriors: Sequence[Posterior]) -> Tensor:
        """The rates in nats of the samples of all views.

        Args:
            posteriors: One per forward call of the head, each of shape (..., B, D).

        Returns:
            One rate per sample, in a vector.
        """
        return per_sample([kl_to_standard_normal(*posterior) for posterior in posteriors])


class LearnedPrior(nn.Module):
    """A diagonal Gaussian whose mean and variance are learned; N(0, I) at the start.

    Args:
        dim: Width of the samples.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(dim))
        self.raw_logvar = nn.Parameter(torch.full((dim,), unbound_logvar(0.0)))

    def forward(self, posteriors: Sequence[Posterior]) -> Tensor:
        """The rates in nats of the samples of all views, in a vector."""
        prior_logvar = bound_logvar(self.raw_logvar.float())
        return per_sample(
            [
                kl_between(mean, logvar, self.mean.expand_as(mean), prior_logvar.expand_as(logvar))
                for mean, logvar in posteriors
            ]
        )


class ViewPrior(nn.Module):
    """The posterior of another view of the same image, symmetrised over all pairs of views.

    The rate then bounds I(z; v1 | v2), the information that the views do not share.
    """

    def forward(self, posteriors: Sequence[Posterior]) -> Tensor:
        """The symmetric KLs in nats of all pairs of views of all images.

        Args:
            posteriors: One per view; row i of each belongs to the same image.

        Returns:
            One divergence per image and pair, in a vector.

        Raises:
            ValueError: If there are fewer than two views or their shapes differ.
        """
        shapes = [tuple(posterior.mean.shape) for posterior in posteriors]
        if len(shapes) < 2:
            raise ValueError(
                f"prior='view' compares the views of an image, but this loss saw one forward "
                f"call of the head, of shape {shapes[0]}. Call the head once per view; if the "
                "script calls its criterion once per view, wrap a function that takes all views."
            )
        if len(set(shapes)) > 1:
            raise ValueError(
                "prior='view' needs the same images in the same order in every view, but the "
                f"posteriors of this step have shapes {shapes}. Use prior='standard' or "
                "'learned', or pass views of equal batch size."
            )
        return per_sample([symmetric_kl(*one, *two) for one, two in combinations(posteriors, 2)])


PRIORS: dict[str, Callable[[int], nn.Module]] = {
    "standard": lambda width: StandardPrior(),
    "learned": LearnedPrior,
    "view": lambda width: ViewPrior(),
}


def make_priors(name: str, widths: Sequence[int]) -> list[nn.Module]:
    """The prior called ``name`` for each head.

    Args:
        name: A key of ``PRIORS``.
        widths: The widths of the heads' samples.

    Raises:
        ValueError: If there is no such prior.
    """
    if name not in PRIORS:
        raise ValueError(f"prior must be one of {', '.join(map(repr, PRIORS))}, got {name!r}.")
    return [PRIORS[name](width) for width in widths]


def per_sample(values: Sequence[Tensor]) -> Tensor:
    """The samples of several tensors in one vector, so that in a mean each counts the same."""
    return torch.cat([value.flatten() for value in values])
