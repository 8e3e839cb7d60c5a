"""Warns if a loss trains on several ranks without the wrapper that averages gradients."""

from __future__ import annotations

from torch import nn

from climb_plugin._run.living import living
from climb_plugin._torch import joins
from climb_plugin.checks import warn

# By name: importing torch's FSDP takes time, which a run without FSDP need not spend.
_AVERAGING = frozenset({"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"})


def check_ranks(priors: nn.Module, name: str, *, needs_rate: bool) -> None:
    """Checks the first training step on several ranks.

    Args:
        priors: The priors of the loss.
        name: The user's name of the prior.
        needs_rate: Whether each step averages the rate over the ranks. Then a RuntimeError is
            raised if a rank may run out of steps before the others.
    """
    if not needs_rate and not any(True for _ in priors.parameters()):
        return
    # Nothing but the garbage collector lists the modules that average gradients over the ranks.
    wrappers = living(lambda kind: any(base.__name__ in _AVERAGING for base in kind.__mro__))
    averaged = {id(parameter) for wrapper in wrappers for parameter in wrapper.parameters()}
    if not averaged.issuperset(map(id, priors.parameters())):
        warn(
            f"prior={name!r} is learned, and no DistributedDataParallel or FSDP module holds this "
            "loss: each rank trains a prior of its own. Put model and loss into one module that "
            "returns the loss, and wrap and call that."
        )
    if needs_rate and any(joins(wrapper) for wrapper in wrappers):
        raise RuntimeError(
            "a target rate is averaged over all ranks in every step, and within "
            "DistributedDataParallel.join() a rank may run out of steps: use a beta or a "
            "schedule, or drop_last=True and as many batches on every rank instead of join()."
        )
