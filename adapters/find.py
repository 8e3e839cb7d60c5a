"""Finds the losses of a model, which are submodules, attributes, or items of these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from climb_plugin.loss import ClimbLoss

# Submodules are walked as such; hyperparameters may hold a copy of the loss.
_NO_ATTRIBUTES = frozenset({"_modules", "_hparams", "_hparams_initial"})


def find_losses(model: nn.Module) -> Iterator[tuple[str, ClimbLoss]]:
    """Every loss once, with its attribute path; submodules first."""
    seen: set[int] = set()
    modules = list(model.named_modules())
    attributes = [
        (f"{prefix}.{name}" if prefix else name, value)
        for prefix, module in modules
        for name, value in vars(module).items()
        if name not in _NO_ATTRIBUTES
    ]
    for path, value in (*modules, *_with_items(attributes, seen)):
        if isinstance(value, ClimbLoss) and id(value) not in seen:
            seen.add(id(value))
            yield path, value


def _with_items(named: list[tuple[str, Any]], seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Values, and the items of lists, tuples and dicts among them, at any depth."""
    for path, value in named:
        yield path, value
        if isinstance(value, (list, tuple, dict)) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            yield from _with_items([(f"{path}.{key}", item) for key, item in items], seen)
