"""Seeds the noise of each draw from torch's seed, without moving torch's random numbers.

Draw k since torch's CPU generator last changed its state comes from a generator of its own, seeded
by a mix of that state, the rank, and k. So no two draws share noise, whichever heads make them;
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

# Of this process: a digest of torch's generator state at the last look, the number of draws since
# that state came about, and the number of restarts of the count.
_state: int | None = None
_drawn = 0
_run = 0


class Seed(NamedTuple):
    """The seed of a draw, and the run of this process that the draw belongs to."""

    run: int
    value: int


def begin() -> None:
    """Restarts the count of draws, when a head is built.

    A run that is repeated in one process may make the first draw in the very state of the last draw
    of the run before. Only the building of a head tells that a new run began.
    """
    global _drawn, _run
    _look()
    _drawn = 0
    _run += 1


def next_seed(taken: Container[Seed]) -> Seed:
    """The seed of the next draw.

    Seeds that are taken, by samples still alive, are skipped: a state of torch's generator that is
    brought back (``fork_rng``) would bring back their noise.
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
    # Outside of transforms, which forbid random numbers: to them the noise is a constant.
    with without_transforms():
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def position() -> tuple[int, int] | None:
    """Random state and count of draws for a checkpoint; None if torch's random state suffices."""
    state = _state
    return (state, _drawn) if state is not None and _drawn and _look() == state else None


def restore(saved: tuple[int, int] | None) -> None:
    """Goes on from a :func:`position`, once torch's random state is the same again."""
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
