"""Checks arguments, and warns at the line of the user's program."""

from __future__ import annotations

import math
import operator
import os
import sys
import warnings
from collections.abc import Collection
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NOT_THE_USERS = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))


def is_number(value: object) -> bool:
    """Whether a value is a real number; numpy's are, tensors and bools are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Whether a value is an integer; numpy's are, bools are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def checked_number(name: str, value: float, *, kind: str = "a number") -> float:
    """``value`` as a float; a TypeError if no number, a ValueError if negative or not finite."""
    if not is_number(value):
        raise TypeError(f"{name} must be {kind}, got {value!r}.")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value}.")
    return float(value)


def checked_step(step: int) -> int:
    """``step`` as an int; a ValueError if unfit for a count of optimiser steps."""
    if not is_whole(step) or step < 0:
        raise ValueError(f"step must be an int of 0 or more, got {step!r}.")
    return int(step)


def checked_width(name: str, value: int) -> int:
    """``value`` as an int; a ValueError if unfit for the width of an embedding."""
    try:
        width = operator.index(value)
    except TypeError:
        width = 0
    if width < 1 or isinstance(value, bool):
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    return width


def checked_choice(name: str, value: str, choices: Collection[str]) -> str:
    """``value``; a ValueError if none of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return value


def checked_scalar(value: Any) -> Tensor:
    """The value of a base loss; a TypeError or ValueError if no tensor with one element."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"the base loss must return a scalar tensor, got {type(value).__name__}: wrap a "
            "function that picks the scalar."
        )
    if value.numel() != 1:
        raise ValueError(
            f"the base loss must return a scalar tensor, got shape {tuple(value.shape)}: use its "
            "reduction='mean', or wrap a function that reduces it."
        )
    return value


def warn(message: str) -> None:
    """Warns at the innermost line that belongs neither to this package nor to torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
