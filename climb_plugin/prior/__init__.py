"""Measures the rate, by comparing the posteriors of a head with a prior."""

from climb_plugin.prior.base import Prior, per_sample
from climb_plugin.prior.fixed import LearnedPrior, StandardPrior
from climb_plugin.prior.named import PRIORS, PriorLike, make_priors, prior_name
from climb_plugin.prior.views import BackwardPrior, ViewPrior

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
