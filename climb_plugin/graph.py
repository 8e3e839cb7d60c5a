"""Finds what was tied to the autograd graph of a value.

A posterior lives exactly as long as the graph of the sample that was drawn from it, and counts
in a loss exactly when that loss depends on the sample. So nothing has to be cleared: a forward
whose output goes nowhere leaves nothing behind, the second run of a checkpointed forward never
reaches the loss, and a script that calls its criterion once per view counts each view once.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from torch.autograd.graph import Node

_KEY = "climb_plugin"


def tie(item: object, *, to: Tensor) -> None:
    """Makes the autograd node of ``to`` hold ``item``, beside what it holds already.

    Args:
        item: What :func:`tied` shall find.
        to: A tensor with a ``grad_fn``.

    Raises:
        ValueError: If ``to`` has no ``grad_fn``.
    """
    if to.grad_fn is None:
        raise ValueError("the tensor has no grad_fn, so nothing can be tied to its graph.")
    tie_to_node(item, to.grad_fn)


def tie_to_node(item: object, node: Node) -> None:
    """Makes ``node`` hold ``item``, beside what it holds already."""
    # All that was compiled together has one node, and so has all that was checkpointed together.
    _metadata(node).setdefault(_KEY, []).append(item)


def tied(value: Tensor) -> list[Any]:
    """What was tied to the nodes that ``value`` depends on, in no particular order.

    The search does not go beyond a node that holds something.

    Args:
        value: A tensor; without a ``grad_fn`` it depends on nothing.

    Examples:
        >>> import torch
        >>> sample = 2 * torch.ones(3, requires_grad=True)
        >>> tie("posterior", to=sample)
        >>> tied(sample.sum()), tied(sample.detach().sum())
        (['posterior'], [])
    """
    return _search([value.grad_fn])


def tied_before(node: Node | None) -> list[Any]:
    """What was tied to the nodes that ``node`` depends on, but not to that itself."""
    return [] if node is None else _search([parent for parent, _ in node.next_functions])


def _search(stack: list[Node | None]) -> list[Any]:
    found = []
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node is None:
            continue
        items = _metadata(node).get(_KEY)
        if items is not None:
            found.extend(items)
            continue
        for parent, _ in node.next_functions:
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return found


def _metadata(node: Node) -> dict[str, Any]:
    # A property that torch annotates as a method.
    return cast("dict[str, Any]", node.metadata)
