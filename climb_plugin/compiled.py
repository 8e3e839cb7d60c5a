"""What a head needs inside torch.compile: an operator for its noise, a shelf for its posteriors.

A compiled region has neither generators nor autograd nodes to tie anything to. The noise comes
from an operator whose body the compiler does not look into. It says that it changes a tensor, so
two calls with the same arguments are neither merged nor reordered. A posterior goes onto the
shelf under a name that is fixed while the region is compiled: storing under a new name depends
on nothing that was there before, so no step is compiled anew. What lies there has its autograd
node once the region has run, and is taken away before the next one, or by the loss.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_names = itertools.count()
_numbers = itertools.count()
_sources: WeakValueDictionary[int, Source] = WeakValueDictionary()


class Source(Protocol):
    """Who draws noise for an embedding."""

    def draw(self, embedding: Tensor) -> Tensor:
        """Noise for an embedding."""
        ...


class Shelf:
    """What a compiled region has left; its attributes are the regions' own."""

    def put(self, item: Any) -> None:
        """Keeps ``item`` until it is taken, or until the same place in the code puts another."""
        setattr(self, _new_name(), item)

    def take(self) -> list[Any]:
        """What was put since the last time, in the order of the code."""
        items = [vars(self)[name] for name in sorted(vars(self))]
        vars(self).clear()
        return items


class Noise:
    """The noise of ``source`` for compiled code, equal to what ``source.draw`` returns.

    Args:
        source: Whose noise it is; held weakly.
    """

    def __init__(self, source: Source) -> None:
        self.number = next(_numbers)
        # Not where "with torch.device('meta')" says: the operator would run as its fake.
        self.token = torch.zeros((), dtype=torch.int64, device="cpu")
        _sources[self.number] = source

    def draw(self, embedding: Tensor, width: int) -> Tensor:
        """Noise of shape (..., B, width), in float32 or float64."""
        noise: Tensor = _noise(embedding.detach(), self.token, self.number, width)
        return noise


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Makes torch.compile step around ``function``, whole and without looking into it.

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


# The schema in words: torch before 2.5 does not read annotations that are strings.
@torch.library.custom_op(
    "climb_plugin::noise",
    mutates_args=("token",),
    schema="(Tensor embedding, Tensor(a!) token, int number, int width) -> Tensor",
)
def _noise(embedding: Tensor, token: Tensor, number: int, width: int) -> Tensor:
    return _sources[number].draw(embedding)


@_noise.register_fake
def _(embedding: Tensor, token: Tensor, number: int, width: int) -> Tensor:
    dtype = torch.float64 if embedding.dtype == torch.float64 else torch.float32
    return embedding.new_empty((*embedding.shape[:-1], width), dtype=dtype)


def _new_name() -> str:
    return f"{next(_names):012d}"


# torch.compiler.assume_constant_result, without its import of the compiler, which takes a second.
_new_name._dynamo_marked_constant = True  # type: ignore[attr-defined]
