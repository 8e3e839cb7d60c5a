"""Defines schedules, and makes schedules of numbers and functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from climb_plugin.checks import checked_number

BETA = "a number or a schedule"
"""A beta, in messages."""


class Schedule:
    """Gives beta at each optimiser step; the base of all schedules, and of yours.

    A subclass defines ``__call__``, and any of the other methods, whose defaults do nothing; the
    loss and the hosts' adapters do the rest. A schedule that defines ``observe`` sees the rate of
    every step, one that defines ``over`` is laid over the training, and the result of ``state`` is
    in the checkpoints. Checkpoints compare the ``repr``.

    Attributes:
        is_constant: Whether beta is the same at every step.

    Examples:
        >>> class Gentle(Schedule):
        ...     def __init__(self):
        ...         self.beta = 1e-3
        ...     def __call__(self, step):
        ...         return self.beta
        ...     def observe(self, step, rate):
        ...         self.beta *= 1.01 if rate > 20 else 0.99
        ...     def state(self):
        ...         return {"beta": self.beta}
        ...     def load_state(self, state):
        ...         self.beta = state["beta"]
        >>> Gentle().needs_rate, Gentle().needs_length
        (True, False)
    """

    is_constant = False

    def __call__(self, step: int) -> float | Tensor:
        """Beta at optimiser step ``step``, counted from 0: a number or a scalar tensor."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(self, step).")

    def over(self, total_steps: int | None) -> Schedule:
        """This schedule in a training of ``total_steps`` optimiser steps.

        Args:
            total_steps: None: an unknown length, as at the start. 0: beta is that of the end, for a
                search for a learning rate before the training.
        """
        return self

    def observe(self, step: int, rate: Tensor) -> None:
        """Takes the rate of a step into account, in nats, detached, averaged over all ranks.

        Ranks whose calls had no posteriors do not count; NaN if no rank of several had one.
        """

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint needs beside the arguments, as numbers."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores a :meth:`state`, or raises a ValueError and changes nothing."""

    def belong_to(self, owner: object, *, free_nats: float) -> None:
        """Tells the schedule which loss's rate it sees; may raise.

        Args:
            owner: Stands for the loss.
            free_nats: Nats of that rate that cost nothing.
        """

    @property
    def needs_length(self) -> bool:
        """Whether beta depends on the length of the training."""
        return type(self).over is not Schedule.over

    @property
    def needs_rate(self) -> bool:
        """Whether the schedule observes the rate; with several ranks that costs an all-reduce."""
        return type(self).observe is not Schedule.observe

    def __repr__(self) -> str:
        return type(self).__name__


@dataclass(frozen=True)
class Constant(Schedule):
    """The same beta at every step.

    Args:
        beta: Weight of the rate, in units of the base loss per nat.

    Raises:
        ValueError: If beta is negative or not finite.

    Examples:
        >>> Constant(1e-3)(step=10)
        0.001
    """

    beta: float
    is_constant = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", checked_number("beta", self.beta, kind=BETA))

    def __call__(self, step: int) -> float:
        """Beta at any step."""
        return self.beta


class _Function(Schedule):
    """A plain function from a step to beta."""

    def __init__(self, function: Callable[[int], float | Tensor]) -> None:
        self._function = function

    def __call__(self, step: int) -> float | Tensor:
        return self._function(step)

    def __repr__(self) -> str:
        # Not the function's repr, whose address would differ in the next run.
        return getattr(self._function, "__qualname__", type(self._function).__name__)


def as_schedule(beta: float | Schedule | Callable[[int], float | Tensor]) -> Schedule:
    """A number as a :class:`Constant`, a function of the step as a schedule, a schedule as it is.

    Raises:
        TypeError: If ``beta`` is neither a number nor callable.
        ValueError: If a number is negative or not finite.
    """
    if isinstance(beta, type):
        raise TypeError(f"beta is the class {beta.__name__}: pass one of it, {beta.__name__}(...).")
    if isinstance(beta, Schedule):
        if type(beta).__call__ is Schedule.__call__:
            raise TypeError(f"{type(beta).__name__} must define __call__(self, step).")
        return beta
    return _Function(beta) if callable(beta) else Constant(beta)


def beta_at(schedule: Schedule, step: int) -> float | Tensor:
    """Beta of a schedule at a step: a number, or a detached scalar tensor.

    Raises a TypeError or ValueError if the schedule returns anything else, or a number that is
    negative or not finite. (To look at the value of a tensor would wait for the device.)
    """
    beta = schedule(step)
    if not isinstance(beta, Tensor):
        return checked_number("the schedule's beta", beta, kind=BETA)
    if beta.numel() != 1:
        raise ValueError(
            f"the beta of {schedule!r} must be a number or a scalar tensor, got shape "
            f"{tuple(beta.shape)}."
        )
    return beta.detach().reshape(())
