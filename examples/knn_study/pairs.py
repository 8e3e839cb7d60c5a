"""Measures the pairs of views of a step: those that show one image, and those that show two."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from climb_plugin import ClimbLoss


class Pairs:
    """Sums what the steps of an epoch say of right and of wrong pairs.

    =============================  ============================================================
    rate right, rate wrong         of the two large views, by the prior of the run, in nats
    agreement right, wrong         share of pairs for which DINO's student chooses the prototype
                                   that the teacher's target has for the other view
    agreement by chance            the same, if pairs were drawn anew
    teacher entropy                of each row of DINO's teacher, and of the mean of the rows,
                                   both over ln K
    =============================  ============================================================
    """

    def __init__(self, criterion: nn.Module, loss: nn.Module) -> None:
        """``loss`` is the loss of the method, which ``criterion`` may hold."""
        self.criterion = criterion
        self._center: Tensor | None = None
        if hasattr(loss, "center"):  # DINO's, as the loss uses it: the loss moves it afterwards
            loss.register_forward_pre_hook(self._note_center)
        self._embeddings: list[Tensor] = []
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        if isinstance(criterion, ClimbLoss):
            head = criterion.heads[0]
            head.register_forward_pre_hook(self._note)

    @torch.no_grad()
    def step(self, outputs: tuple[Any, ...], wrong: Tensor, teacher_temperature: float) -> None:
        """Adds a step whose criterion was called with ``outputs``.

        Args:
            outputs: Of the learner; of DINO (teacher's, student's), each a list of (B, K).
            wrong: Whether the views of a pair show two images, (B,).
            teacher_temperature: Of DINO.
        """
        embeddings, self._embeddings = self._embeddings[:2], []
        if isinstance(self.criterion, ClimbLoss):
            posteriors = [self.criterion.heads[0].posterior(one) for one in embeddings]
            rates = self.criterion.climb_priors[0](posteriors)
            self._split("rate", rates.view(-1, len(wrong)).mean(0), wrong)
        if self._center is not None:
            teacher, student = outputs
            targets = [(one - self._center.flatten()) / teacher_temperature for one in teacher]
            theirs, ours = (_choices(views[:2]) for views in (targets, student))
            agreement = [(theirs[i] * ours[1 - i]).sum(1) for i in (0, 1)]
            self._split("agreement", torch.stack(agreement).mean(0), wrong)
            shares = torch.cat(theirs).mean(0), torch.cat(ours).mean(0)
            self._add("agreement by chance", (shares[0] * shares[1]).sum())
            rows = torch.cat(targets).softmax(1)
            for name, share in (("of rows", rows), ("of the mean", rows.mean(0, keepdim=True))):
                self._add(f"teacher entropy {name}", _entropy(share) / math.log(rows.shape[1]))

    def _note(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():  # an evaluation is no step
            self._embeddings.append(inputs[0].detach())

    def _note_center(self, loss: nn.Module, _: Any) -> None:
        self._center = loss.center.detach().clone()  # type: ignore[operator, union-attr]

    def means(self) -> dict[str, float]:
        """Of the steps since the last call of this; without wrong pairs, none of those."""
        counts = {name: count.item() for name, count in self._counts.items()}
        found = {name: self._sums[name].item() / count for name, count in counts.items() if count}
        self._sums, self._counts = {}, {}
        return found

    def _split(self, name: str, values: Tensor, wrong: Tensor) -> None:
        for kind, chosen in (("right", ~wrong), ("wrong", wrong)):
            self._add(f"{name} {kind}", values, chosen)

    def _add(self, name: str, values: Tensor, chosen: Tensor | None = None) -> None:
        """Nothing here waits for the device."""
        weights = torch.ones_like(values) if chosen is None else chosen.float()
        zero = torch.zeros((), device=values.device)
        self._sums[name] = self._sums.get(name, zero) + (weights * values).sum()
        self._counts[name] = self._counts.get(name, zero) + weights.sum()


def _choices(views: list[Tensor]) -> list[Tensor]:
    """1 for the prototype that each row chooses, 0 for the others: each (B, K)."""
    return [one_hot(view.argmax(1), view.shape[1]).float() for view in views]


def _entropy(shares: Tensor) -> Tensor:
    return torch.special.entr(shares).sum(-1)
