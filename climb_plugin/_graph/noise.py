"""Seeds the noise of each draw from torch's seed, without moving torch's random numbers.

Draw k since torch's CPU generator last changed its state comes from a generator of its own. Its
seed mixes that state, the rank, and k. So no two draws share noise, whichever heads make them;
``torch.manual_seed`` makes a run reproducible; and heads have nothing to save or to copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container

import torch
import torch.distributed as dist
from torch import Tensor

from climb_plugin._torch import without_transforms

# Of this process: the state of torch's generator at the last look, as a number, and how many
# draws were made since it came to be.
_state: int | None = None
_drawn = 0


def begin() -> None:
    """Begins the count of draws anew, as the building of a head does.

    A run that is repeated in one process may come to its first draw in the very state in which
    the run before it made its last one. Only the building of a head tells that a run began.
    """
    global _drawn
    _look()
    _drawn = 0


def next_seed(taken: Container[int]) -> int:
    """The seed of the next draw.

    Args:
        taken: Seeds of samples that are still alive. Where a state of torch's generator is
            brought back (``fork_rng``), its draws would come back too.
    """
    global _drawn
    state = _look()
    # Asked for at each draw: a process group may be made after the model.
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    while True:
        seed = _digest(f"{state} {rank} {_drawn}".encode())
        _drawn += 1
        if seed not in taken:
            return seed


def normal(seed: int, like: Tensor) -> Tensor:
    """Standard normal noise of the shape, dtype and device of ``like``."""
    generator = torch.Generator(device=like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def position() -> tuple[int, int]:
    """What a checkpoint needs beside torch's random state: that state as a number, and k."""
    return _look(), _drawn


def restore(saved: tuple[int, int]) -> None:
    """Goes on from what :func:`position` returned, once torch's random state is the same again."""
    global _state, _drawn
    _state, _drawn = saved


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
