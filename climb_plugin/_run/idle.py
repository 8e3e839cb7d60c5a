"""Warns of a training in which a loss takes no part, though its heads do."""

from __future__ import annotations

from collections.abc import Sequence

from climb_plugin._graph.sample import next_number
from climb_plugin.checks import warn
from climb_plugin.head import GaussianHead

_PATIENCE = 10
"""Optimiser steps; an attack or a look at gradients takes none."""


class Idle:
    """Optimiser steps that move the heads of a loss while the loss adds nothing."""

    def __init__(self, heads: Sequence[GaussianHead]) -> None:
        self._heads = heads
        self._steps = 0
        self._first = 0  # Calls since the first of these steps have greater numbers.
        self._is_called = False  # Whether the loss was called since.
        self._warned = False

    def called(self, *, is_regularised: bool) -> None:
        """Notes a call of the loss, or of another loss of these heads, whose value has a graph."""
        self._is_called = True
        if is_regularised:
            self._steps = 0

    def stepped(self) -> None:
        """Notes a step of an optimiser that holds a head."""
        self._steps += 1
        if self._steps == 1:
            self._first, self._is_called = next_number(), False
        elif self._steps > _PATIENCE and not self._warned:
            self._warned = True
            self._explain()

    def _explain(self) -> None:
        if self._were("sampled") and not self._is_called:
            warn(
                f"CLIMB: in {_PATIENCE} optimiser steps the GaussianHead has sampled, and its loss "
                "was not called: the training has the noise and pays no rate. Call what wrap has "
                "returned, criterion = wrap(loss, ...), or take CLIMB out, unwrap(criterion)."
            )
        elif self._were("eval") and self._is_called:
            warn(
                f"CLIMB: in {_PATIENCE} optimiser steps the GaussianHead was in eval(), where it "
                "passes on its mean: the training is the plain one. Call model.train(), or take "
                "CLIMB out, unwrap(criterion)."
            )

    def _were(self, outcome: str) -> bool:
        return any(head.last_calls.get(outcome, 0) > self._first for head in self._heads)
