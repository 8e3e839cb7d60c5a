"""Adapts beta so that the rate reaches a target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from climb_plugin.checks import checked_number
from climb_plugin.distributed import beside
from climb_plugin.schedule.base import Schedule

# Weight of the change of the error, the most that counts of a change, and the rate in nats below
# which all rates count as equal.
_DAMPING = 3.0
_MOST_CHANGE = 0.5
_LEAST_RATE = 1e-6


class TargetRate(Schedule):
    """Adapts beta so that the rate arrives at a target and stays there.

    Log beta is the dual variable of the constraint ``rate = nats``, so beta is positive. After
    every optimiser step log beta moves by

        speed * error + 3 * (change of the error since the last step),

    where the error is the logarithm of the rate over the target (in the first part between -1 and
    1), and its change counts up to 0.5 either way: a single batch of another kind moves beta by a
    factor of 4.5 at most, and the next batch takes that back. The second part damps: beta rests
    while the error shrinks by the fraction speed / 3 per step, and goes back while the error
    shrinks faster. Mean and std follow beta slowly, at the pace of the optimiser; without damping
    beta would grow meanwhile, and the rate fall far too low. The smoothed rate arrives; single
    batches scatter, and beta with them. (Smoothing the rate first would make both swing.) On
    scikit-learn's digits, SimCLR and DINO, the smoothed rate came within 5 % of 20 nats after 480
    to 1,230 steps, from beta 1e-5 or 1e-1 (one seed each).

    A TargetRate belongs to one loss. Beta stays on the device, and is the same on all ranks. If the
    base loss wants fewer nats than the target, beta goes to the lower bound. If the rate swings
    about the target instead of settling, the training is too slow for ``speed``: halve that.

    Args:
        nats: The target, per sample, summed over dimensions (and heads), averaged over samples and
            views.
        beta: The first beta, in units of the base loss per nat.
        bounds: Least and greatest beta.
        speed: Change of log beta per optimiser step at an error of 1 or more (a rate of e times the
            target). The default suits trainings that answer within a few hundred steps.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If the target is not positive, beta is out of bounds, or speed is not positive.

    Source: a constraint by a Lagrange multiplier that is adapted in training, as Rezende and Viola,
    Taming VAEs, 2018, have for the distortion. The controller is ours: a proportional and integral
    one in its incremental form, whose bounds cannot wind it up.

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
        for name, value in {"nats": nats, "beta": beta, "speed": speed, "bounds": least}.items():
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

    def belong_to(self, owner: object, *, free_nats: float) -> None:
        """Begins anew: the beta adapted to another loss is of no use to this one.

        Raises:
            ValueError: If the schedule belongs to another loss, or the target is within the free
                nats.
        """
        if self.nats <= free_nats:
            raise ValueError(
                f"a target rate of {self.nats} nats cannot be held while {free_nats} nats are "
                "free: below these no beta has an effect. Lower free_nats or raise the target."
            )
        before = None if self._owner is None else self._owner()
        if before is not None and before is not owner:
            raise ValueError(
                "this TargetRate belongs to another loss, whose rate it sees: it cannot hold "
                "two. Make one for each loss, and for each run."
            )
        self._begin()
        self._owner = ref(owner)

    def __getstate__(self) -> dict[str, Any]:
        # A copied loss has a copied schedule, which must not belong to the original.
        return {**self.__dict__, "_owner": None}

    def __call__(self, step: int) -> Tensor:
        """Beta at this step, a scalar on the device of the rates seen before."""
        return self._log_beta.exp().clamp(*self.bounds)

    def observe(self, step: int, rate: Tensor) -> None:
        """Moves beta by the rate of a step, for the steps to come."""
        rate = rate.detach().float()
        before = rate if self._before is None else beside(rate, self._before)
        # NaN where no rank had a posterior.
        rate = torch.where(rate.isnan(), before, rate)
        before = torch.where(before.isnan(), rate, before)
        self._before = rate
        error = self._error(rate)
        change = (error - self._error(before)).clamp(-_MOST_CHANGE, _MOST_CHANGE)
        move = self.speed * error.clamp(-1, 1) + _DAMPING * change
        moved = beside(rate, self._log_beta) + move.nan_to_num(nan=0.0)
        self._log_beta = moved.clamp(*(math.log(bound) for bound in self.bounds))

    def state(self) -> dict[str, Any]:
        """The controller's state, as numbers."""
        before = None if self._before is None else float(self._before)
        known = before is not None and not math.isnan(before)
        return {"log_beta": float(self._log_beta), "before": before if known else None}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores a :meth:`state`; a ValueError if that is damaged."""
        try:
            before, log_beta = state["before"], state["log_beta"]
            whole = all(math.isfinite(value) for value in (log_beta, before or 0.0))
        except (KeyError, TypeError):
            whole = False
        if not whole:
            raise ValueError(
                "the state of a TargetRate has log_beta and before, both finite, got "
                f"{state!r}: it is damaged, or of something else."
            )
        self._log_beta = _float32(log_beta)
        self._before = None if before is None else _float32(before)

    def _error(self, rate: Tensor) -> Tensor:
        # In logarithms, as the rate falls about as a power of beta.
        return (rate.clamp_min(_LEAST_RATE) / self.nats).log()

    def __repr__(self) -> str:
        return (
            f"TargetRate({self.nats}, beta={self.start}, bounds={self.bounds}, speed={self.speed})"
        )


def _float32(value: float) -> Tensor:
    # Not torch's default dtype: bfloat16 in a bf16-true run, float64 in many a script.
    return torch.tensor(value, dtype=torch.float32, device="cpu")
