"""Adds CLIMB to a loss and a projection head in one line, and removes CLIMB again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from climb_plugin.attach import checked_place, hang
from climb_plugin.loss import ClimbLoss
from climb_plugin.prior import PriorLike
from climb_plugin.schedule import Schedule
from climb_plugin.settings import Settings, is_off


def wrap(
    loss: Callable[..., Tensor],
    *,
    student: nn.Module,
    teacher: nn.Module | None = None,
    beta: float | Schedule,
    at: str = "projection",
    prior: PriorLike = "standard",
    views: int | Sequence[int] = 1,
    alpha: float = 0.0,
    free_nats: float = 0.0,
    init_std: float = 0.1,
    logvar: str = "linear",
) -> ClimbLoss:
    """Adds CLIMB to a loss, and to the projection head behind that loss; returns the criterion.

    Call the criterion as you called ``loss``. A :class:`~climb_plugin.GaussianHead` hangs on
    ``student``, and a frozen twin, which passes on the mean, on ``teacher``. No layer is added:
    indices and state dict keys keep their meaning; keys of the new parameters come in beside them.
    Wrap before the optimiser is built, and before the model is copied: an earlier copy would pair
    parameters with the wrong ones. With ``beta=0`` nothing is hung on: the run is bit-identical to
    one without the plugin. :func:`unwrap` undoes all.

    Args:
        loss: The script's loss, such as ``DINOLoss()``.
        student: The projection head that is trained: any of ``lightly.models.modules``, or your own
            module that maps (B, N) to (B, D).
        teacher: The projection head of the momentum encoder, if there is one.
        beta: Weight of the bottleneck in units of the loss per nat: a number, or a schedule over
            optimiser steps. This and the others are as in :class:`~climb_plugin.settings.Settings`.
        at: Place of the Gaussian: ``"projection"`` or ``"features"``.
        prior: ``"standard"``, ``"learned"``, ``"view"``, ``"backward"``, or one of your own.
        views: How many views each call of the head holds, for priors that compare views.
        alpha: Weight of the conditional entropy beside the rate.
        free_nats: Nats of rate that cost nothing, per sample and head.
        init_std: Standard deviation at the start, in units of the embedding.
        logvar: ``"linear"``, or ``"shared"`` for wide embeddings.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a value is out of range; if a head was wrapped before; if student and teacher
            differ in layout or share storage.

    Examples:
        >>> import torch
        >>> head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
        >>> criterion = wrap(nn.functional.mse_loss, student=head, beta=1e-3)
        >>> criterion(head(torch.randn(8, 32)), head(torch.randn(8, 32))).backward()
        >>> bool(criterion.terms.rate > 0)
        True
    """
    settings = Settings(
        beta=beta,
        alpha=alpha,
        prior=prior,
        views=views,
        free_nats=free_nats,
        at=at,
        init_std=init_std,
        logvar=logvar,
    )
    return wrapped(loss, settings, student=student, teacher=teacher)


def wrapped(
    loss: Callable[..., Tensor],
    settings: Settings,
    *,
    student: nn.Module,
    teacher: nn.Module | None,
    check_base: bool = True,
) -> ClimbLoss:
    """As :func:`wrap`, with settings that are made already; for adapters.

    If this raises, the model is as before. ``check_base`` as in :class:`~climb_plugin.ClimbLoss`.
    """
    if isinstance(loss, ClimbLoss):
        raise ValueError(
            "this loss is a ClimbLoss already: wrap the plain loss, once. To wrap it with other "
            "settings: wrap(unwrap(criterion), ...)."
        )
    place = checked_place(student, teacher=teacher, at=settings.at)
    attached = None
    if not is_off(settings.schedule):
        attached = hang(place, student, teacher, init_std=settings.init_std, logvar=settings.logvar)
    try:
        return ClimbLoss(
            loss,
            heads=() if attached is None else attached,
            beta=settings.beta,
            alpha=settings.alpha,
            prior=settings.prior,
            views=settings.views,
            free_nats=settings.free_nats,
            check_base=check_base,
        )
    except Exception:
        if attached is not None:
            attached.remove()
        raise


def unwrap(criterion: ClimbLoss) -> Callable[..., Tensor]:
    """Takes CLIMB out again, off the model and off the loss; returns the base loss.

    Student and teacher become to the last bit the same as without the plugin, with their present
    weights: keys, order of parameters, hooks, output.

    Args:
        criterion: The result of :func:`wrap`, or a copy made together with a copy of the model.

    Raises:
        TypeError: If ``criterion`` is no ClimbLoss.
        ValueError: If the user put heads into the model by hand, so that their modules are unknown.

    Examples:
        >>> head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> criterion = wrap(nn.functional.mse_loss, student=head, beta=1e-3)
        >>> unwrap(criterion) is nn.functional.mse_loss
        True
    """
    if not isinstance(criterion, ClimbLoss):
        raise TypeError(f"unwrap takes what wrap returned, got {type(criterion).__name__}.")
    climb = criterion.climb
    if len(climb.attached) < len(climb.heads):
        raise ValueError(
            "heads of this ClimbLoss were put into the model by hand: take these out by hand "
            "as well; the base loss is criterion.base."
        )
    climb.watch.steps.stop()
    for attached in climb.attached:
        attached.remove()
    return criterion.base
