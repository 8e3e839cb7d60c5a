"""Asks torch.distributed for this process's place among the ranks.

No answer is cached: a process group may be made after the model.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """The rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a detached scalar over the ranks, the same on each; one all-reduce.

    A rank whose value is NaN has none, but takes part. NaN if no rank has one.
    """
    if world_size() == 1:
        return value
    known = ~value.isnan()
    total = torch.stack([value.nan_to_num(nan=0.0), known.to(value.dtype)])
    dist.all_reduce(total)
    return total[0] / total[1]


def beside(other: Tensor, value: Tensor) -> Tensor:
    """A scalar on the device of ``other``, filled in there: a copy would wait for the device."""
    return value if value.device == other.device else other.new_full((), float(value))
