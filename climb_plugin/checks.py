"""Checks arguments, and warns at the line of the user's program."""

from __future__ import annotations

import math
import operator
import os
import sys
import warnings
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NOT_THE_USERS = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))


def checked_number(name: str, value: float) -> float:
    """``value`` as a float, if a number of 0 or more; messages call the value ``name``.

    Raises:
        TypeError: If the value is no number.
        ValueError: If the value is negative or not finite.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value}.")
    return float(value)


def checked_step(step: int) -> int:
    """``step`` as an int, if fit for a count of optimiser steps.

    Raises:
        ValueError: If ``step`` is no int of 0 or more.
    """
    if isinstance(step, bool) or not isinstance(step, Integral) or step < 0:
        raise ValueError(f"step must be an int of 0 or more, got {step!r}.")
    return int(step)


def checked_width(name: str, value: int) -> int:
    """``value`` as an int, if fit for the width of an embedding; numpy's integers are.

    Raises:
        ValueError: If the value is no positive integer.
    """
    try:
        width = operator.index(value)
    except TypeError:
        width = 0
    if width < 1 or isinstance(value, bool):
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    return width


def checked_scalar(value: Any) -> Tensor:
    """The value of a base loss, if it is a tensor with one element.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it has more elements, or none.
    """
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


def is_number(value: object) -> bool:
    """Whether a value is a real number; numpy's are, tensors and bools are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def warn(message: str) -> None:
    """Warns at the innermost line that belongs neither to this package nor to torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
