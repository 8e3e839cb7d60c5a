"""Seeds the noise of each draw from torch's seed, without moving torch's random numbers.

Draw k since torch's CPU generator last changed its state comes from a generator of its own. Its
seed mixes that state, the rank, and k. So no two draws share noise, whichever heads make them;
``torch.manual_seed`` makes a run reproducible; and heads have nothing to save or to copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container
from typing import NamedTuple

import torch
from torch import Tensor

from climb_plugin._torch import without_transforms
from climb_plugin.distributed import rank

# Of this process: the state of torch's generator at the last look, as a number, how many draws
# were made since it came to be, and how many times the count was begun anew.
_state: int | None = None
_drawn = 0
_run = 0


class Seed(NamedTuple):
    """The seed of a draw, and the run of this process that it belongs to."""

    run: int
    value: int


def begin() -> None:
    """Begins the count of draws anew, as the building of a head does.

    A run that is repeated in one process may come to its first draw in the very state in which
    the run before it made its last one. Only the building of a head tells that a run began.
    """
    global _drawn, _run
    _look()
    _drawn = 0
    _run += 1


def next_seed(taken: Container[Seed]) -> Seed:
    """The seed of the next draw.

    Args:
        taken: Seeds of samples that are still alive. Where a state of torch's generator is
            brought back (``fork_rng``), its draws would come back too.
    """
    global _drawn
    state = _look()
    while True:
        seed = Seed(_run, _digest(f"{state} {rank()} {_drawn}".encode()))
        _drawn += 1
        if seed not in taken:
            return seed


def normal(seed: Seed, like: Tensor) -> Tensor:
    """Standard normal noise of the shape, dtype and device of ``like``."""
    generator = torch.Generator(device=like.device).manual_seed(seed.value)
    # Outside of transforms, which forbid random numbers: it is a constant to them.
    with without_transforms():
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def position() -> tuple[int, int] | None:
    """What a checkpoint needs beside torch's random state: None where that says it all."""
    state = _state
    return (state, _drawn) if state is not None and _drawn and _look() == state else None


def restore(saved: tuple[int, int] | None) -> None:
    """Goes on from what :func:`position` returned, once torch's random state is the same again."""
    global _state, _drawn
    _state, _drawn = (None, 0) if saved is None else saved


def _look() -> int:
    global _state, _drawn
    with without_transforms():
        state = _digest(torch.default_generator.get_state().numpy().tobytes())
    if state != _state:
        _state, _drawn = state, 0
    return state


def _digest(data: bytes) -> int:
    # 63 bits: a generator takes no more without a sign.
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1
