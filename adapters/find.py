"""Finds the losses of a model, which are submodules, attributes, or items of these."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from torch import nn

from climb_plugin.loss import ClimbLoss

_KINDS = (ClimbLoss, list, tuple, dict)
# Submodules are walked as such; hyperparameters may hold a copy of the loss.
_NO_ATTRIBUTES = frozenset({"_modules", "_hparams", "_hparams_initial"})


def find_losses(model: nn.Module) -> Iterator[tuple[str, ClimbLoss]]:
    """Every loss once, with its attribute path; submodules first."""
    modules = list(model.named_modules())
    attributes = [
        (f"{prefix}.{name}".lstrip("."), value)
        for prefix, module in modules
        for name, value in vars(module).items()
        if name not in _NO_ATTRIBUTES
    ]
    seen: set[int] = set()
    places = deque([*modules, *attributes])
    while places:
        path, value = places.popleft()
        if isinstance(value, _KINDS) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, ClimbLoss):
                yield path, value
                continue
            items = value.items() if isinstance(value, dict) else enumerate(value)
            wanted = [(key, item) for key, item in items if isinstance(item, _KINDS)]
            places.extendleft(reversed([(f"{path}.{key}", item) for key, item in wanted]))
