"""Checks and copies what a checkpoint keeps of a criterion; a ValueError if that is damaged."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from climb_plugin.checks import checked_step
from climb_plugin.distributed import beside


def checked_state(
    state: Any, config: Collection[str]
) -> tuple[int, tuple[int, int], StepRates, Mapping[str, Any]]:
    """Step, place in the noise, rates, and schedules of a criterion's state.

    Args:
        state: Of :meth:`climb_plugin.ClimbLoss.climb_state`.
        config: The names of the settings that must be there.
    """
    if not isinstance(state, Mapping) or not {"step", *config} <= state.keys():
        raise ValueError(
            f"the state of a ClimbLoss has step, {', '.join(config)}, got {state!r}: it is "
            "damaged, or of something else."
        )
    return (
        checked_step(state["step"]),
        checked_position(state.get("noise")),
        checked_rates(state.get("rates")),
        checked_schedules(state.get("schedule")),
    )


def checked_position(saved: Any) -> tuple[int, int]:
    """A place in the noise, as :func:`climb_plugin._graph.noise.position` returns one."""
    if saved is None:  # as of a random state that never comes
        return 0, 0
    if not (
        isinstance(saved, Sequence)
        and len(saved) == 2
        and all(isinstance(number, int) and number >= 0 for number in saved)
    ):
        raise ValueError(
            f"the noise in the state of a ClimbLoss is two ints of 0 or more, got {saved!r}."
        )
    return saved[0], saved[1]


def checked_schedules(saved: Any) -> Mapping[str, Any]:
    """The states of schedules by the names of their classes."""
    if saved is not None and not isinstance(saved, Mapping):
        raise ValueError(
            "the schedule in the state of a ClimbLoss is a dict of its class and state, got "
            f"{saved!r}."
        )
    return saved or {}


class StepRates:
    """The rates of the calls of a step, until the step is over."""

    def __init__(self, step: int = 0, rates: Iterable[Tensor] = ()) -> None:
        self._step, self._rates = step, list(rates)

    def add(self, step: int, rate: Tensor) -> None:
        """Adds the rate of a call; NaN if it had none, on any rank."""
        self._step = step
        self._rates.append(rate)

    def take(self, step: int) -> tuple[int, Tensor] | None:
        """The step before ``step`` and the mean rate of its calls, once; None if there is none."""
        if not self._rates or step == self._step:
            return None
        rates, self._rates = self._rates, []
        return self._step, torch.stack([beside(rates[-1], rate) for rate in rates]).nanmean()

    def state(self) -> list[float]:
        """The step, and the rates that are known, as numbers; waits for the device."""
        return [self._step, *(rate for rate in map(float, self._rates) if not math.isnan(rate))]


def checked_rates(saved: Any) -> StepRates:
    """The rates of a :meth:`StepRates.state`."""
    try:
        step, *rates = [0] if saved is None else saved
        whole = isinstance(step, int) and all(math.isfinite(rate) for rate in rates)
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(
            "the rates in the state of a ClimbLoss are a step and finite numbers, got "
            f"{saved!r}: it is damaged, or of something else."
        )
    values = [torch.tensor(rate, dtype=torch.float32, device="cpu") for rate in rates]
    return StepRates(step, values)


def copied(state: Any) -> Any:
    """A state that later steps do not change, and that loads with ``weights_only=True``."""
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [copied(value) for value in state]
    if isinstance(state, Tensor):
        return state.detach().clone()
    return state.item() if isinstance(state, np.generic) else state
