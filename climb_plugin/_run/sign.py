"""Notices a criterion that is negated outside, so that the rate would be maximised."""

from __future__ import annotations

import torch
from torch import Tensor

from climb_plugin._run.deferred import DeferredFlags
from climb_plugin._torch import is_batch_of_gradients, plain, without_transforms
from climb_plugin.checks import warn


class SignWatch:
    """Warns once of a negative gradient by the bottleneck; never waits for the device."""

    def __init__(self) -> None:
        self._flags = DeferredFlags()
        self._warned = False

    def check(self, gradient: Tensor) -> None:
        """Checks the gradient that a backward pass brings to the bottleneck, a scalar."""
        if self._warned or is_batch_of_gradients(gradient):
            return
        try:
            with without_transforms(), torch.no_grad():
                negative = (plain(gradient) < 0).reshape(1)
                self._warned = bool(self._flags.raised(negative))
        except RuntimeError:  # batched gradients (is_grads_batched) have no value to look at
            return
        if self._warned:
            warn(
                "the gradient that reaches CLIMB's terms is negative, so the training maximises "
                "the rate: the criterion stands behind a minus sign, as a similarity that is "
                "negated. Wrap the loss that is minimised: wrap(lambda *a: -similarity(*a), ...)."
            )
