"""Finds the samples that a value depends on, by a walk through its autograd graph."""

from __future__ import annotations

import threading
from operator import attrgetter
from typing import TYPE_CHECKING

from torch import Tensor
from torch.autograd.graph import Node

from climb_plugin._graph.sample import Sample, alive, samples_at
from climb_plugin._torch import sequence_number

if TYPE_CHECKING:
    from climb_plugin.head import GaussianHead

# The sequence number of the graph's leaves, the greatest that there is.
_LEAF = 2**64 - 1


def samples_behind(value: Tensor, heads: set[GaussianHead]) -> list[Sample]:
    """The samples of ``heads`` that ``value`` depends on, in the order of their draws.

    The walk goes on behind a sample: a head may stand behind another one, or behind itself.
    """
    known = alive(heads)
    found: list[Sample] = []
    if {one.thread for one in known} == {threading.get_ident()}:
        found = _search(value, oldest=min([one.sequence for one in known]))
    # Each thread numbers its nodes separately. If a living sample was not found, nodes of another
    # thread may lie in between, whose numbers say nothing: then search the whole graph.
    if not found or not set(known).issubset(found):
        found = _search(value, oldest=0)
    return sorted([one for one in found if one.head in heads], key=attrgetter("number"))


def foreign_samples_behind(value: Tensor, heads: set[GaussianHead]) -> list[Sample]:
    """The samples of all other heads that ``value`` depends on."""
    return [one for one in _search(value, oldest=0) if one.head not in heads]


def leaves_behind(value: Tensor) -> set[int]:
    """The ids of the tensors that a backward pass of ``value`` would give a gradient."""
    nodes = _nodes(value, oldest=0, leaves=True)
    return {id(node.variable) for node in nodes if hasattr(node, "variable")}


def _search(value: Tensor, *, oldest: int) -> list[Sample]:
    return samples_at(_nodes(value, oldest=oldest, leaves=False))


def _nodes(value: Tensor, *, oldest: int, leaves: bool) -> list[Node]:
    """The nodes behind ``value`` that are no older than ``oldest``.

    A node is younger than all nodes behind, so nothing wanted lies behind an older one.
    """
    if value.grad_fn is None:
        return []
    nodes = [value.grad_fn]
    seen: set[Node] = set(nodes)
    for node in nodes:
        for parent, _ in node.next_functions:
            if parent is None or parent in seen:
                continue
            number = sequence_number(parent)
            if number < oldest or (number == _LEAF and not leaves):
                continue
            seen.add(parent)
            nodes.append(parent)
    return nodes
