"""Copies a module, to be run in its stead."""

from __future__ import annotations

import copy
from collections import deque
from contextlib import suppress
from dataclasses import is_dataclass
from types import CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from climb_plugin._torch import without_hooks
from climb_plugin.gaussian import widened

YOURSELF = "put a GaussianHead(width) into it yourself, and use ClimbLoss(loss, heads=...)"
"""What a user can do whose module cannot be run."""
_CONTAINERS = (list, tuple, dict, set, deque, SimpleNamespace)
_OF_TORCH = frozenset(vars(nn.Module()))  # hooks, parameters, children, ...


def copied(module: nn.Module, *, parameters: bool) -> nn.Module:
    """A copy in training mode, without hooks; the parameters are copied too, or shared.

    Half precision becomes float32: rounding would blur the comparison of outputs. Of containers
    whose items cannot be copied, as outputs with a graph, the copy has the same items. Functions
    among the attributes (a replaced ``forward``) close over the copy. Raises a ValueError for other
    attributes that cannot be copied.
    """
    memo: dict[int, Any] = without_hooks(module)
    for part in module.modules():
        # Plain tensors as well: weight_norm leaves some with a graph, which deepcopy refuses.
        for tensor in [*part.buffers(recurse=False), *vars(part).values()]:
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _in_full_precision(tensor)
    for parameter in module.parameters():
        memo[id(parameter)] = (
            nn.Parameter(_in_full_precision(parameter), requires_grad=False)
            if parameters
            else parameter
        )
    for part in reversed(list(module.modules())):  # a container's own lists may hold its layers
        for name, value in vars(part).items():
            if name not in _OF_TORCH and not isinstance(value, nn.Module):
                _note(f"{type(part).__name__}.{name}", value, memo)
    made = copy.deepcopy(module, memo).train()
    for part in made.modules():
        for name, value in vars(part).items():
            if isinstance(value, FunctionType):
                vars(part)[name] = _closed_over_copies(value, memo)
    return made


def _closed_over_copies(value: Any, memo: dict[int, Any]) -> Any:
    """A module, method or function as the copy has it; deepcopy shares functions."""
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _closed_over_copies(value.__self__, memo))
    if not isinstance(value, FunctionType) or not value.__closure__:
        return value
    # Torch's own close over compiled code, which must not be compiled for every copy.
    if value.__globals__.get("__name__", "").startswith("torch."):
        return value
    if id(value) not in memo:
        cells = tuple(CellType() for _ in value.__closure__)
        made = FunctionType(
            value.__code__, value.__globals__, value.__name__, value.__defaults__, cells
        )
        made.__kwdefaults__ = value.__kwdefaults__
        memo[id(value)] = made  # before the cells, one of which may hold the function itself
        for cell, there in zip(cells, value.__closure__, strict=True):
            with suppress(ValueError):  # an empty one
                cell.cell_contents = _closed_over_copies(there.cell_contents, memo)
    return memo[id(value)]


def _note(name: str, value: Any, memo: dict[int, Any]) -> None:
    """Notes a copy of an attribute in the memo of a deepcopy."""
    before = len(memo)
    try:
        copy.deepcopy(value, memo)
    except Exception as error:  # users' objects may raise anything
        while len(memo) > before:  # half copied
            memo.popitem()
        if isinstance(value, torch.Generator):
            memo[id(value)] = torch.Generator(value.device).set_state(value.get_state())
        elif isinstance(value, _CONTAINERS) or is_dataclass(value):
            memo[id(value)] = copy.copy(value)
        elif isinstance(value, ModuleType) or type(value).__module__.startswith("torch."):
            # torch.nn.functional, or a process group
            memo[id(value)] = value
        else:
            raise ValueError(
                f"{name} cannot be copied ({error}), and a copy is run to find where the embedding "
                f"is: set that attribute after the loss is wrapped, or {YOURSELF}."
            ) from error


def _in_full_precision(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (widened(tensor) if tensor.is_floating_point() else tensor).clone()
