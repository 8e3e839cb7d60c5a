"""Warns of a training in which a loss takes no part, though its heads do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from climb_plugin._graph.sample import next_number
from climb_plugin.checks import warn
from climb_plugin.head import GaussianHead

_PATIENCE = 100
"""Optimiser steps; a short warm-up without the loss is meant, and the inner steps of MAML are."""


class Idle:
    """Optimiser steps that move the heads of a loss while the loss adds nothing."""

    def __init__(self, heads: Sequence[GaussianHead], students: Sequence[nn.Module]) -> None:
        self._heads, self._students = heads, students
        self._steps = 0
        self._last = 0  # Calls since the last step have greater numbers.
        self._is_called = False  # Whether the loss was called since.
        self._is_in_use = False  # Whether the loss has ever added its terms.
        self._warned = False

    def called(self, *, is_regularised: bool) -> None:
        """Notes a call with gradients enabled of the loss, or of another loss of its heads."""
        self._is_called = True
        if is_regularised:
            self._is_in_use, self._steps = True, 0

    def stepped(self) -> None:
        """Notes a step of an optimiser that holds a head."""
        last, self._last = self._last, next_number()
        is_called, self._is_called = self._is_called, False
        if self._warned:
            return
        if not is_called and not self._is_in_use and self._were("trained", last):
            self._count(
                f"CLIMB: in {_PATIENCE} optimiser steps gradients went through samples of the "
                "GaussianHead, and its loss was never called: the training has the noise and pays "
                "no rate. Call what wrap has returned, criterion = wrap(loss, ...), or take CLIMB "
                "out, unwrap(criterion)."
            )
        elif is_called and self._were("eval", last) and self._students_are_in_eval():
            self._count(
                f"CLIMB: in {_PATIENCE} optimiser steps the projection head was in eval(), where "
                "its GaussianHead passes on the mean: the training is the plain one. Call "
                "model.train(), or take CLIMB out, unwrap(criterion)."
            )

    def _count(self, message: str) -> None:
        self._steps += 1
        if self._steps == _PATIENCE:
            self._warned = True
            warn(message)

    def _were(self, outcome: str, last: int) -> bool:
        return any(head.last_calls.get(outcome, 0) > last for head in self._heads)

    def _students_are_in_eval(self) -> bool:
        # A head alone may be in eval() for a warm-up.
        return bool(self._students) and not any(student.training for student in self._students)
