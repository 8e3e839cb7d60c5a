"""beta over the optimiser steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar


class Schedule(Protocol):
    """Anything that gives beta at a step; its ``repr`` says what it is."""

    def __call__(self, step: int) -> float:
        """Beta at optimiser step ``step``, counted from 0."""
        ...


@dataclass(frozen=True)
class Constant:
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", checked_beta("beta", self.beta))

    def __call__(self, step: int) -> float:
        """Beta at any step."""
        return self.beta


_R = TypeVar("_R", bound="Ramp")


@dataclass(frozen=True)
class Ramp:
    """From ``start`` to ``beta`` over a warm-up, constant afterwards; see its subclasses.

    Args:
        beta: Weight of the rate after the warm-up, in units of the base loss per nat.
        warmup: Length of the warm-up: an int is a number of optimiser steps, a float between
            0 and 1 a fraction of ``total_steps``.
        delay: What comes before the warm-up, at ``start``; steps or a fraction, like ``warmup``.
        start: Weight at the start.
        total_steps: Length of the training in optimiser steps; only fractions need it. A host
            that knows it fills it in (:meth:`over`).

    Raises:
        TypeError: If ``warmup`` or ``delay`` is neither an int nor a float.
        ValueError: If a value is out of range, or the warm-up would not end within
            ``total_steps``.
    """

    beta: float
    warmup: int | float
    delay: int | float = 0
    start: float = 0.0
    total_steps: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", checked_beta("beta", self.beta))
        object.__setattr__(self, "start", checked_beta("start", self.start))
        for name in ("warmup", "delay"):
            _check_duration(name, getattr(self, name))
        if self.total_steps is not None:
            if isinstance(self.total_steps, bool) or not isinstance(self.total_steps, int):
                raise TypeError(f"total_steps must be an int, got {self.total_steps!r}.")
            end = self._steps("delay") + self._steps("warmup")
            if end > self.total_steps:
                raise ValueError(
                    f"the warm-up ends at step {end}, after the {self.total_steps} steps of the "
                    f"training: beta would never reach {self.beta}. Shorten warmup or delay."
                )

    def __call__(self, step: int) -> float:
        """Beta at optimiser step ``step``, counted from 0."""
        delay, warmup = self._steps("delay"), self._steps("warmup")
        if step >= delay + warmup:
            return self.beta
        return self._between(max(0, step - delay) / warmup)

    def over(self: _R, total_steps: int) -> _R:
        """The same ramp in a training of ``total_steps`` optimiser steps."""
        return replace(self, total_steps=total_steps)

    def _between(self, progress: float) -> float:
        raise NotImplementedError

    def _steps(self, name: str) -> int:
        duration: int | float = getattr(self, name)
        if isinstance(duration, int):
            return duration
        if self.total_steps is None:
            raise ValueError(
                f"{name}={duration} is a fraction of the training, whose length is not known: "
                f"pass total_steps=epochs * len(dataloader), or {name} as an int of steps."
            )
        return round(duration * self.total_steps)


@dataclass(frozen=True)
class Linear(Ramp):
    """Beta rises linearly.

    Examples:
        >>> ramp = Linear(1e-3, warmup=100)
        >>> ramp(0), ramp(50), ramp(100), ramp(1000)
        (0.0, 0.0005, 0.001, 0.001)
        >>> Linear(1e-3, warmup=0.1, total_steps=1000)(50)
        0.0005
    """

    def _between(self, progress: float) -> float:
        return self.start + (self.beta - self.start) * progress


@dataclass(frozen=True)
class Cosine(Ramp):
    """Beta rises along half a cosine: slowly at both ends.

    Examples:
        >>> round(Cosine(1e-3, warmup=100)(50), 12)
        0.0005
    """

    def _between(self, progress: float) -> float:
        return self.start + (self.beta - self.start) * (1 - math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Exponential(Ramp):
    """Beta rises by the same factor at every step; ``start`` must be positive.

    Source: the schedule of Federici et al., Multi-View Information Bottleneck, 2020.

    Examples:
        >>> round(Exponential(1.0, warmup=100, start=1e-4)(50), 12)
        0.01
    """

    start: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start == 0 or self.beta == 0:
            raise ValueError(
                f"an exponential ramp needs start and beta above 0, got start={self.start} and "
                f"beta={self.beta}."
            )

    def _between(self, progress: float) -> float:
        return float(self.start * (self.beta / self.start) ** progress)


def as_schedule(beta: float | Schedule) -> Schedule:
    """A number as a :class:`Constant`; a schedule as it is.

    Raises:
        TypeError: If ``beta`` is neither a number nor callable.
        ValueError: If a number is negative or not finite.
    """
    return beta if callable(beta) else Constant(beta)


def checked_beta(name: str, value: float) -> float:
    """``value`` as a float, if it can be a beta; ``name`` is what a message calls it.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is negative or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a schedule, got {value!r}.")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value}.")
    return float(value)


def _check_duration(name: str, value: int | float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be an int (steps) or a float (fraction), got {value!r}.")
    if value < 0 or (isinstance(value, float) and not value < 1):
        raise ValueError(
            f"{name} must be an int of steps (0 or more) or a fraction in [0, 1), got {value}."
        )
