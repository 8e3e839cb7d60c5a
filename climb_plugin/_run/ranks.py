"""Warns if a loss trains on several ranks without the wrapper that averages gradients."""

from __future__ import annotations

from torch import nn

from climb_plugin._run.living import living
from climb_plugin._torch import joins
from climb_plugin.checks import warn
from climb_plugin.distributed import world_size

# By name: importing torch's FSDP takes time, which a run without FSDP need not spend.
_AVERAGING = frozenset({"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"})


class RankCheck:
    """Looks, once, for the wrappers of the loss; a loss cannot know these by itself.

    Args:
        priors: The priors of the loss.
    """

    def __init__(self, priors: nn.Module) -> None:
        self._priors = priors
        self._is_done = False

    def check(self, prior: str, *, needs_rate: bool) -> None:
        """Checks the first training step on several ranks.

        Args:
            prior: The user's name of the prior.
            needs_rate: Whether each step averages the rate over the ranks.

        Raises:
            RuntimeError: If ``needs_rate``, and a rank may run out of steps before the others.
        """
        if self._is_done or world_size() == 1:
            return
        self._is_done = True
        if any(True for _ in self._priors.parameters()) and not _averages(self._priors):
            warn(
                f"prior={prior!r} is learned, and no DistributedDataParallel or FSDP module "
                "holds this loss: each rank trains a prior of its own. Put model and loss into "
                "one module that returns the loss, and wrap and call that."
            )
        if needs_rate and any(joins(wrapper) for wrapper in _wrappers()):
            raise RuntimeError(
                "a target rate is averaged over all ranks in every step, and within "
                "DistributedDataParallel.join() a rank may run out of steps: use a beta or a "
                "schedule, or drop_last=True and as many batches on every rank instead of join()."
            )


def _wrappers() -> list[nn.Module]:
    """The modules that average gradients over the ranks; nothing but the collector lists them."""
    return living(lambda kind: any(base.__name__ in _AVERAGING for base in kind.__mro__))


def _averages(module: nn.Module) -> bool:
    """Whether something averages the gradients of all parameters of ``module``."""
    ids = {id(parameter) for wrapper in _wrappers() for parameter in wrapper.parameters()}
    return ids.issuperset(map(id, module.parameters()))
