"""Watches the training of one loss; may warn, raise or count, and changes no number.

This is the one door to the outer ring: :mod:`climb_plugin.loss` and :mod:`climb_plugin.climb`
import nothing else of this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from climb_plugin._graph.sample import Sample
from climb_plugin._run.collapse import CollapseWatch
from climb_plugin._run.deferred import DeferredFlags
from climb_plugin._run.finite import check_finite
from climb_plugin._run.missing import Wiring
from climb_plugin._run.ranks import check_ranks
from climb_plugin._run.steps import Steps
from climb_plugin._torch import is_batch_of_gradients, plain, without_transforms
from climb_plugin.checks import warn
from climb_plugin.distributed import world_size
from climb_plugin.gaussian import Posterior
from climb_plugin.head import GaussianHead

_running = 0  # Losses of this process whose base is being called.


class Watch:
    """All checks of one loss.

    Args:
        heads: The heads of the loss.
        priors: The priors of the loss, one for each head.
        prior: The user's name of the prior.
        check_base: Whether the base loss must be finite.

    Attributes:
        nesting: Surrounds the call of the base loss.
        steps: Counts the optimiser steps.
    """

    def __init__(
        self, heads: Sequence[GaussianHead], priors: nn.ModuleList, *, prior: str, check_base: bool
    ) -> None:
        self.nesting = _Nesting(active=bool(heads))
        self.steps = Steps(heads, priors)
        self._wiring = Wiring(heads)
        self._priors, self._prior, self._check_base = priors, prior, check_base
        self._knows_ranks = False
        self._finite = DeferredFlags()
        self._collapse = CollapseWatch()
        self._signs = DeferredFlags()
        self._warned_of_sign = False

    def found(self, value: Tensor, samples: Sequence[Sequence[Sample]], needs_rate: bool) -> None:
        """Checks a step before its rates are computed.

        Args:
            value: The value of the base loss.
            samples: For each head the samples that the value depends on.
            needs_rate: Whether the schedule sees the rate of each step.
        """
        self._wiring.check(value, samples)
        if not self._knows_ranks and any(samples) and world_size() > 1:
            self._knows_ranks = True
            check_ranks(self._priors, self._prior, needs_rate=needs_rate)

    def terms(
        self,
        base: Tensor,
        rate: Tensor,
        entropy: Tensor,
        *,
        beta: float | Tensor,
        function: Callable[..., Tensor],
        posteriors: Sequence[Sequence[Posterior]],
        rates: Sequence[Tensor] | None,
    ) -> None:
        """Checks the terms of a step, detached scalars.

        Args:
            base: The value of the base loss.
            rate: The rate.
            entropy: The conditional entropy.
            beta: Their weight.
            function: The base loss.
            posteriors: For each head its posteriors.
            rates: For each head the rates of its samples; None if the prior compares views: such
                rates do not tell the distance to a fixed prior.
        """
        terms = {"base loss": base} if self._check_base else {}
        check_finite(self._finite, {**terms, "rate": rate, "entropy": entropy}, posteriors)
        self._collapse.observe(
            base=function, value=base, beta=beta, rates=rates, posteriors=posteriors
        )

    def trains(self, base: Tensor, penalty: Tensor) -> None:
        """Notes a step that will have a backward pass, by its terms with their graph."""
        self.steps.loss_called(base)
        penalty.register_hook(self._after_backward)

    def _after_backward(self, gradient: Tensor) -> None:
        self.steps.backward_done()
        if self._warned_of_sign or is_batch_of_gradients(gradient):
            return
        try:
            with without_transforms(), torch.no_grad():
                negative = (plain(gradient) < 0).reshape(1)
                self._warned_of_sign = bool(self._signs.raised(negative))
        except RuntimeError:  # batched gradients (is_grads_batched) have no value to look at
            return
        if self._warned_of_sign:
            warn(
                "the gradient that reaches CLIMB's terms is negative, so the training maximises "
                "the rate: the criterion stands behind a minus sign, as a similarity that is "
                "negated. Wrap the loss that is minimised: wrap(lambda *a: -similarity(*a), ...)."
            )


class _Nesting:
    """Raises if a loss with heads is called within another one: the rate would count twice."""

    def __init__(self, *, active: bool) -> None:
        self._active = active

    def __enter__(self) -> None:
        global _running
        if not self._active or torch.compiler.is_compiling():
            return
        if _running:
            raise RuntimeError(
                "this ClimbLoss is called within the base loss of another ClimbLoss, so the rate "
                "would count twice: wrap the whole loss once, or add up two criteria outside."
            )
        _running += 1

    def __exit__(self, *_: object) -> None:
        global _running
        if self._active and _running and not torch.compiler.is_compiling():
            _running -= 1
