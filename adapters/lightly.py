"""CLIMB for lightly: one changed line in a training script.

Nothing here depends on the class of a loss or of a projection head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

from torch import Tensor, nn

from climb_plugin.attach import find_place
from climb_plugin.loss import ClimbLoss
from climb_plugin.schedule import Constant, Schedule, as_schedule

if find_spec("lightly") is None:
    raise ImportError("lightly is not installed: pip install 'climb-plugin[lightly]'")


def wrap(
    loss: Callable[..., Tensor],
    *,
    student: nn.Module,
    teacher: nn.Module | None = None,
    beta: float | Schedule,
    at: str = "projection",
    prior: str = "standard",
    views: int | Sequence[int] = 1,
    alpha: float = 0.0,
    free_nats: float = 0.0,
    init_std: float = 0.1,
) -> ClimbLoss:
    """Adds CLIMB to a loss and to the projection head that it is computed from.

    Puts a :class:`~climb_plugin.GaussianHead` into ``student`` in place, and a twin that passes
    on the mean into ``teacher``. The keys of their state dicts stay; those of the new layers
    are added. Call it before the optimiser is built.

    With ``beta=0`` nothing is put in: the run is bit-identical to one without the plugin.

    Args:
        loss: The loss as the script has it, such as ``DINOLoss()``.
        student: The projection head that is trained: any of ``lightly.models.modules``, or your
            own module that maps (B, N) to (B, D).
        teacher: The projection head of the momentum encoder, if there is one.
        beta: Weight of the bottleneck in units of the loss per nat: a number, or a schedule over
            optimiser steps (:mod:`climb_plugin.schedule`).
        at: ``"projection"``: at the end of the projection MLP, before an L2 normalisation or
            prototypes in the head. ``"features"``: between backbone and projection head.
        prior: ``"standard"``, ``"learned"`` or ``"view"``; see :class:`~climb_plugin.ClimbLoss`.
        views: For ``prior="view"`` where the head is called on several views in one batch.
        alpha: Weight of the conditional entropy beside the rate.
        free_nats: Nats of rate that cost nothing, per sample and head, over all dimensions.
        init_std: Standard deviation at the start, in units of the embedding.

    Returns:
        The criterion; call it as you called ``loss``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a value is out of range, a head was wrapped before, or student and teacher
            differ in layout or share storage.

    Examples:
        >>> import torch
        >>> from lightly.loss import NTXentLoss
        >>> from lightly.models.modules import SimCLRProjectionHead
        >>> head = SimCLRProjectionHead(32, 32, 16)
        >>> criterion = wrap(NTXentLoss(), student=head, beta=1e-3)
        >>> views = torch.randn(8, 32), torch.randn(8, 32)
        >>> criterion(head(views[0]), head(views[1])).backward()
        >>> bool(criterion.terms.rate > 0)
        True
    """
    if isinstance(loss, ClimbLoss):
        raise ValueError("this loss is a ClimbLoss already: wrap the plain loss, once.")
    placement = find_place(student, teacher=teacher, at=at)
    head = placement.make_head(init_std=init_std)
    schedule = as_schedule(beta)
    off = schedule == Constant(0.0)
    criterion = ClimbLoss(
        loss,
        heads=() if off else head,
        beta=schedule,
        alpha=alpha,
        prior=prior,
        views=views,
        free_nats=free_nats,
    )
    if not off:
        placement.hang(head)
    return criterion
