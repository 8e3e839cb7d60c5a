"""Measures rates to the other views of the same image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from climb_plugin.checks import checked_number, checked_width, is_whole
from climb_plugin.gaussian import (
    LOGVAR_MAX,
    LOGVAR_MIN,
    Posterior,
    bound_logvar,
    kl_between,
    symmetric_kl,
    unbound_logvar,
    widened,
)
from climb_plugin.prior.base import Prior, per_sample


class ViewPrior(Prior):
    """The posterior of another view of the same image, symmetrised over all pairs of views.

    The rate then bounds I(z; v1 | v2), the information that the views do not share.

    Args:
        views: How many views each forward call of the head holds, one after the other along the
            first dimension, as torch.cat puts them; a sequence if the calls differ.

    Raises:
        ValueError: If ``views`` is not made of positive integers.
    """

    compares_views = True

    def __init__(self, views: int | Sequence[int] = 1) -> None:
        super().__init__()
        self.views = checked_views(views)

    def forward(self, posteriors: Sequence[Posterior]) -> Tensor:
        """One symmetric KL in nats per image and pair of views, in a vector.

        Args:
            posteriors: One per forward call; row i of each view belongs to the same image.

        Raises:
            ValueError: If there are fewer than two views, their shapes differ, or ``views`` does
                not fit.
        """
        views = paired_views(posteriors, self.views, name="view")
        return per_sample([symmetric_kl(*one, *two) for one, two in combinations(views, 2)])


class BackwardPrior(Prior):
    """A Gaussian around what another view says: N(gain * mean(v_j), diag(var)), both learned.

    The rate then bounds I(z; v_i | v_j), the information of a view that the other one does not
    share. In the linear-Gaussian case the bound is tight, where that of :class:`ViewPrior` is
    loose. The gradient through mean(v_j) is left out by default, so that a view is drawn to what
    the other one says and does not draw that away.

    Args:
        dim: Width of the samples.
        var: Variance at the start, of each dimension; the gain starts at 1.
        targets: How many views, the first ones, serve as v_j: with multi-crop, those that are
            large. None: all.
        views: How many views each forward call of the head holds, as in :class:`ViewPrior`.
        detach: Whether mean(v_j) is a constant.

    Raises:
        ValueError: If ``dim`` is no positive integer, ``var`` is out of bounds,
            ``targets`` is less than 2, or ``views`` is not made of positive integers.

    Source: the backward encoder of Fischer, The Conditional Entropy Bottleneck, 2020, and Lee et
    al., Compressive Visual Representations, 2021. That both are diagonal and linear in the mean,
    and the place of the gradient, are choices of this package.
    """

    compares_views = True

    def __init__(
        self,
        dim: int,
        *,
        var: float = 1.0,
        targets: int | None = None,
        views: int | Sequence[int] = 1,
        detach: bool = True,
    ) -> None:
        super().__init__()
        self.dim = checked_width("dim", dim)
        least, most = math.exp(LOGVAR_MIN), math.exp(LOGVAR_MAX)
        if not least < checked_number("var", var) < most:
            raise ValueError(f"var must lie between {least:.2g} and {most:.3g}, got {var}.")
        if targets is not None and (checked_width("targets", targets) < 2):
            raise ValueError(
                "targets must be at least 2, or the first view would have no other one to be "
                f"compared with, got {targets}."
            )
        self.gain = nn.Parameter(torch.ones(dim))
        self.raw_logvar = nn.Parameter(torch.full((dim,), unbound_logvar(math.log(var))))
        self.targets = targets
        self.views = checked_views(views)
        self.detach = detach

    def forward(self, posteriors: Sequence[Posterior]) -> Tensor:
        """The rates in nats of all views of all images, in a vector.

        Each is the mean over the other views that serve as targets. The cost is linear in the
        number of views: the sum over targets of a quadratic is that around their mean.

        Raises:
            ValueError: As :meth:`ViewPrior.forward`; if there are fewer views than targets.
        """
        views = paired_views(posteriors, self.views, name="backward")
        count = len(views) if self.targets is None else self.targets
        if count > len(views):
            raise ValueError(f"targets={count}, but this loss saw {len(views)} views.")
        means = [widened(view.mean) for view in views[:count]]
        targets = torch.stack([mean.detach() for mean in means] if self.detach else means)
        centre = targets.mean(dim=0)
        offsets = targets - centre
        first, second = offsets.sum(dim=0), offsets.square().sum(dim=0)
        rates = []
        for index, view in enumerate(views):
            others, away, square = count, first, second
            if index < count:  # a view is no target of its own
                others, away = count - 1, first - offsets[index]
                square = second - offsets[index].square()
            away = away / others
            spread = square / others - away.square()
            rates.append(self._rate(view, centre + away, spread))
        return per_sample(rates)

    def _rate(self, view: Posterior, mean: Tensor, spread: Tensor) -> Tensor:
        """KL to the targets, whose mean and whose variance around it are given, on average."""
        gain = widened(self.gain)
        logvar = bound_logvar(widened(self.raw_logvar)).expand_as(mean)
        around_the_mean = kl_between(*view, gain * mean, logvar)
        return around_the_mean + (gain.square() * spread * torch.exp(-logvar)).sum(dim=-1) / 2


def paired_views(
    posteriors: Sequence[Posterior], counts: int | Sequence[int], *, name: str
) -> list[Posterior]:
    """One posterior per view, if row i of each may belong to the same image; else a ValueError."""
    views = _split(posteriors, counts)
    shapes = [tuple(view.mean.shape) for view in views]
    if len(shapes) < 2:
        raise ValueError(
            f"prior={name!r} compares the views of an image, but this loss saw one forward "
            f"call of the head, of shape {shapes[0]}. Call the head once per view; if the "
            "script calls its criterion once per view, wrap a function that takes all views; "
            "if a batch holds several (torch.cat), say how many: views=2."
        )
    if len(set(shapes)) > 1:
        raise ValueError(
            f"prior={name!r} needs the same images in the same order in every view, but the "
            f"posteriors of this step have shapes {shapes}. Use prior='standard' or "
            "'learned', or pass views of equal batch size, or say how many each batch holds: "
            "views=(1, 2)."
        )
    return views


def checked_views(views: int | Sequence[int]) -> int | tuple[int, ...]:
    """The numbers of views of each call, as ints; a ValueError if one is not positive."""
    counts = tuple(views) if isinstance(views, Sequence) else (views,)
    if not counts or not all(is_whole(count) and count > 0 for count in counts):
        raise ValueError(f"views must be a positive int, or some of them, got {views!r}.")
    whole = tuple(int(count) for count in counts)
    return whole if isinstance(views, Sequence) else whole[0]


def _split(posteriors: Sequence[Posterior], views: int | Sequence[int]) -> list[Posterior]:
    shapes = [tuple(posterior.mean.shape) for posterior in posteriors]
    counts = (views,) * len(shapes) if isinstance(views, int) else views
    if len(counts) != len(shapes) or any(
        shape[0] % count for shape, count in zip(shapes, counts, strict=True)
    ):
        raise ValueError(
            f"views={views} does not divide what this loss saw: forward calls of the head of "
            f"shapes {shapes}."
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
