"""beta over the optimiser steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Protocol, TypeVar
from weakref import ReferenceType, ref

import torch
import torch.distributed as dist
from torch import Tensor

from climb_plugin.ranks import several

# Of a target rate: weight of the change of the error, and the rate in nats below which all rates
# count as equal.
_DAMPING = 3.0
_LEAST_RATE = 1e-6


class Schedule(Protocol):
    """Anything that gives beta at a step; its ``repr`` says what it is."""

    def __call__(self, step: int) -> float | Tensor:
        """Beta at optimiser step ``step``, counted from 0; a scalar."""
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
            object.__setattr__(self, name, _checked_duration(name, getattr(self, name)))
        if self.total_steps is not None:
            if isinstance(self.total_steps, bool) or not isinstance(self.total_steps, Integral):
                raise TypeError(f"total_steps must be an int, got {self.total_steps!r}.")
            object.__setattr__(self, "total_steps", int(self.total_steps))
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


class TargetRate:
    """Adapts beta so that the rate arrives at a target and stays there.

    Log beta is the dual variable of the constraint ``rate = nats``, so beta is positive. After
    every optimiser step it moves by

        speed * error + 3 * (change of the error since the last step),

    where the error is the logarithm of the rate over the target (in the first part between -1 and
    1). The second part damps: beta rests while the error shrinks by the fraction speed / 3 per
    step, and goes back while it shrinks faster. A training answers slowly, because mean and std
    follow at the pace of the optimiser; without that part beta would grow all the while, and the
    rate fall far too low. It is the smoothed rate that arrives: single batches scatter about it,
    and beta with them. (To smooth the rate first delays the answer, and makes both swing.)

    It belongs to one loss, whose rate it sees. Beta stays on the device. With several ranks the
    rate is averaged over them, by one all-reduce of a scalar in every call of the loss, so beta is
    the same on all.

    A base loss may want fewer nats than the target: then beta goes to its lower bound. If the
    rate swings about the target instead of settling, the training is too slow for ``speed``:
    halve it.

    Args:
        nats: The target, per sample, summed over dimensions (and heads), averaged over samples
            and views.
        beta: Where beta starts, in units of the base loss per nat.
        bounds: Least and greatest beta.
        speed: Change of log beta per optimiser step at an error of 1 or more (a rate of e times
            the target). The default suits trainings that answer within a few hundred steps.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If the target is not positive, beta is out of bounds, or speed is not
            positive.

    Source: a constraint by a Lagrange multiplier that is adapted in training, as Rezende and
    Viola, Taming VAEs, 2018, have it for the distortion. The controller is ours: a proportional
    and integral one in its incremental form, whose bounds cannot wind it up.

    Examples:
        >>> target = TargetRate(20.0, beta=1e-3)
        >>> for step in range(100):
        ...     target.observe(step, torch.tensor(100.0))
        >>> bool(target(100) > 5e-3)
        True
    """

    def __init__(
        self,
        nats: float,
        *,
        beta: float = 1e-3,
        bounds: tuple[float, float] = (1e-8, 1e2),
        speed: float = 0.02,
    ) -> None:
        least, most = bounds
        positive = {"nats": nats, "beta": beta, "speed": speed, "bounds": least}
        for name, value in positive.items():
            if checked_number(name, value) == 0:
                raise ValueError(f"{name} must be above 0, got {value}.")
        if not least <= beta <= checked_number("bounds", most):
            raise ValueError(f"beta must lie within its bounds, got {beta} and {bounds}.")
        self.nats = float(nats)
        self.bounds = (float(least), float(most))
        self.speed = float(speed)
        self.start = float(beta)
        self._owner: ReferenceType[object] | None = None
        self._begin()

    def _begin(self) -> None:
        self._log_beta = _float32(math.log(self.start))
        self._before: Tensor | None = None
        # What the calls of one step have shown (a loss per view, gradient accumulation).
        self._step = 0
        self._rates: list[Tensor] = []

    def belong_to(self, owner: object) -> None:
        """Notes whose rate it sees, and begins anew: what a loss before has adapted is not its own.

        Raises:
            ValueError: If it belongs to another loss.
        """
        before = None if self._owner is None else self._owner()
        if before is not None and before is not owner:
            raise ValueError(
                "this TargetRate belongs to another loss, whose rate it sees: it cannot hold "
                "two. Make one for each loss, and for each run."
            )
        self._begin()
        self._owner = ref(owner)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a loss has a copy of this, which then is its own.
        return {**self.__dict__, "_owner": None}

    def __call__(self, step: int) -> Tensor:
        """Beta at this step, a scalar on the device of the rates seen before."""
        self._end_before(step)
        return self._log_beta.exp().clamp(*self.bounds)

    def observe(self, step: int, rate: Tensor) -> None:
        """Takes a rate into account; it has its effect from the next step on.

        Args:
            step: The optimiser step. The rates of one step are averaged.
            rate: A scalar in nats, on this rank.
        """
        self._end_before(step)
        self._step = step
        # Averaged over the ranks at once: a checkpoint of one rank is then right for all.
        self._rates.append(_mean_over_ranks(rate.detach().float()))

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs, as numbers."""
        return {
            "log_beta": float(self._log_beta),
            "before": None if self._before is None else float(self._before),
            "step": self._step,
            "rates": [float(rate) for rate in self._rates],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state` returned.

        Raises:
            ValueError: If ``state`` is something else, or a number in it is not finite.
        """
        try:
            step, rates, before = state["step"], list(state["rates"]), state["before"]
            numbers = torch.tensor([step, *rates, state["log_beta"], before or 0.0])
            whole = isinstance(step, int) and bool(torch.isfinite(numbers).all())
        except (KeyError, TypeError, ValueError, RuntimeError):
            whole = False
        if not whole:
            raise ValueError(
                "the state of a TargetRate has log_beta, before, step and rates, all finite, got "
                f"{state!r}: it is damaged, or of something else."
            )
        self._log_beta = _float32(state["log_beta"])
        self._before = None if before is None else _float32(before)
        self._step = step
        self._rates = [_float32(rate) for rate in rates]

    def _end_before(self, step: int) -> None:
        if self._rates and step != self._step:
            last = self._rates[-1]
            self._move(torch.stack([_beside(last, seen) for seen in self._rates]).mean())
            self._rates = []

    def _move(self, rate: Tensor) -> None:
        before = rate if self._before is None else _beside(rate, self._before)
        self._before = rate
        error = self._error(rate)
        step = self.speed * error.clamp(-1, 1) + _DAMPING * (error - self._error(before))
        moved = _beside(rate, self._log_beta) + step
        self._log_beta = moved.clamp(*(math.log(bound) for bound in self.bounds))

    def _error(self, rate: Tensor) -> Tensor:
        # In logarithms, as the rate falls about as a power of beta.
        return (rate.clamp_min(_LEAST_RATE) / self.nats).log()

    def __repr__(self) -> str:
        return (
            f"TargetRate({self.nats}, beta={self.start}, bounds={self.bounds}, speed={self.speed})"
        )


def _float32(value: float) -> Tensor:
    # The default dtype is bfloat16 in a bf16-true run, and float64 in many a script.
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _mean_over_ranks(value: Tensor) -> Tensor:
    if several():
        value = value.clone()
        dist.all_reduce(value)
        return value / dist.get_world_size()
    return value


def _beside(other: Tensor, value: Tensor) -> Tensor:
    """A scalar on the device of ``other``; filled in there, since a copy would wait for it."""
    return value if value.device == other.device else other.new_full((), float(value))


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
    if not _is_number(value):
        raise TypeError(f"{name} must be a number or a schedule, got {value!r}.")
    return checked_number(name, value)


def checked_number(name: str, value: float) -> float:
    """``value`` as a float, if it is a number of 0 or more; ``name`` is for the message.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative or not finite.
    """
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value}.")
    return float(value)


def checked_step(step: int) -> int:
    """``step`` as an int, if it can be a count of optimiser steps.

    Raises:
        ValueError: If it is no int of 0 or more.
    """
    if isinstance(step, bool) or not isinstance(step, Integral) or step < 0:
        raise ValueError(f"step must be an int of 0 or more, got {step!r}.")
    return int(step)


def _is_number(value: object) -> bool:
    # numpy's numbers are registered as such; torch's tensors are not.
    return isinstance(value, Real) and not isinstance(value, bool)


def _checked_duration(name: str, value: int | float) -> int | float:
    if not _is_number(value):
        raise TypeError(f"{name} must be an int (steps) or a float (fraction), got {value!r}.")
    whole = isinstance(value, Integral)
    if value < 0 or (not whole and not value < 1):
        raise ValueError(
            f"{name} must be an int of steps (0 or more) or a fraction in [0, 1), got {value}."
        )
    return int(value) if whole else float(value)
