"""Checks and copies what a checkpoint keeps of a criterion; a ValueError if that is damaged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def checked_position(saved: Any) -> tuple[int, int] | None:
    """A place in the noise, as :func:`climb_plugin._graph.noise.position` returns one."""
    if saved is None:
        return None
    if not (
        isinstance(saved, Sequence)
        and len(saved) == 2
        and all(isinstance(number, int) and number >= 0 for number in saved)
    ):
        raise ValueError(
            f"the noise in the state of a ClimbLoss is two ints of 0 or more, got {saved!r}."
        )
    return (saved[0], saved[1]) if saved[1] else None


def checked_schedules(saved: Any) -> Mapping[str, Any]:
    """The states of schedules by the names of their classes."""
    if saved is not None and not isinstance(saved, Mapping):
        raise ValueError(
            "the schedule in the state of a ClimbLoss is a dict of its class and state, got "
            f"{saved!r}."
        )
    return saved or {}


def checked_rates(saved: Any) -> tuple[int, list[Tensor]]:
    """A step and the rates of its calls so far."""
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
    return step, [torch.tensor(rate, dtype=torch.float32, device="cpu") for rate in rates]


def copied(state: Any) -> Any:
    """A state that later steps do not change, and that loads with ``weights_only=True``."""
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [copied(value) for value in state]
    if isinstance(state, Tensor):
        return state.detach().clone()
    return state.item() if isinstance(state, np.generic) else state
