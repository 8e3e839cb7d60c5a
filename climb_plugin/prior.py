"""What the rate is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from numbers import Integral

import torch
from torch import Tensor, nn

from climb_plugin.gaussian import (
    Posterior,
    bound_logvar,
    kl_between,
    kl_to_standard_normal,
    symmetric_kl,
    unbound_logvar,
)


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
        wide = torch.promote_types(self.raw_logvar.dtype, torch.float32)
        prior_logvar = bound_logvar(self.raw_logvar.to(wide))
        return per_sample(
            [
                kl_between(mean, logvar, self.mean.expand_as(mean), prior_logvar.expand_as(logvar))
                for mean, logvar in posteriors
            ]
        )


class ViewPrior(nn.Module):
    """The posterior of another view of the same image, symmetrised over all pairs of views.

    The rate then bounds I(z; v1 | v2), the information that the views do not share.

    Args:
        views: How many views each forward call of the head holds, one after the other along the
            first dimension, as torch.cat puts them; a sequence where the calls differ.

    Raises:
        ValueError: If ``views`` is not made of positive integers.
    """

    def __init__(self, views: int | Sequence[int] = 1) -> None:
        super().__init__()
        counts = tuple(views) if isinstance(views, Sequence) else (views,)
        if not counts or any(
            isinstance(n, bool) or not isinstance(n, Integral) or n < 1 for n in counts
        ):
            raise ValueError(f"views must be a positive int, or some of them, got {views!r}.")
        counts = tuple(int(count) for count in counts)
        self.views = counts if isinstance(views, Sequence) else counts[0]

    def forward(self, posteriors: Sequence[Posterior]) -> Tensor:
        """The symmetric KLs in nats of all pairs of views of all images.

        Args:
            posteriors: One per forward call; row i of each view belongs to the same image.

        Returns:
            One divergence per image and pair, in a vector.

        Raises:
            ValueError: If there are fewer than two views, their shapes differ, or they are not
                those that ``views`` says.
        """
        posteriors = self._split(posteriors)
        shapes = [tuple(posterior.mean.shape) for posterior in posteriors]
        if len(shapes) < 2:
            raise ValueError(
                f"prior='view' compares the views of an image, but this loss saw one forward "
                f"call of the head, of shape {shapes[0]}. Call the head once per view; if the "
                "script calls its criterion once per view, wrap a function that takes all views; "
                "if a batch holds several (torch.cat), say how many: views=2."
            )
        if len(set(shapes)) > 1:
            raise ValueError(
                "prior='view' needs the same images in the same order in every view, but the "
                f"posteriors of this step have shapes {shapes}. Use prior='standard' or "
                "'learned', or pass views of equal batch size, or say how many each batch holds: "
                "views=(1, 2)."
            )
        return per_sample([symmetric_kl(*one, *two) for one, two in combinations(posteriors, 2)])

    def _split(self, posteriors: Sequence[Posterior]) -> list[Posterior]:
        """One posterior per view."""
        shapes = [tuple(posterior.mean.shape) for posterior in posteriors]
        counts = (self.views,) * len(shapes) if isinstance(self.views, int) else self.views
        if len(counts) != len(shapes) or any(
            shape[0] % count for shape, count in zip(shapes, counts, strict=True)
        ):
            raise ValueError(
                f"views={self.views} does not divide what this loss saw: forward calls of the "
                f"head of shapes {shapes}."
            )
        for shape, count in zip(shapes, counts, strict=True):
            if count > 1 and len(shape) > 2 and shape[-2] == count:
                raise ValueError(
                    f"views={count} splits a batch along its first dimension, as torch.cat puts "
                    f"views together, but the posterior has shape {shape}, as if views lay beside "
                    "their image: call the head once per view, as in head(x[:, i])."
                )
        return [
            Posterior(mean, logvar)
            for posterior, count in zip(posteriors, counts, strict=True)
            for mean, logvar in zip(*(part.chunk(count) for part in posterior), strict=True)
        ]


PRIORS: dict[str, Callable[[int], nn.Module]] = {
    "standard": lambda width: StandardPrior(),
    "learned": LearnedPrior,
    "view": lambda width: ViewPrior(),
}


def make_priors(
    name: str, widths: Sequence[int], *, views: int | Sequence[int] = 1
) -> list[nn.Module]:
    """The prior called ``name`` for each head.

    Args:
        name: A key of ``PRIORS``.
        widths: The widths of the heads' samples.
        views: As in :class:`ViewPrior`; no other prior looks at it.

    Raises:
        ValueError: If there is no such prior, or ``views`` has no effect or is out of range.
    """
    if name not in PRIORS:
        raise ValueError(f"prior must be one of {', '.join(map(repr, PRIORS))}, got {name!r}.")
    if name == "view":
        checked = ViewPrior(views).views
        return [ViewPrior(checked) for _ in widths]
    if views != 1:
        raise ValueError(f"views={views!r} is for prior='view': prior={name!r} has no use for it.")
    return [PRIORS[name](width) for width in widths]


def per_sample(values: Sequence[Tensor]) -> Tensor:
    """The samples of several tensors in one vector, so that in a mean each counts the same."""
    return torch.cat([value.flatten() for value in values])
