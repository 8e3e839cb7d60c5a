"""Raises beta over a warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from climb_plugin.checks import checked_number, is_number, is_whole
from climb_plugin.schedule.base import BETA, Schedule

_SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda start, end, part: start + (end - start) * part,
    "cosine": lambda start, end, part: start + (end - start) * (1 - math.cos(math.pi * part)) / 2,
    "exponential": lambda start, end, part: start * (end / start) ** part,
}
SHAPES = tuple(_SHAPES)
"""The shapes of a :class:`Ramp`."""


@dataclass(frozen=True)
class Ramp(Schedule):
    """From ``start`` to ``beta`` over a warm-up, constant afterwards.

    ``Linear``, ``Cosine`` and ``Exponential`` (with a start of 1e-6) are short for these shapes.

    Args:
        beta: Weight of the rate after the warm-up, in units of the base loss per nat.
        warmup: Length of the warm-up: an int is a number of optimiser steps, a float between 0 and
            1 a fraction of ``total_steps``. In epochs: ``warmup=10 * len(loader)``, divided by the
            gradient accumulation.
        shape: ``"linear"``; ``"cosine"``, half a cosine, which is slow at both ends; or
            ``"exponential"``, the same factor at every step, from a ``start`` above 0.
        delay: Time at ``start`` before the warm-up; steps or a fraction, like ``warmup``.
        start: Weight at the start.
        total_steps: Length of the training in optimiser steps, for fractions; a host that knows the
            length calls :meth:`over` instead.

    Raises:
        TypeError: If ``warmup`` or ``delay`` is neither an int nor a float.
        ValueError: If a value is out of range, or the warm-up would not end within ``total_steps``.

    Source: the exponential ramp is that of Federici et al., Multi-View Information Bottleneck,
    2020.

    Examples:
        >>> ramp = Ramp(1e-3, warmup=100)
        >>> ramp(0), ramp(50), ramp(100), ramp(1000)
        (0.0, 0.0005, 0.001, 0.001)
        >>> Linear(1e-3, warmup=0.1, total_steps=1000)(50)
        0.0005
        >>> round(Exponential(1.0, warmup=100, start=1e-4)(50), 12)
        0.01
    """

    beta: float
    warmup: int | float
    shape: str = "linear"
    delay: int | float = 0
    start: float = 0.0
    total_steps: int | None = None
    # Set by over(). Not in the repr: a resumed run may be longer, with the same ramp.
    laid_over: int | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {self.shape!r}.")
        for name in ("beta", "start"):
            object.__setattr__(self, name, checked_number(name, getattr(self, name), kind=BETA))
        for name in ("warmup", "delay"):
            object.__setattr__(self, name, _checked_duration(name, getattr(self, name)))
        if self.total_steps is not None:
            if not is_whole(self.total_steps):
                raise TypeError(f"total_steps must be an int, got {self.total_steps!r}.")
            if self.total_steps < 1:
                raise ValueError(f"total_steps must be 1 or more, got {self.total_steps}.")
            object.__setattr__(self, "total_steps", int(self.total_steps))
        if sum(d for d in (self.warmup, self.delay) if isinstance(d, float)) > 1:
            raise ValueError(
                f"warmup={self.warmup} and delay={self.delay} are more than the whole training."
            )
        if self.shape == "exponential" and (self.start == 0 or self.beta == 0):
            raise ValueError(
                f"an exponential ramp needs start and beta above 0, got start={self.start} and "
                f"beta={self.beta}."
            )
        if self._total:
            end = self._steps("delay") + self._steps("warmup")
            if end > self._total:
                raise ValueError(
                    f"the warm-up ends at step {end}, after the {self._total} steps of the "
                    f"training: beta would never reach {self.beta}. Shorten warmup or delay."
                )

    @property
    def needs_length(self) -> bool:
        """Whether ``warmup`` or ``delay`` is a fraction, and no ``total_steps`` is given."""
        fractions = isinstance(self.warmup, float) or isinstance(self.delay, float)
        return self.total_steps is None and fractions and not self.warmup == self.delay == 0

    def __call__(self, step: int) -> float:
        """Beta at optimiser step ``step``, counted from 0."""
        if self._total == 0:
            return self.beta
        delay, warmup = self._steps("delay"), self._steps("warmup")
        if step >= delay + warmup:
            return self.beta
        return _SHAPES[self.shape](self.start, self.beta, max(0, step - delay) / max(1, warmup))

    def over(self, total_steps: int | None) -> Ramp:
        """The same ramp in a training of ``total_steps`` optimiser steps."""
        return replace(self, laid_over=total_steps)

    @property
    def _total(self) -> int | None:
        return self.laid_over if self.total_steps is None else self.total_steps

    def _steps(self, name: str) -> int:
        duration: int | float = getattr(self, name)
        if isinstance(duration, int):
            return duration
        if self._total is None:
            raise ValueError(
                f"{name}={duration} is a fraction of the training, whose length is not known: "
                f"pass total_steps=epochs * len(dataloader), or {name} as an int of steps."
            )
        return round(duration * self._total)


Linear = partial(Ramp, shape="linear")
Cosine = partial(Ramp, shape="cosine")
Exponential = partial(Ramp, shape="exponential", start=1e-6)


def _checked_duration(name: str, value: int | float) -> int | float:
    if not is_number(value):
        raise TypeError(f"{name} must be an int (steps) or a float (fraction), got {value!r}.")
    whole = is_whole(value)
    if value < 0 or (not whole and not value < 1):
        raise ValueError(
            f"{name} must be an int of steps (0 or more) or a fraction in [0, 1), got {value}."
        )
    return int(value) if whole else float(value)
