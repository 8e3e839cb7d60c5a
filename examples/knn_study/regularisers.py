"""CLIMB, and what it has to be told apart from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from climb_plugin import ClimbLoss
from climb_plugin.adapters.lightly import wrap
from climb_plugin.attach import Place, attach, checked_place
from climb_plugin.schedule import Linear, Schedule, TargetRate
from knn_study.methods import Learner
from knn_study.settings import Settings


def regularised(loss: nn.Module, learner: Learner, settings: Settings, *, steps: int) -> nn.Module:
    """The criterion of a run; what it trains is put into ``learner``.

    =============  =================================================================================
    untrained      the loss itself, of networks that see images and are not trained
    plain, decay   the loss itself (``decay`` is in the optimiser)
    climb          CLIMB by ``wrap``
    noise          the Gaussian head of CLIMB, and no term
    norm           1/2 of the squared norm of the embedding: the rate of a fixed std, without noise
    invariance     squared distance of the embeddings of two views: inverse prediction, Tsai et al.,
                   Self-supervised Learning from a Multi-view Perspective, 2021
    =============  =================================================================================

    Args:
        loss: Of the method.
        learner: Whose heads it is computed from.
        settings: Of the run.
        steps: Optimiser steps of the whole run.
    """
    where: dict[str, Any] = {"student": learner.head, "teacher": learner.teacher_head}
    where["at"] = settings.at
    if settings.regulariser == "climb":
        criterion = wrap(
            loss,
            **where,
            beta=_schedule(settings, steps),
            prior=settings.prior,
            alpha=settings.alpha,
            free_nats=settings.free_nats,
            init_std=settings.init_std,
            logvar=settings.logvar,
        )
    elif settings.regulariser == "noise":
        head = attach(**where, init_std=settings.init_std, logvar=settings.logvar)
        criterion = ClimbLoss(loss, heads=head, beta=0.0)
    elif settings.regulariser in PENALTIES:
        place = checked_place(learner.head, teacher=None, at=settings.at)
        return Penalised(loss, learner.head, place, settings)
    else:
        return loss
    if settings.fixed_std:
        criterion.heads[0].logvar.requires_grad_(False)
    return criterion


def _schedule(settings: Settings, steps: int) -> float | Schedule:
    if settings.target_rate:
        return TargetRate(settings.target_rate, beta=settings.beta or 1e-4)
    if settings.warmup:
        return Linear(settings.beta, warmup=settings.warmup, total_steps=steps)
    return settings.beta


def squared_norm(views: list[Tensor]) -> Tensor:
    """1/2 of the squared norm, averaged over samples and views: each (B, D) -> scalar."""
    return torch.stack([view.float().square().sum(1).mean() / 2 for view in views]).mean()


def squared_distance(views: list[Tensor]) -> Tensor:
    """Of the embeddings of the first two views, averaged over samples: each (B, D) -> scalar."""
    return (views[0].float() - views[1].float()).square().sum(1).mean()


PENALTIES = {"norm": squared_norm, "invariance": squared_distance}


class Penalised(nn.Module):
    """A loss plus ``beta`` times a penalty on the embeddings where CLIMB would act."""

    def __init__(self, loss: nn.Module, head: nn.Module, place: Place, settings: Settings) -> None:
        super().__init__()
        self.loss = loss
        self.beta = settings.beta
        self.penalty = PENALTIES[settings.regulariser]
        self._views: list[Tensor] = []
        module = head.get_submodule(place.path)
        if place.before:
            module.register_forward_pre_hook(lambda _, inputs: self._note(inputs[0]))
        else:
            module.register_forward_hook(lambda _, inputs, output: self._note(output))

    def _note(self, view: Tensor) -> None:
        if torch.is_grad_enabled():  # an evaluation is no step
            self._views.append(view)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of these arguments, plus the penalty of the forward calls since the last."""
        views, self._views = self._views, []
        loss: Tensor = self.loss(*args, **kwargs)
        self.base = loss.detach()
        return loss + self.beta * self.penalty(views)
