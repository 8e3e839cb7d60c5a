"""Adds CLIMB to a loss and a projection head in one line, and takes it out again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from climb_plugin.attach import checked_place, hang
from climb_plugin.loss import ClimbLoss
from climb_plugin.schedule import Constant, Schedule, as_schedule


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

    Hangs a :class:`~climb_plugin.GaussianHead` on ``student`` in place, and a frozen twin, which
    passes on its mean, on ``teacher``. No layer is added: indices and the keys of their state
    dicts mean what they meant; the keys of the new parameters come in beside them. Call it
    before the optimiser is built. :func:`unwrap` undoes it.

    With ``beta=0`` nothing is hung on: the run is bit-identical to one without the plugin.

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
        >>> from torch.nn.functional import mse_loss
        >>> head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
        >>> criterion = wrap(mse_loss, student=head, beta=1e-3)
        >>> views = torch.randn(8, 32), torch.randn(8, 32)
        >>> criterion(head(views[0]), head(views[1])).backward()
        >>> bool(criterion.terms.rate > 0)
        True
    """
    if isinstance(loss, ClimbLoss):
        raise ValueError(
            "this loss is a ClimbLoss already: wrap the plain loss, once. To wrap it with other "
            "settings: wrap(unwrap(criterion), ...)."
        )
    place = checked_place(student, teacher=teacher, at=at)
    schedule = as_schedule(beta)
    off = schedule == Constant(0.0)

    attached = None if off else hang(place, student, teacher, init_std=init_std)
    try:
        return ClimbLoss(
            loss,
            heads=() if attached is None else attached,
            beta=schedule,
            alpha=alpha,
            prior=prior,
            views=views,
            free_nats=free_nats,
        )
    except Exception:
        if attached is not None:
            attached.remove()
        raise


def unwrap(criterion: ClimbLoss) -> Callable[..., Tensor]:
    """Takes CLIMB out again: off the model, and off the loss.

    Student and teacher are to the last bit what they would be without the plugin, with the
    weights that they have now: keys, order of parameters, hooks, output.

    Args:
        criterion: What :func:`wrap` returned, or a copy of it that was copied together with the
            model.

    Returns:
        The base loss.

    Raises:
        TypeError: If it is no ClimbLoss.
        ValueError: If heads of it were not hung by this package, so that their modules are
            unknown.

    Examples:
        >>> head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> criterion = wrap(nn.functional.mse_loss, student=head, beta=1e-3)
        >>> unwrap(criterion) is nn.functional.mse_loss
        True
    """
    if not isinstance(criterion, ClimbLoss):
        raise TypeError(f"unwrap takes what wrap returned, got {type(criterion).__name__}.")
    criterion.climb.remove()
    return criterion.base
