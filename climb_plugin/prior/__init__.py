"""Measures the rate, by comparing the posteriors of a head with a prior; makes priors by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from climb_plugin.checks import checked_choice
from climb_plugin.prior.base import LearnedPrior, Prior, StandardPrior, per_sample
from climb_plugin.prior.views import BackwardPrior, ViewPrior, checked_views

__all__ = [
    "PRIORS",
    "BackwardPrior",
    "LearnedPrior",
    "Prior",
    "PriorLike",
    "StandardPrior",
    "ViewPrior",
    "make_priors",
    "per_sample",
    "prior_name",
]

PRIORS: dict[str, Callable[..., Prior]] = {
    "standard": lambda width, views: StandardPrior(),
    "learned": lambda width, views: LearnedPrior(width),
    "view": lambda width, views: ViewPrior(views),
    "backward": lambda width, views: BackwardPrior(width, views=views),
}
_PAIRED = ("view", "backward")
PriorLike: TypeAlias = str | Prior | Callable[[int], Prior]


def make_priors(
    prior: PriorLike, widths: Sequence[int], *, views: int | Sequence[int] = 1
) -> list[Prior]:
    """One prior for each head.

    Args:
        prior: A key of ``PRIORS``; a Prior, for one head; or a function that makes a Prior for a
            width.
        widths: The widths of the heads' samples.
        views: As in :class:`ViewPrior`, for the priors that compare views.

    Raises:
        TypeError: If ``prior`` is none of these, or makes no Prior.
        ValueError: If there is no prior of that name, a Prior has another width, ``views`` has no
            effect or is out of range, or one Prior is to serve several heads.
    """
    if isinstance(prior, str):
        checked_choice("prior", prior, PRIORS)
    views = checked_views(views)
    if views != 1 and prior not in _PAIRED:
        raise ValueError(
            f"views={views!r} is for prior='view' and 'backward': prior={prior_name(prior)!r} has "
            "no use for it. A prior of your own is given its views where it is made."
        )
    if isinstance(prior, str):
        return [PRIORS[prior](width, views) for width in widths]
    if isinstance(prior, Prior):
        if len(widths) > 1:
            raise ValueError(
                f"one {type(prior).__name__} cannot serve {len(widths)} heads: pass a function "
                "that makes one for each width, prior=lambda width: ..."
            )
        _check(prior, widths[0] if widths else None)
        return [prior] * len(widths)
    if not callable(prior):
        raise TypeError(f"prior must be a name, a Prior or a function of a width, got {prior!r}.")
    made = [prior(width) for width in widths]
    for one, width in zip(made, widths, strict=True):
        if not isinstance(one, Prior):
            raise TypeError(
                f"prior={prior_name(prior)} must return a Prior, got {type(one).__name__}."
            )
        _check(one, width)
    return made


def _check(prior: Prior, width: int | None) -> None:
    name = type(prior).__name__
    if type(prior).forward is Prior.forward:
        raise TypeError(f"{name} must define forward(self, posteriors).")
    if width is not None and prior.dim not in (None, width):
        raise ValueError(
            f"{name} is {prior.dim} wide, and the samples of the head are {width}: pass a function "
            "that makes a prior for a width, prior=lambda width: ..."
        )


def prior_name(prior: PriorLike) -> str:
    """The name of a prior in messages and checkpoints."""
    if isinstance(prior, str):
        return prior
    if isinstance(prior, Prior):
        return type(prior).__name__
    return getattr(prior, "__qualname__", type(prior).__name__)
