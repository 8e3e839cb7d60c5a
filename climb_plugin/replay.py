"""Posteriors of code that a reentrant checkpoint runs twice.

``torch.utils.checkpoint(use_reentrant=True)`` runs the code without gradients, leaves one node in
the autograd graph, and runs the code again, with gradients, when a backward pass comes to that
node. The loss is computed between the two runs. So the posteriors of the first hang on the node,
as constants; the loss differentiates its penalty by these, before the backward pass goes on from
the base loss to the node; and the posteriors of the second run add the result to their gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from types import FrameType
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, Function
from torch.autograd.graph import Node


class Held:
    """The values of a first run, and the gradient by them until the second run takes it.

    Args:
        values: Of the first run.
        checkpoint: The node of the checkpoint, which holds this.
    """

    def __init__(self, values: Sequence[Tensor], checkpoint: Node) -> None:
        self.values = tuple(value.detach() for value in values)
        self._checkpoint = ref(checkpoint)
        self._gradients: list[Sequence[Tensor]] = []

    @property
    def checkpoint(self) -> Node | None:
        """The node of the checkpoint, as long as its graph lives."""
        return self._checkpoint()

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Keeps a gradient for the second run."""
        self._gradients.append(gradients)

    def take(self) -> list[Sequence[Tensor]]:
        """What was added since the last time."""
        taken, self._gradients = self._gradients, []
        return taken

    def give(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The values of the second run, such that their gradient has what was added to it."""
        fresh = [value.view_as(value) for value in values]  # a hook on what is not ours would stay
        for gradients in self.take():
            for value, gradient in zip(fresh, gradients, strict=True):
                if value.requires_grad:
                    value.register_hook(gradient.add)
        return fresh


def first_run() -> Node | None:
    """The node of the checkpoint whose first run this is part of; of nested ones the outermost.

    Nothing but the call stack tells. Checkpoints are what they are in torch and in DeepSpeed,
    Megatron and fairscale: an autograd function that keeps a ``run_function``.
    """
    found = None
    for frame in _stack():
        code = frame.f_code
        # Nobody else's locals: to look at them keeps them alive until their function returns.
        if code.co_name == "forward" and code.co_varnames[:1] == ("ctx",):
            context = frame.f_locals.get("ctx")
            if isinstance(context, BackwardCFunction) and hasattr(context, "run_function"):
                found = context
    return cast("Node | None", found)


def join(base: Tensor, held: Sequence[Held]) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """``base`` and the values of first runs, to compute a penalty from.

    The backward pass goes on to what ``base`` was computed from when the gradient by the values
    is complete.
    """
    joined, *values = _Join.apply(base, held)
    values_left = iter(values)
    return joined, [tuple(next(values_left) for _ in one.values) for one in held]


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, held: Sequence[Held]) -> tuple[Tensor, ...]:
        ctx.held = held
        values = [value for one in held for value in one.values]
        return base.view_as(base), *(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *grads: Tensor) -> tuple[Tensor, None]:
        # Else the checkpoint refuses to run, if it is asked to at all.
        if torch.autograd._is_checkpoint_valid():
            grads_left = iter(grads)
            for one in ctx.held:
                one.add([next(grads_left) for _ in one.values])
            # As DistributedDataParallel learns that a backward pass is over.
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(_check_taken, ctx.held))
        return grad, None


def _check_taken(held: Sequence[Held]) -> None:
    missing = sum(bool(one.take()) for one in held)
    if missing:
        raise RuntimeError(
            f"the gradient of {missing} posteriors is lost: a GaussianHead was called in the first "
            "run of a checkpointed function, but not when backward ran it again, or then under "
            "torch.no_grad(). Use use_reentrant=False, or keep what needs no gradient out of the "
            "function."
        )


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back
