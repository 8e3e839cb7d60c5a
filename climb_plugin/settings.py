"""Checks the options of CLIMB, which ``wrap``, ``ClimbLoss`` and solo-learn's keys share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from climb_plugin.affine import LOGVARS, checked_std
from climb_plugin.checks import checked_choice, checked_number
from climb_plugin.prior import PriorLike, make_priors
from climb_plugin.schedule import Schedule, as_schedule

PLACES = ("projection", "features")
"""The places of a head."""


@dataclass(frozen=True)
class Settings:
    """All options.

    Attributes:
        beta: Weight of the bottleneck in units of the base loss per nat: a number, or a
            :class:`~climb_plugin.schedule.Schedule` over optimiser steps. With 0 ``wrap`` puts
            nothing into the model, and the run is bit-identical to one without the plugin. (A
            ``ClimbLoss`` with heads samples at beta 0 too: the noise alone.)
        alpha: Weight of the conditional entropy H(z | v) beside the rate. 0: information
            bottleneck. 1: the whole bound on the entropy H(z). 1 without a base loss that needs the
            information drives the std to the lower bound.
        prior: The distribution that the rate is measured to. ``"standard"``: N(0, I).
            ``"learned"``: a diagonal Gaussian, whose parameters belong to the loss (give them to
            the optimiser). ``"backward"``: a Gaussian around the mean of another view of the same
            image, whose gain and variance are learned, too. ``"view"``: the posteriors of the
            other views. For these two the loss must see all views, of one batch size, in one
            call. Or a :class:`~climb_plugin.prior.Prior`, or a function that makes one for a
            width.
        views: For priors that compare views: how many views each forward call of the head holds,
            one after the other as ``torch.cat`` puts them; a sequence, in the order of the calls,
            if they differ.
        free_nats: Nats that cost nothing, per sample and head, over all dimensions: a sample with a
            rate below gets no gradient from the rate.
        at: ``"projection"``: the Gaussian is at the end of the projection MLP, before an L2
            normalisation or prototypes in the head. ``"features"``: between backbone and projection
            head.
        init_std: Standard deviation at the start, in units of the embedding: take about a tenth of
            the embedding's std. SimCLR's head starts with an embedding std near 1 per dimension,
            BYOL's 0.3, lightly's DINO head 0.3 with ``batch_norm=True`` but 0.01 to 0.06 without.
        logvar: ``"linear"``: the log-variance is a linear function of the embedding, D x D
            parameters. ``"shared"``: one learned number for each dimension, for wide embeddings.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is out of range, or unknown, or has no effect.
    """

    beta: float | Schedule
    alpha: float = 0.0
    prior: PriorLike = "standard"
    views: int | Sequence[int] = 1
    free_nats: float = 0.0
    at: str = "projection"
    init_std: float = 0.1
    logvar: str = "linear"

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", as_schedule(self.beta))
        for name in ("alpha", "free_nats"):
            object.__setattr__(self, name, checked_number(name, getattr(self, name)))
        object.__setattr__(self, "init_std", checked_std(self.init_std))
        checked_choice("logvar", self.logvar, LOGVARS)
        make_priors(self.prior, [], views=self.views)
        checked_choice("at", self.at, PLACES)

    @property
    def schedule(self) -> Schedule:
        """Beta over the optimiser steps."""
        return as_schedule(self.beta)


def is_off(schedule: Schedule) -> bool:
    """Whether beta is 0 at every step."""
    return schedule.is_constant and float(schedule(0)) == 0
