"""Finds what was tied to the autograd graph of a value.

A posterior lives exactly as long as the graph of the sample that was drawn from it, and counts
in a loss exactly when that loss depends on the sample. So nothing has to be cleared: a forward
whose output goes nowhere leaves nothing behind, the second run of a checkpointed forward never
reaches the loss, and a script that calls its criterion once per view counts each view once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node

P = ParamSpec("P")
R = TypeVar("R")

_KEY = "climb_plugin"


def tie(item: object, *, to: Tensor) -> None:
    """Makes the autograd node of ``to`` hold ``item``.

    Args:
        item: What :func:`tied` shall find.
        to: A tensor with a ``grad_fn``.

    Raises:
        ValueError: If ``to`` has no ``grad_fn``.
    """
    if to.grad_fn is None:
        raise ValueError("the tensor has no grad_fn, so nothing can be tied to its graph.")
    _metadata(to.grad_fn)[_KEY] = item


def tied(value: Tensor) -> list[Any]:
    """What was tied to the nodes that ``value`` depends on, in no particular order.

    The search does not go beyond a node that holds something.

    Args:
        value: A tensor; without a ``grad_fn`` it depends on nothing.

    Examples:
        >>> sample = 2 * torch.ones(3, requires_grad=True)
        >>> tie("posterior", to=sample)
        >>> tied(sample.sum()), tied(sample.detach().sum())
        (['posterior'], [])
    """
    found = []
    stack = [value.grad_fn]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node is None:
            continue
        item = _metadata(node).get(_KEY)
        if item is not None:
            found.append(item)
            continue
        for parent, _ in node.next_functions:
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return found


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Makes torch.compile step around ``function``: nodes exist only in eager mode.

    ``torch.compiler.disable`` as a decorator would import the compiler with this package, which
    takes a second.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            disabled: Callable[P, R] = torch.compiler.disable(function)
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def _metadata(node: Node) -> dict[str, Any]:
    # A property that torch annotates as a method.
    return cast("dict[str, Any]", node.metadata)
