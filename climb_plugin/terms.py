"""Holds the terms of a call of the loss, for logs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from climb_plugin._torch import plain, without_transforms


class ClimbTerms(NamedTuple):
    """The terms of the last call, detached scalars.

    Attributes:
        total: The value of the loss: base + beta * (rate + alpha * entropy), in which only the rate
            above ``free_nats`` counts.
        base: The value of the base loss, in its own unit.
        rate: Nats, summed over dimensions, averaged over samples and views; NaN if no posterior was
            involved (beta 0 without heads, evaluation).
        entropy: The conditional entropy H(z | v), in nats, likewise.
        beta: The weight in force; 0 if no posterior was involved.
    """

    total: Tensor
    base: Tensor
    rate: Tensor
    entropy: Tensor
    beta: Tensor


def detached_terms(
    total: Tensor, base: Tensor, rate: Tensor | None, entropy: Tensor | None, beta: float | Tensor
) -> ClimbTerms:
    """The terms of a call; without posteriors rate and entropy are NaN."""
    with without_transforms():
        base = plain(base).detach()
        # A batch without positives may have a zero of integers.
        real = base.dtype if base.is_floating_point() else torch.float32
        nan = base.new_full((), math.nan, dtype=real)
        if not isinstance(beta, Tensor):
            beta = torch.tensor(beta, dtype=torch.float64, device="cpu")
        return ClimbTerms(
            # Copies, which keep their values if the caller changes the loss in place.
            plain(total).detach().clone(),
            base.clone(),
            nan if rate is None else plain(rate).detach(),
            nan if entropy is None else plain(entropy).detach(),
            beta,
        )
