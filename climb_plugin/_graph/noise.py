"""Seeds the noise of each draw from torch's seed, without moving torch's random numbers.

Draw k since torch's CPU generator last changed its state comes from a generator of its own, seeded
by a mix of that state, the rank, and k. So no two draws share noise, whichever heads make them;
``torch.manual_seed`` makes a run reproducible; and heads have nothing to save or to copy.

torch.utils.checkpoint drops the tensors within and runs the code again in the backward pass. With
other noise the gradient would be that of another sample, so a second run repeats the seed of the
first. The whole batch identifies a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from climb_plugin._torch import plain, without_modes, without_transforms
from climb_plugin.distributed import rank

if TYPE_CHECKING:
    from climb_plugin._graph.sample import Sample

# Of this process: a digest of torch's generator state at the last look, the number of draws since
# that state came about, the number of restarts of the count, and a loaded position, of which the
# next draw tells whether that state has come.
_state: int | None = None
_drawn = 0
_run = 0
_awaited = (0, 0)


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


def position() -> tuple[int, int]:
    """Random state and count of draws in that state, for a checkpoint."""
    # Nothing is written: a checkpoint may be saved within fork_rng(), whose state goes again.
    state = _now()
    return state, _drawn_in(state)


def restore(saved: tuple[int, int]) -> None:
    """Goes on from a :func:`position`, if torch's random state is the same at the next draw.

    Otherwise the present count goes on: starting anew would bring back noise that has been used.
    """
    global _state, _drawn, _awaited
    if saved[0] == _now():
        _state, _drawn = saved
    else:
        _awaited = saved


def _look() -> int:
    global _state, _drawn, _awaited
    state = _now()
    if state != _state:
        _state, _drawn = state, _drawn_in(state)
    _awaited = (0, 0)  # else a later run in this process might come by that state
    return state


def _drawn_in(state: int) -> int:
    if state == _state:
        return _drawn
    return _awaited[1] if state == _awaited[0] else 0


def _now() -> int:
    with without_transforms():
        return _digest(torch.default_generator.get_state().numpy().tobytes())


def _digest(data: bytes) -> int:
    # 63 bits: a generator takes no more without a sign.
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


class Fingerprint:
    """One number for each row of a batch (..., B, D), on the batch's device."""

    def __init__(self, embedding: Tensor) -> None:
        with torch.no_grad(), without_transforms():
            rows = plain(embedding).detach().flatten(0, -2)
            # float32 at least: numpy has no bfloat16, and sums of two rows might agree.
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            self._rows = rows @ _direction(rows.shape[-1], rows.dtype, rows.device)
        self._content: bytes | None = None

    def content(self) -> bytes:
        """The fingerprint as bytes, the same for the same batch; waits for the device, once."""
        if self._content is None:
            with without_modes():
                self._content = self._rows.cpu().numpy().tobytes()
        return self._content


def seed_of_first_run(fingerprint: Fingerprint, firsts: Iterable[Sample]) -> Seed:
    """The seed of the one sample with this fingerprint among a head's first runs."""
    content = fingerprint.content()
    seeds = {one.seed for one in firsts if one.fingerprint.content() == content}
    if len(seeds) == 1:
        return seeds.pop()
    if seeds:
        raise RuntimeError(
            f"a checkpointed GaussianHead ran again in the backward pass, and {len(seeds)} of its "
            "calls had the very same batch: they cannot be told apart, so the noise of the first "
            "run cannot be found. Take one call out of the checkpoint, or call it on both at once "
            "(torch.cat)."
        )
    raise RuntimeError(
        "a GaussianHead ran in the backward pass, as checkpointed code does, but had no first run "
        "with gradients on this batch, so there is no noise that it could repeat. Checkpoint with "
        "use_reentrant=False, make what is checkpointed deterministic, or keep the GaussianHead "
        "out of the checkpoint."
    )


@lru_cache(maxsize=16)
def _direction(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Made once, so hidden from modes: selective checkpointing would miss it in a second run.
    with without_modes():
        generator = torch.Generator(device="cpu").manual_seed(0)
        direction = torch.randn(width, generator=generator, dtype=torch.float64, device="cpu")
        return direction.to(device, dtype)
