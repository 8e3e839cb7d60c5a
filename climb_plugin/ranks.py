"""What a loss cannot know by itself where several ranks train: who wraps it."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from climb_plugin._run.living import living
from climb_plugin._torch import joins

# By name: importing torch's FSDP takes time that a run without it need not spend.
_AVERAGING = frozenset({"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"})


def several() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def averaging() -> list[nn.Module]:
    """The modules of this process that average gradients over the ranks.

    Nothing lists them, so this looks through all objects.
    """
    return living(lambda kind: any(base.__name__ in _AVERAGING for base in kind.__mro__))


def averaged(module: nn.Module) -> bool:
    """Whether something averages the gradients of all parameters of ``module`` over the ranks."""
    held = {id(parameter) for wrapper in averaging() for parameter in wrapper.parameters()}
    return held.issuperset(map(id, module.parameters()))


def joining() -> bool:
    """Whether a ``DistributedDataParallel`` of this process trains in its ``join()`` context."""
    return any(joins(wrapper) for wrapper in averaging())
