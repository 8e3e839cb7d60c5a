"""Noise of its own: a stream that leaves the host's random numbers as they were."""

from __future__ import annotations

import torch
import torch.distributed as dist

_MASK = (1 << 64) - 1


class NoiseStream:
    """Numbered generators: draw ``k`` of a stream is the same on every machine and in every run.

    The host's generators are never read or advanced, so a run with noise sees the same
    augmentations, shuffles and dropout masks as its twin without. Ranks draw differently even
    when all were seeded alike. The whole state is two integers, so a checkpoint holds it.

    Args:
        seed: Seed of the stream.

    Attributes:
        seed: Seed of the stream.
        drawn: Number of generators handed out so far.

    Examples:
        >>> stream = NoiseStream(seed=0)
        >>> first = torch.randn(2, generator=stream.next("cpu"))
        >>> torch.equal(first, torch.randn(2, generator=stream.at(0, "cpu")))
        True
    """

    def __init__(self, *, seed: int) -> None:
        self.seed = seed
        self.drawn = 0

    def next(self, device: torch.device | str) -> torch.Generator:
        """The next generator of the stream, on ``device``."""
        generator = self.at(self.drawn, device)
        self.drawn += 1
        return generator

    def at(self, index: int, device: torch.device | str) -> torch.Generator:
        """Generator number ``index`` of the stream, on ``device``."""
        # Asked for at each draw: a process group may be made after the model.
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        generator = torch.Generator(device=device)
        # torch's CPU generator keeps the low 32 bits of a seed, hence the mixing.
        return generator.manual_seed(_mix(_mix(_mix(self.seed) + rank) + index) >> 1)


def _mix(number: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)
