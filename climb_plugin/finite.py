"""Finds non-finite terms without making the host wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from climb_plugin.deferred import DeferredFlags


class FiniteCheck:
    """Tells which entries of a vector have been NaN or infinite: at once on the CPU, on CUDA late.

    See :class:`~climb_plugin.deferred.DeferredFlags`.
    """

    def __init__(self) -> None:
        self._flags = DeferredFlags()

    def non_finite(self, values: Tensor) -> list[int]:
        """The entries that are known by now to have been non-finite.

        Args:
            values: A vector, of the same length at every call.
        """
        return self._flags.raised(~torch.isfinite(values.detach()))
